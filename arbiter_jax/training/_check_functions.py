"""The functions and the transformation of a run, and what a gradient function returns, checked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from arbiter_jax.base import PyTree
from arbiter_jax.training._difference import difference
from arbiter_jax.training._leaves import called


def check_functions(
    loss_fn: Any,
    gradient_fn: Any,
    transform_batch: Any,
    model_state: PyTree = None,
    inputs_of: Any = None,
) -> None:
    """Raises a ValueError if the functions of a run cannot be what they are given as."""
    if loss_fn is None and gradient_fn is None:
        raise ValueError("loss_fn must be given, or gradient_fn in its place, got None for both.")
    if loss_fn is not None and gradient_fn is not None:
        raise ValueError(
            "loss_fn must be None where gradient_fn is given, got both: gradient_fn replaces the "
            "gradient of loss_fn."
        )
    if gradient_fn is not None:
        arguments = "params, batch, mask, model_state, key"
        _check_function(gradient_fn, "gradient_fn", arguments, "Gradient")
    else:
        _check_loss(loss_fn, model_state)
    if transform_batch is not None:
        _check_function(transform_batch, "transform_batch", "key, batch", "batch")
    if inputs_of is not None:
        _check_function(inputs_of, "inputs_of", "batch", "inputs")


def check_callback(callback: Any) -> None:
    """Raises a ValueError if this is no function of a record and a state."""
    if not callable(callback):
        raise ValueError(
            "callbacks must be functions callback(record, state), or one of them, got "
            f"{callback!r}."
        )
    refused = _arguments_refused(callback, 2)
    if refused is not None:
        raise ValueError(
            f"callbacks must be functions callback(record, state), got one that takes {refused}."
        )


def check_transformation(tx: Any) -> None:
    """Raises a ValueError if `tx` is no optax transformation."""
    has_both = callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))
    if has_both and not isinstance(tx, type):
        return
    hint = "chain an optimizer with a rule, optax.chain(optax.sgd(0.1), aj.schedulers.constant(64))"
    if isinstance(tx, tuple | list):
        hint = "join them with optax.chain(*tx)"
    elif callable(tx):
        hint = "call it first, e.g. optax.sgd(0.1)"
    raise ValueError(f"tx must be an optax gradient transformation, got {called(tx)}: {hint}.")


def check_gradient(gradient: Any, params: PyTree, model_state: PyTree) -> None:
    """Raises a ValueError if what a gradient function returned is not the gradient of these."""
    fields = ("value", "grads", "model_state", "grad_stats", "_replace")
    if not all(hasattr(gradient, name) for name in fields):
        raise ValueError(
            "gradient_fn must return arbiter_jax.gradients.Gradient(value, grads, model_state), got "
            f"{called(gradient)}."
        )
    value = gradient.value
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise ValueError(
            "gradient_fn must return as value the mean loss of the batch, float[], got "
            f"{jnp.result_type(value)}{list(jnp.shape(value))}."
        )
    different = difference(gradient.grads, params, types=False)
    if different is not None:
        raise ValueError(f"gradient_fn must return grads like params, but grads{different}.")
    if model_state is not None:
        different = difference(gradient.model_state, model_state, types=False)
        if different is not None:
            raise ValueError(
                "loss_fn and gradient_fn must return a model_state like the one that they are "
                f"given, but model_state{different}."
            )


def _check_function(value: Any, name: str, arguments: str, returns: str) -> None:
    expected = f"{name} must be a function {name}({arguments}) -> {returns}"
    if not callable(value):
        raise ValueError(f"{expected}, got {called(value)}.")
    refused = _arguments_refused(value, len(arguments.split(", ")))
    if refused is not None:
        raise ValueError(f"{expected}, got one that takes {refused}.")
    _check_hashable(value, name)


def _check_loss(loss_fn: Any, model_state: PyTree) -> None:
    if not callable(loss_fn):
        raise ValueError(
            f"loss_fn must be a function loss_fn(params, batch) -> float[M], got {called(loss_fn)}."
        )
    number = 2 if model_state is None else 5
    refused = _arguments_refused(loss_fn, number)
    if refused is None:
        _check_hashable(loss_fn, "loss_fn")
        return
    if model_state is not None:
        advice = (
            "model_state is given, so it is called with all five; leave model_state out if the "
            "model has none"
        )
        raise ValueError(
            "loss_fn must be a function loss_fn(params, batch, model_state, mask, key) -> "
            f"(float[M], model_state), got one that takes {refused}: {advice}."
        )
    advice = ""
    if _arguments_refused(loss_fn, 5) is None:
        advice = (
            ": a loss of five arguments needs model_state, the second result of model.init; {} is "
            "one without any array"
        )
    raise ValueError(
        "loss_fn must be a function loss_fn(params, batch) -> float[M], got one that takes "
        f"{refused}{advice}."
    )


def _arguments_refused(function: Callable[..., Any], number: int) -> str | None:
    """The signature of a function that cannot be called with this many arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none
        return None
    try:
        signature.bind(*range(number))
    except TypeError:
        return str(signature)
    return None


def _check_hashable(value: Any, name: str) -> None:
    try:
        hash(value)
    except TypeError:
        raise ValueError(
            f"{name} must be hashable, because programs are kept by it, got {called(value)}: wrap "
            "it in a function of its own, defined once."
        ) from None
