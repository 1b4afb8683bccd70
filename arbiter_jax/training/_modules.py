"""NNX modules in your own loop: a module and its loss as the pure functions of the engine.

A module is split into parameters and a model state, which is everything else that a call may change:
the statistics of BatchNorm, the counts of random streams, caches. A copy of the module is put
together from both inside the loss, so that the module of the user changes only at the end, once.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from arbiter_jax import _validate
from arbiter_jax.base import PyTree, WeightedLoss, as_pure, takes_extra_args
from arbiter_jax.batching._batch_norm import mask_batch_norms
from arbiter_jax.batching._masking import num_rows


class Unpacked(NamedTuple):
    """What the engine computes with, of a module or of parameters; from :func:`unpacked`."""

    params: PyTree  # of a module an nnx.State of arrays, as nnx.Optimizer hands it to tx.update
    model_state: PyTree  # of a module an nnx.State of arrays, all that a call may change
    opt_state: PyTree  # without the variables that nnx.Optimizer keeps it in
    loss_fn: Callable[..., Any]  # of a module (params, batch, model_state, mask, key)
    as_grads: Callable[[PyTree], PyTree]  # a pytree like `params`, as nnx.grad returns it
    # Puts a new model state into the module; returns what rules get to see of it, None for nothing.
    write: Callable[[PyTree], PyTree]


def unpacked(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    params: PyTree,
    opt_state: PyTree,
    model_state: PyTree = None,
    key: jax.Array | None = None,
    *,
    wrt: Any = None,
    has_aux: bool = False,
    is_masked: bool = False,
) -> Unpacked:
    """Splits a module, and makes a pure function of a loss that is called with it.

    Parameters that are not a module are returned unchanged.

    References that the module shares stay shared, and so do its static attributes, such as what
    ``module.train()`` sets. Random streams of the module go on counting. A variable that a call adds
    to the module, such as an intermediate value, is not kept.

    Args:
      loss_fn: ``loss_fn(module, batch) -> float[M]``, or an ``aj.WeightedLoss``; with `has_aux`, and
        a second entry for auxiliary output. If it has parameters of these names, it is also called
        with ``mask``, bool[M], True for a real example, and ``key``.
      tx: The whole chain.
      params: An NNX module, also one inside ``nnx.jit``; or a pytree of arrays.
      opt_state: The `opt_state` of the ``nnx.Optimizer``; or of ``tx.init(params)``.
      model_state: None for a module; else as in `value_grad_and_signals`.
      key: Likewise.
      wrt: Filter of the variables that are trained, as in ``nnx.grad`` and ``nnx.Optimizer``;
        ``nnx.Param`` if None.
      has_aux: Whether `loss_fn` returns ``(losses, aux)``.
      is_masked: Whether rows may be padding: every BatchNorm of the module then gets the mask.

    Raises:
      ValueError: If a model state is given besides a module, the module has no variable of the kind
        `wrt` or holds a variable that is not an array or a number, or the loss takes other arguments;
        when traced, if it returns no pair with `has_aux`, or one without.

    >>> from flax import nnx
    >>> model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    >>> pure = unpacked(lambda model, x: model(x).sum(axis=1), optax.sgd(0.1), model, ())
    >>> losses, _ = pure.loss_fn(pure.params, jnp.ones((4, 3)), pure.model_state, None, None)
    >>> losses.shape
    (4,)
    """
    if not isinstance(params, nnx.Pytree):
        if wrt is not None:
            raise ValueError(f"wrt must be None unless params is an NNX module, got {wrt!r}.")
        if key is not None and model_state is None:
            model_state = {}
        identity = lambda tree: tree
        return Unpacked(params, model_state, opt_state, loss_fn, identity, identity)
    if model_state is not None:
        raise ValueError(
            "model_state must be None if params is an NNX module, which holds its own, got a "
            f"{type(model_state).__name__}."
        )
    module, wrt = params, nnx.Param if wrt is None else wrt
    graphdef, trained, rest = nnx.split(module, wrt, ...)
    if not jax.tree.leaves(trained):
        raise ValueError(
            f"wrt must select variables of the module, got {wrt!r}, which selects none of "
            f"{type(module).__name__}: pass the same filter as to nnx.Optimizer."
        )
    keywords = _keywords(loss_fn)
    if key is not None and "key" not in keywords:
        raise ValueError(
            "key must be None if params is an NNX module and loss_fn has no parameter `key`: "
            "dropout draws from the random streams of the module."
        )
    structures = jax.tree.structure(trained), jax.tree.structure(rest)
    pure_rest = as_pure(rest)
    pure_structure = jax.tree.structure(pure_rest)

    def write(model_state):
        # Variables of the module keep their metadata: only what they hold is new.
        nnx.update(module, jax.tree.unflatten(pure_structure, jax.tree.leaves(model_state)))
        return model_state if takes_extra_args(tx) and jax.tree.leaves(model_state) else None

    return Unpacked(
        params=as_pure(trained),
        model_state=jax.tree.map(_as_array, pure_rest),
        opt_state=as_pure(opt_state),
        loss_fn=_PureLoss(loss_fn, keywords, has_aux, is_masked, graphdef, structures),
        as_grads=lambda tree: jax.tree.unflatten(structures[0], jax.tree.leaves(tree)),
        write=write,
    )


@dataclasses.dataclass(frozen=True)
class _PureLoss:
    """The loss of a module as a function of its variables.

    It equals that of another split of the same module, so that ``jax.jit`` traces both once.
    """

    loss_fn: Callable[..., Any]
    keywords: tuple[str, ...]  # those of `mask` and `key` that it takes
    has_aux: bool
    is_masked: bool
    graphdef: Any
    structures: tuple[Any, Any]  # of the states of what is trained and of the rest

    def __call__(self, params, batch, model_state, mask, key):
        pure_states = zip(self.structures, (params, model_state), strict=True)
        states = (jax.tree.unflatten(s, jax.tree.leaves(x)) for s, x in pure_states)
        copy = nnx.merge(self.graphdef, *states)
        if self.is_masked and mask is not None:
            mask_batch_norms(copy, mask)
        if mask is None and "mask" in self.keywords:
            mask = jnp.ones(num_rows(batch), bool)
        available = {"mask": mask, "key": key}
        returned = self.loss_fn(copy, batch, **{name: available[name] for name in self.keywords})
        losses, *aux = _checked(returned, self.has_aux)
        return (losses, _changed(as_pure(nnx.state(copy)), model_state), *aux)


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
            "loss_fn must take (model, batch), and may take `mask` and `key`, if an NNX module is "
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
