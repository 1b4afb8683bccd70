"""More extra arguments of ``tx.update``: those that only the user's optimizer knows.

Line searches and second-order optimizers evaluate the loss of the batch at parameters of their own
choice, so that a loop has to hand them the loss as a function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from arbiter_jax.base import PyTree
from arbiter_jax.batching import masked_mean
from arbiter_jax.gradients import GradientFn
from arbiter_jax.gradients._masked import call_loss

BatchLoss = Callable[[PyTree], jax.Array]
ExtraArgs = Callable[[BatchLoss], dict[str, Any]]
"""``extra_args(batch_loss) -> dict``, where ``batch_loss(params) -> float[]`` is the mean loss."""


def check_extra_args(extra_args: Any, micro_batch_size: Any = None) -> None:
    """Raises a ValueError if this cannot make the extra arguments of a run."""
    if extra_args is None:
        return
    expected = "extra_args must be a function extra_args(batch_loss) -> dict"
    if isinstance(extra_args, Mapping):
        raise ValueError(
            f"{expected}, got a dict of {len(extra_args)}: define once a function that returns it, "
            "because compiled programs are cached by its identity."
        )
    if not callable(extra_args):
        raise ValueError(f"{expected}, got {extra_args!r}.")
    try:
        inspect.signature(extra_args).bind(0)
        hash(extra_args)
    except TypeError as error:
        raise ValueError(
            f"{expected} that takes one argument and is hashable, got {extra_args!r} ({error})."
        ) from None
    if micro_batch_size is not None:
        raise ValueError(
            "micro_batch_size must be None if extra_args is given, got "
            f"{micro_batch_size!r}: batch_loss would have to go through the groups of a batch at every "
            "evaluation, and back through them for its gradient."
        )


def loss_of_batch(
    batch: PyTree,
    mask: jax.Array,
    model_state: PyTree,
    key: jax.Array | None,
    *,
    loss_fn: Any,
    gradient_fn: GradientFn | None,
    has_aux: bool,
) -> BatchLoss:
    """The mean loss of a batch as a function of the parameters.

    Args:
      batch: Pytree of arrays [M, ...], whose masked rows repeat a real example.
      mask: bool[M], True for a real example.
      model_state: Of the model, as the step finds it.
      key: Of the step, or None.
      loss_fn: See :class:`arbiter_jax.base.LossFn`.
      gradient_fn: In its place; then the loss is the value that it returns.
      has_aux: Whether `loss_fn` returns auxiliary output.
    """

    def batch_loss(params: PyTree) -> jax.Array:
        if gradient_fn is not None:
            return gradient_fn(params, batch, mask, model_state, key).value
        losses = call_loss(loss_fn, params, batch, mask, model_state, key, has_aux=has_aux)[0]
        return masked_mean(losses, mask)

    return batch_loss


def with_made_extra_args(
    tx: optax.GradientTransformationExtraArgs, extra_args: ExtraArgs
) -> optax.GradientTransformationExtraArgs:
    """A chain whose `update` takes `batch_loss` in place of the arguments that are made of it.

    Where it is not given, as in a trace that asks what the chain does with a gradient, a function
    of the same shapes stands in for it.
    """

    def update(updates, state, params=None, *, batch_loss=_half_sq_norm, **signals):
        made = made_extra_args(extra_args, batch_loss, signals)
        return tx.update(updates, state, params, **made, **signals)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def made_extra_args(
    extra_args: ExtraArgs, batch_loss: BatchLoss, signals: Mapping[str, Any]
) -> dict[str, Any]:
    """What `extra_args` makes, to be passed to ``tx.update`` in addition to the signals."""
    made = extra_args(batch_loss)
    if not isinstance(made, Mapping):
        raise ValueError(
            "extra_args must return a dict, e.g. {'value_fn': batch_loss}, got "
            f"{type(made).__name__}."
        )
    for name in made:
        if name in signals:
            raise ValueError(
                f"extra_args must not return {name!r}, which the training loop supplies itself."
            )
    names = signals.keys() | made.keys()
    return {
        name: _accepting(value, names) if callable(value) else value for name, value in made.items()
    }


def _half_sq_norm(params: PyTree) -> jax.Array:
    """Differentiable as often as needed, and a function of every parameter."""
    squares = [
        jnp.sum(jnp.real(x * jnp.conj(x))) for x in map(jnp.asarray, jax.tree.leaves(params))
    ]
    return 0.5 * sum(x.astype(float) for x in squares)  # pyright: ignore[reportReturnType]


def _accepting(function: Callable[..., Any], names: Any) -> Callable[..., Any]:
    """The function, with a signature that takes what else `update` is given.

    The line searches of optax hand to `value_fn` the extra arguments that its signature names, and
    refuse all others. Those that the function itself does not name are dropped.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some callables have none
        return function
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    own = {p.name for p in parameters}

    def call(*args: Any, **kwargs: Any) -> Any:
        kept = {name: x for name, x in kwargs.items() if takes_all or name in own}
        return function(*args, **kept)

    others = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in sorted(names - own)
    ]
    signature = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    call.__signature__ = inspect.Signature([*signature, *others])  # pyright: ignore[reportFunctionMemberAccess]
    return call
