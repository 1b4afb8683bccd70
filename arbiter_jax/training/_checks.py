"""What a run is given, checked before it starts: one sentence that says what to pass instead.

The checks read structures, shapes and types alone, so that they also work while tracing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from arbiter_jax import _validate
from arbiter_jax._numerics import raw_key
from arbiter_jax.base import PyTree, children
from arbiter_jax.batching import Block, BlockSource, check_integers, num_rows

Function = TypeVar("Function", bound=Callable[..., Any])

_FROM_HOST = (
    "data that comes in pieces goes through arbiter_jax.datasets.host_blocks(source, "
    "window=window), as aj.Data(blocks, validation)"
)


def _called(value: Any) -> str:
    """What to call a value in an error message: its type, and its length or shape if it has one."""
    name = type(value).__name__
    if callable(value) and hasattr(value, "__name__"):
        return f"the {name} {value.__name__}"
    if isinstance(value, np.ndarray | jax.Array):
        return f"an array {value.dtype}{list(value.shape)}"
    if isinstance(value, tuple | list | dict) and not hasattr(value, "_fields"):
        return f"a {name} of {len(value)}"
    return f"{value!r}" if value is None or isinstance(value, str | int | float) else f"a {name}"


def _is_array(value: Any) -> bool:
    """Whether a leaf is an array of numbers, or a number."""
    if isinstance(value, bool | int | float | complex):
        return True
    if not hasattr(value, "__array__"):
        return False  # a jax.ShapeDtypeStruct, an iterator, text
    if isinstance(value, jax.Array):
        return True
    dtype = getattr(value, "dtype", None)  # another library may have dtypes of its own, or several
    kind = getattr(dtype, "kind", None)
    return kind is None or kind in "biufc" or jnp.issubdtype(value.dtype, jnp.number)


def _is_deleted(tree: PyTree) -> bool:
    def deleted(leaf: Any) -> bool:
        try:
            return isinstance(leaf, jax.Array) and leaf.is_deleted()
        except jax.errors.ConcretizationTypeError:  # while tracing
            return False

    return any(map(deleted, jax.tree.leaves(tree)))


# Data


def check_data(data: Any) -> None:
    """Raises a ValueError if the data of a run is not :class:`Data`, or holds no examples."""
    if isinstance(data, BlockSource | Block):
        raise ValueError(f"data must be aj.Data(blocks, validation), got {_called(data)} alone.")
    if not hasattr(data, "train"):
        hint = "wrap the training arrays as aj.Data((inputs, labels))"
        if isinstance(data, tuple | list) and len(data) == 2:
            hint += ", and with validation examples as aj.Data(train, validation)"
        elif isinstance(data, Mapping):
            hint = "wrap the training arrays as aj.Data(batch), e.g. aj.Data({'x': x, 'y': y})"
        elif not _is_array(data):
            hint += f"; {_FROM_HOST}"
        raise ValueError(f"data must be aj.Data(train, validation), got {_called(data)}: {hint}.")
    if not isinstance(data.train, BlockSource | Block):
        _check_leaves(data.train, "data.train")
        num_rows(data.train, "data.train")
    _check_leaves(getattr(data, "validation", None), "data.validation")


def _leaves(tree: PyTree) -> list[tuple[Any, Any]]:
    # JAX does not look into iterators, and warns of them unless it is told that they are leaves.
    return jax.tree.leaves_with_path(tree, is_leaf=lambda node: isinstance(node, Iterator))


def _check_leaves(tree: PyTree, name: str) -> None:
    for path, leaf in _leaves(tree):
        where = name + jax.tree_util.keystr(path)
        if not _is_array(leaf):
            if hasattr(leaf, "dtype") and hasattr(leaf, "__array__"):
                raise ValueError(
                    f"{where} must be an array of numbers, got dtype {leaf.dtype}: encode it as "
                    "integers, e.g. the classes with np.unique(labels, return_inverse=True)."
                )
            hint = "leave it out" if isinstance(leaf, str) else _FROM_HOST
            raise ValueError(f"{where} must be an array of numbers, got {_called(leaf)}: {hint}.")
        if not isinstance(leaf, jax.Array):
            check_integers(leaf, where)


def check_on_device(data: Any) -> None:
    """Raises a ValueError for arrays of another library, which a compiled program cannot take."""
    for path, leaf in _leaves(data):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
            raise ValueError(
                f"data{jax.tree_util.keystr(path)} must be an array of JAX, got {_called(leaf)}: "
                "convert it with jnp.asarray."
            )


# Functions


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


def _check_function(value: Any, name: str, arguments: str, returns: str) -> None:
    expected = f"{name} must be a function {name}({arguments}) -> {returns}"
    if not callable(value):
        raise ValueError(f"{expected}, got {_called(value)}.")
    refused = _arguments_refused(value, len(arguments.split(", ")))
    if refused is not None:
        raise ValueError(f"{expected}, got one that takes {refused}.")
    _check_hashable(value, name)


def _check_hashable(value: Any, name: str) -> None:
    try:
        hash(value)
    except TypeError:
        raise ValueError(
            f"{name} must be hashable, because programs are kept by it, got {_called(value)}: wrap "
            "it in a function of its own, defined once."
        ) from None


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


def check_concrete(**arguments: PyTree) -> None:
    """Raises a ValueError if a run is started while JAX traces: its loop runs on the host."""
    for name, tree in arguments.items():
        if any(map(_validate.is_traced, jax.tree.leaves(tree))):
            raise ValueError(
                f"{name} must hold arrays with values, got traced ones: fit decides on the host, so "
                "call it outside jit, vmap and grad; inside them, use aj.run_window."
            )


def check_model_state(model_state: PyTree) -> None:
    """Raises a ValueError if the state of a model holds anything but arrays."""
    for path, leaf in _leaves(model_state):
        if not _is_array(leaf):
            where = "model_state" + jax.tree_util.keystr(path)
            raise ValueError(f"{where} must be an array of numbers, got {_called(leaf)}.")


def _check_loss(loss_fn: Any, model_state: PyTree) -> None:
    if not callable(loss_fn):
        raise ValueError(
            f"loss_fn must be a function loss_fn(params, batch) -> float[M], got {_called(loss_fn)}."
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
    raise ValueError(f"tx must be an optax gradient transformation, got {_called(tx)}: {hint}.")


def check_gradient(gradient: Any, params: PyTree, model_state: PyTree) -> None:
    """Raises a ValueError if what a gradient function returned is not the gradient of these."""
    fields = ("value", "grads", "model_state", "grad_stats", "_replace")
    if not all(hasattr(gradient, name) for name in fields):
        raise ValueError(
            "gradient_fn must return arbiter_jax.gradients.Gradient(value, grads, model_state), got "
            f"{_called(gradient)}."
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


# Parameters, keys and states


def check_params(params: PyTree) -> None:
    """Raises a ValueError if the parameters are not a pytree of arrays."""
    hint = "pass what the model's init returns, e.g. model.init(key, inputs)['params'] in Flax"
    if isinstance(params, nnx.Module):
        raise ValueError(
            f"params must be a pytree of arrays, got the NNX module {type(params).__name__}: "
            "aj.attach(module, head, inputs) makes functions of it; its `init(key)` returns params "
            "and model_state."
        )
    leaves = _leaves(params)
    if not leaves:
        raise ValueError(f"params must be a pytree of arrays, got {_called(params)}: {hint}.")
    for path, leaf in leaves:
        if not _is_array(leaf):
            where = "params" + jax.tree_util.keystr(path)
            raise ValueError(f"{where} must be an array of numbers, got {_called(leaf)}: {hint}.")
    if _is_deleted(params):
        raise ValueError(
            "params must be arrays that can be read, got deleted ones: they were donated to a "
            "program such as run_window; pass what it returned, or a copy made before."
        )


def check_key(key: Any) -> jax.Array:
    """The key of a run as plain numbers, or a ValueError if it is not one key of this process."""
    implementation = jax.config.jax_default_prng_impl  # pyright: ignore[reportAttributeAccessIssue]
    dtype = getattr(key, "dtype", None)
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        given = str(jax.random.key_impl(key))
        if given != implementation:
            raise ValueError(
                f"key must be of the implementation {implementation!r}, which "
                f"jax.config.jax_default_prng_impl names, got one of {given!r}: pass a seed, or "
                f"jax.random.key(seed, impl={implementation!r})."
            )
        usable = key.shape == ()
    elif dtype is None:
        usable = isinstance(key, int) and not isinstance(key, bool) and 0 <= key < 2**32
    elif jnp.shape(key) == ():
        usable = jnp.issubdtype(dtype, jnp.integer)
        if usable and not isinstance(key, jax.Array):
            usable = 0 <= int(key) < 2**32
    else:
        usable = dtype == jnp.uint32 and key.shape == jax.eval_shape(jax.random.PRNGKey, 0).shape
    if not usable:
        raise ValueError(
            "key must be one PRNG key, e.g. jax.random.key(0), or an integer in [0, 2**32), got "
            f"{repr(key) if dtype is None else _called(key)}."
        )
    return raw_key(key)


def _is_leaf(node: PyTree) -> bool:
    structure = jax.tree.structure(node)
    return structure.num_leaves == 1 and jax.tree_util.treedef_is_leaf(structure)


def node_parts(node: PyTree) -> dict[str, PyTree]:
    """The parts of a node of a pytree by how they are written after its name; none of a leaf."""
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        names: Any = node
        return {f".{name}": getattr(node, name) for name in names._fields}
    if isinstance(node, Mapping):
        return {f"[{name!r}]": part for name, part in node.items()}
    if node is None or _is_leaf(node):
        return {}
    return {f"[{index}]": part for index, part in enumerate(children(node))}


def difference(found: PyTree, expected: PyTree, *, types: bool = True) -> str | None:
    """The first place where two pytrees differ, as "[path] is ..., not ...", or None.

    Args:
      found: What was given.
      expected: What is needed: arrays, or shapes and dtypes.
      types: Whether the dtypes of the arrays are compared as well.
    """
    parts, wanted = node_parts(found), node_parts(expected)
    if jax.tree.structure(found) == jax.tree.structure(expected) and not wanted:
        if not _is_leaf(expected):  # an empty node
            return None
        form = lambda x: (jnp.shape(x), jnp.result_type(x) if types else None)
        if form(found) == form(expected):
            return None
        name = lambda x: f"{jnp.result_type(x)}{list(jnp.shape(x))}"
        return f" is {name(found)}, not {name(expected)}"
    if bool(parts) != bool(wanted) or (wanted and type(found) is not type(expected)):
        return f" is {_kind(found)}, not {_kind(expected)}"
    if list(parts) != list(wanted) and set(parts) != set(wanted):
        return f" has the parts {_listed(parts)}, not {_listed(wanted)}"
    for name, part in wanted.items():
        different = difference(parts[name], part, types=types)
        if different is not None:
            return name + different
    if jax.tree.structure(found) != jax.tree.structure(expected):  # static data of a node
        return f" is {_kind(found)} that is built otherwise"
    return None


def _kind(node: PyTree) -> str:
    if hasattr(node, "shape") and hasattr(node, "dtype"):
        return f"an array {node.dtype}{list(node.shape)}"
    return "None" if node is None else f"a {type(node).__name__}"


def _listed(parts: Iterable[str]) -> str:
    return ", ".join(parts) or "none"


def _restored_without_target(found: PyTree, expected: PyTree) -> bool:
    """Whether a dict or list stands where a tuple was saved, as in a checkpoint read as it is."""
    if isinstance(expected, tuple) and isinstance(found, dict | list):
        return True
    parts, wanted = node_parts(found), node_parts(expected)
    return any(_restored_without_target(parts[k], wanted[k]) for k in wanted.keys() & parts.keys())


_TARGET = (
    "a checkpoint that Orbax restores without a target comes back as dicts and lists; restore it "
    "as checkpointer.restore(path, aj.init_state(params, tx, key))"
)


def check_state(state: Any, expected_type: type) -> None:
    """Raises a ValueError if `state` is not a TrainState whose arrays can be read."""
    if not isinstance(state, expected_type):
        hint = "make one with aj.init_state(params, tx, key)"
        if isinstance(state, dict | list):
            hint = _TARGET
        elif hasattr(state, "history") and hasattr(state, "state"):
            hint = "pass result.state"
        elif hasattr(state, "apply_fn") or hasattr(state, "opt_state"):
            hint = "pass its params and tx to fit, without state"
        elif isinstance(state, tuple):
            hint = (
                "to go on with the state of an optimizer alone, pass aj.init_state(params, tx, "
                "key)._replace(opt_state=...)"
            )
        raise ValueError(f"state must be an aj.TrainState, got {_called(state)}: {hint}.")
    for path, leaf in _leaves(state):
        if not _is_array(leaf):
            where = "state" + jax.tree_util.keystr(path)
            raise ValueError(f"{where} must be an array, got {_called(leaf)}.")
    if _is_deleted(state):
        raise ValueError(
            "state must hold arrays that can be read, got deleted ones: run_window donates the "
            "state that it is given, and fit the one that it gives to callbacks; go on with the one "
            "that is returned, or keep a copy, jax.tree.map(jnp.copy, state)."
        )


def check_same_chain(state: Any, expected: Any) -> None:
    """Raises a ValueError if a state is not one of this `tx`.

    Args:
      state: A TrainState.
      expected: Shapes and dtypes of what ``init_state`` makes of the same parameters.
    """
    different = difference(state, expected)
    if different is None:
        return
    hint = "a state goes on under the chain that it was made with, so pass that tx"
    if _restored_without_target(state, expected):
        hint = _TARGET
    raise ValueError(f"state must be one of the given tx, but state{different}: {hint}.")


# Errors of a call


def explained(explain: Callable[..., None]) -> Callable[[Function], Function]:
    """A decorator of a jitted function: what JAX refuses is said in the words of its arguments.

    JAX looks at the arguments before the function can. Nothing is added to a call that succeeds.

    Args:
      explain: Called with the arguments of a call that failed; raises a ValueError if they are the
        reason.
    """

    def decorate(function: Function) -> Function:
        jitted: Any = function
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return jitted(*args, **kwargs)
            except (AttributeError, RuntimeError, TypeError, ValueError) as error:
                ran = isinstance(error, jax.errors.JaxRuntimeError)
                if ran and "deleted" not in str(error):  # the device's own, such as out of memory
                    raise
                try:
                    explain(**signature.bind(*args, **kwargs).arguments)
                except ValueError as reason:
                    if str(reason) != str(error):
                        raise reason from error
                except TypeError:  # an argument is missing, which Python has said
                    pass
                raise

        # Also what a jitted function has besides the call.
        for name in ("__wrapped__", "lower", "trace", "eval_shape", "clear_cache", "_cache_size"):
            setattr(call, name, getattr(jitted, name))
        return call  # pyright: ignore[reportReturnType]

    return decorate


def check_static_integers(**arguments: Any) -> None:
    """Raises a ValueError if an argument that fixes a shape is not a Python integer >= 1."""
    for name, value in arguments.items():
        if isinstance(value, jax.Array):
            raise ValueError(
                f"{name} must be a Python integer, because it fixes a shape, got {value!r}: pass "
                f"int({name})."
            )
        check = _validate.power_of_two if name == "bucket_size" else _validate.integer
        check(**{name: value}, **({} if name == "bucket_size" else {"minimum": 1}))
