"""The gradient of the real examples of a padded batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from arbiter_jax import _validate
from arbiter_jax._numerics import check_parameters, conjugate
from arbiter_jax.base import GradStats, LossFn, PyTree, WeightedLoss
from arbiter_jax.batching import masked_mean
from arbiter_jax.batching._masking import check_losses, replace_padding, total_weight


class Gradient(NamedTuple):
    """What a gradient function returns: the gradient of one batch, and what came with it."""

    value: jax.Array  # shape=(), dtype=float, mean loss of the real examples
    grads: PyTree  # like the parameters
    model_state: PyTree = None  # like the model state that went in
    grad_stats: GradStats | None = None
    gradient_noise: PyTree = None  # like the parameters, half the difference of two half batches
    aux: PyTree = None  # auxiliary output of the loss function, if it has any


GradientFn = Callable[..., Any]
"""``gradient_fn(params, batch, mask, model_state=None, key=None) -> Gradient``."""


def call_loss(
    loss_fn: Callable[..., Any],
    params: PyTree,
    batch: PyTree,
    mask: jax.Array,
    model_state: PyTree = None,
    key: jax.Array | None = None,
    *,
    has_aux: bool | None = False,
) -> tuple[Any, PyTree, PyTree]:
    """Calls a loss function of either form and checks what it returns.

    Args:
      loss_fn: As in :func:`masked_value_and_grad`, like `params`, `batch` and the others.
      params: Parameters.
      batch: Pytree of arrays [M, ...].
      mask: bool[M], True for a real example.
      model_state: Passed if it is not None.
      key: Passed with it.
      has_aux: Whether it returns auxiliary output; None if it may, and the output is not used.

    Returns:
      (losses, model_state, aux): aux is None without `has_aux`.

    Raises:
      ValueError: If the function takes other arguments, returns something else than one loss per
        example, or the parameters hold something that has no gradient.
    """
    _validate.function("loss_fn(params, batch) -> float[M]", loss_fn=loss_fn)
    if has_aux is not None:
        has_aux = bool(_validate.boolean(has_aux=has_aux))
    check_parameters(params)
    has_state = model_state is not None
    arguments = (params, batch, model_state, mask, key) if has_state else (params, batch)
    _check_signature(loss_fn, arguments)
    returned: Any = loss_fn(*arguments)
    is_tuple = isinstance(returned, tuple) and not isinstance(returned, WeightedLoss)
    if has_aux is None:
        has_aux = is_tuple and len(returned) == 2 + has_state
    form = ["losses"] + ["model_state"] * has_state + ["aux"] * has_aux
    if len(form) > 1:
        if not is_tuple or len(returned) != len(form):
            found = f"a tuple of {len(returned)}" if is_tuple else _validate.shown(returned)
            hint = ": pass has_aux=True" if is_tuple and len(returned) == len(form) + 1 else ""
            raise ValueError(f"loss_fn must return ({', '.join(form)}), got {found}{hint}.")
    else:
        returned = (returned,)
    check_losses(returned[0], mask.shape[0])
    aux = _as_arrays(returned[-1]) if has_aux else None
    return returned[0], returned[1] if has_state else None, aux


def _check_signature(loss_fn: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # some callables have none
        return
    try:
        signature.bind(*arguments)
    except TypeError:
        taken = ", ".join(signature.parameters)
        if len(arguments) == 2:
            raise ValueError(
                f"loss_fn must take (params, batch) without a model_state, got one that takes "
                f"({taken}): give its state, for example aj.fit(..., model_state=...)."
            ) from None
        raise ValueError(
            "loss_fn must take (params, batch, model_state, mask, key) if a model_state is given, "
            f"got one that takes ({taken}): leave out the model_state, or take it. For a rule in an "
            "NNX loop, aj.models.make_losses(aj.attach(...), ...).loss_fn is such a function."
        ) from None


def _as_arrays(aux: PyTree) -> PyTree:
    try:
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.result_type(x)), aux)
    except TypeError as error:
        raise ValueError(
            f"aux, which loss_fn returns, must be a pytree of arrays and numbers, got {aux!r}."
        ) from error


def value_grad_and_weight(
    loss_fn: Any, has_aux: bool = False
) -> Callable[..., tuple[Gradient, jax.Array]]:
    """The masked gradient, with the total weight of the examples that it is a mean over."""

    def mean_loss(params, batch, mask, model_state, key):
        losses, model_state, aux = call_loss(
            loss_fn, params, batch, mask, model_state, key, has_aux=has_aux
        )
        return masked_mean(losses, mask), (model_state, aux, total_weight(losses, mask))

    def gradient_fn(params, batch, mask, model_state=None, key=None):
        check_parameters(params)
        (value, (model_state, aux, weight)), grads = jax.value_and_grad(mean_loss, has_aux=True)(
            params, batch, mask, model_state, key
        )
        return Gradient(value, conjugate(grads), model_state, aux=aux), weight

    return gradient_fn


def masked_value_and_grad(
    loss_fn: LossFn, *, sampled: bool = False, has_aux: bool = False
) -> GradientFn:
    """The mean loss of the real examples of a batch, and its gradient.

    The gradient of a complex parameter u + iv is dF/du + i dF/dv, along which optax descends: the
    conjugate of what ``jax.grad`` returns.

    Args:
      loss_fn: ``loss_fn(params, batch) -> float[M]``; for a model with state (BatchNorm, dropout)
        ``loss_fn(params, batch, model_state, mask, key) -> (float[M], model_state)``, which is what
        is called where a model state is given.
      sampled: True for the batches of `sample_batch`, whose masked rows repeat a real example: it
        saves the pass over the batch that makes any other padding harmless.
      has_aux: Whether `loss_fn` also returns auxiliary output, a pytree of arrays, as the last
        entry of a tuple: ``(float[M], aux)`` or ``(float[M], model_state, aux)``. It is
        ``Gradient.aux``, and sees the padding: use the mask, or return what does not.

    Returns:
      ``gradient_fn(params, batch, mask, model_state=None, key=None) -> Gradient``.

    Raises:
      ValueError: When traced, if `loss_fn` returns anything but one loss per example, or takes
        other arguments, or the parameters hold integers.

    *Guarantees*: a masked row changes no bit of the result, whatever it holds.

    >>> import jax.numpy as jnp
    >>> gradient_fn = masked_value_and_grad(lambda w, x: (w - x) ** 2)
    >>> out = gradient_fn(0.0, jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False]))
    >>> float(out.value), float(out.grads)
    (5.0, -4.0)
    """
    weighted = value_grad_and_weight(loss_fn, has_aux)

    def gradient_fn(params, batch, mask, model_state=None, key=None):
        if not sampled:
            batch = replace_padding(batch, mask)
        return weighted(params, batch, mask, model_state, key)[0]

    return gradient_fn
