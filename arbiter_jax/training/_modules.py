"""NNX modules in a loop of one's own: a module and its loss as the pure functions of the engine.

A module is split into parameters and a model state, which is everything else that a call may change:
the statistics of BatchNorm, the counts of random streams, caches. A copy of the module is put
together from both inside the loss, so that the module of the user changes only at the end, once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from arbiter_jax import _validate
from arbiter_jax.base import PyTree, WeightedLoss, as_pure
from arbiter_jax.batching import num_rows


class PureModule(NamedTuple):
    """A module and its loss in the form of the engine; from :func:`pure_module`."""

    params: PyTree  # an nnx.State of arrays, as `nnx.Optimizer.update` hands it to `tx.update`
    model_state: PyTree  # an nnx.State of arrays; without any leaf if there are parameters alone
    loss_fn: Callable[..., Any]  # (params, batch, model_state, mask, key) -> (losses, state[, aux])
    as_grads: Callable[[PyTree], nnx.State]  # a pytree like `params`, as `nnx.grad` returns it
    write: Callable[[PyTree], None]  # puts a new model state into the module


def is_module(params: PyTree) -> bool:
    """Whether parameters are an NNX module and not a pytree of arrays."""
    return isinstance(params, nnx.Pytree)


def pure_module(
    loss_fn: Callable[..., Any],
    module: nnx.Pytree,
    *,
    wrt: Any = None,
    has_aux: bool = False,
) -> PureModule:
    """Splits a module, and makes a pure function of a loss that is called with it.

    References that the module shares stay shared, and so do its static attributes, such as what
    ``module.train()`` sets. Random streams of the module go on counting. A variable that a call adds
    to the module, such as one of `sow`, is not kept.

    Args:
      loss_fn: ``loss_fn(module, batch) -> float[M]``, or an ``aj.WeightedLoss``; with `has_aux`, and
        a second entry for auxiliary output. If it has parameters of these names, it is also called
        with ``mask``, bool[M], True for a real example, and ``key``.
      module: An NNX module, also one inside ``nnx.jit``.
      wrt: Filter of the variables that are trained, as in ``nnx.grad`` and ``nnx.Optimizer``;
        ``nnx.Param`` if None.
      has_aux: Whether `loss_fn` returns ``(losses, aux)``.

    Raises:
      ValueError: If the module has no variable of the kind `wrt` or holds a variable that is no
        array or number; when traced, if `loss_fn` takes other arguments or returns no pair with
        `has_aux`, or one without.

    >>> from flax import nnx
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> pure = pure_module(lambda model, x: model(x).sum(axis=1), model)
    >>> losses, _ = pure.loss_fn(pure.params, jnp.ones((4, 3)), pure.model_state, None, None)
    >>> losses.shape
    (4,)
    """
    _validate.function("loss_fn(model, batch) -> float[M]", loss_fn=loss_fn)
    wrt = nnx.Param if wrt is None else wrt
    graphdef, params, rest = nnx.split(module, wrt, ...)
    if not jax.tree.leaves(params):
        raise ValueError(
            f"wrt must select variables of the module, got {wrt!r}, which selects none of "
            f"{type(module).__name__}: pass the same filter as to nnx.Optimizer."
        )
    keywords = _keywords(loss_fn)
    params_structure, rest_structure = jax.tree.structure(params), jax.tree.structure(rest)
    pure_rest = as_pure(rest)
    pure_structure = jax.tree.structure(pure_rest)

    def pure_loss(params, batch, model_state, mask, key):
        copy = nnx.merge(
            graphdef,
            jax.tree.unflatten(params_structure, jax.tree.leaves(params)),
            jax.tree.unflatten(rest_structure, jax.tree.leaves(model_state)),
        )
        if mask is None and "mask" in keywords:
            mask = jnp.ones(num_rows(batch), bool)
        available = {"mask": mask, "key": key}
        returned = loss_fn(copy, batch, **{name: available[name] for name in keywords})
        losses, *aux = _checked(returned, has_aux)
        return (losses, _changed(as_pure(nnx.state(copy)), model_state), *aux)

    def write(model_state):
        # Variables of the module keep their metadata: only what they hold is new.
        nnx.update(module, jax.tree.unflatten(pure_structure, jax.tree.leaves(model_state)))

    return PureModule(
        params=as_pure(params),
        model_state=jax.tree.map(_as_array, pure_rest),
        loss_fn=pure_loss,
        as_grads=lambda tree: jax.tree.unflatten(params_structure, jax.tree.leaves(tree)),
        write=write,
    )


def _keywords(loss_fn: Callable[..., Any]) -> tuple[str, ...]:
    """Which of `mask` and `key` a loss takes; raises unless it can be called with the rest."""
    try:
        signature = inspect.signature(loss_fn)
    except (TypeError, ValueError):  # some callables have none
        return ()
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = signature.parameters
    keywords = tuple(
        name for name in ("mask", "key") if name in parameters and parameters[name].kind in named
    )
    try:
        signature.bind(None, None, **dict.fromkeys(keywords))
    except TypeError:
        raise ValueError(
            "loss_fn must take (model, batch), and may take `mask` and `key`, where an NNX module is "
            f"given, got one that takes ({', '.join(parameters)}): the module holds its own state."
        ) from None
    return keywords


def _checked(returned: Any, has_aux: bool) -> tuple[Any, ...]:
    """What a loss of a module returned, as (losses,) or (losses, aux)."""
    is_tuple = isinstance(returned, tuple) and not isinstance(returned, WeightedLoss)
    if is_tuple == has_aux and (not is_tuple or len(returned) == 2):
        return returned if is_tuple else (returned,)
    form = "(losses, aux)" if has_aux else "losses, float[M]"
    found = f"a tuple of {len(returned)}" if is_tuple else _validate.shown(returned)
    hint = ": pass has_aux=True" if is_tuple and len(returned) == 2 else ""
    raise ValueError(f"loss_fn of an NNX module must return {form}, got {found}{hint}.")


def _changed(after: nnx.State, model_state: nnx.State) -> nnx.State:
    """The new model state, in the form and the types of the old one."""
    found = dict(jax.tree_util.tree_leaves_with_path(after))

    def keep(path, old):
        new = _as_array(found.get(path, old))
        if new.shape != old.shape:
            raise ValueError(
                "loss_fn must keep the shapes of the module's variables, got "
                f"{new.shape} instead of {old.shape} for {jax.tree_util.keystr(path)}."
            )
        return new if new.dtype == old.dtype else new.astype(old.dtype)

    return jax.tree_util.tree_map_with_path(keep, model_state)


def _as_array(x: Any) -> jax.Array:
    """A leaf of the model state as an array that `where`, `cond` and `scan` keep the type of."""
    if isinstance(x, jax.Array) and not x.aval.weak_type:
        return x
    try:
        return jnp.asarray(x, jnp.result_type(x))
    except TypeError as error:
        raise ValueError(
            f"the variables of an NNX module must be arrays or numbers, got {x!r}: keep anything "
            "else as a static attribute of the module."
        ) from error
