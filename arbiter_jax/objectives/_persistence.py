"""How long the noise of one gradient goes on acting in the updates of an optimizer.

Momentum applies a gradient, and its noise, again at every later step. The statistics of a single
step therefore underestimate what noise does, by a factor that only the optimizer knows.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arbiter_jax import _validate
from arbiter_jax._numerics import full_precision_matmul
from arbiter_jax.base import PyTree, with_extra_args

_WARM_UP = 100  # steps after which running second moments have settled
_NUM_STEPS = 1000  # steps over which the response is summed; longer than any momentum remembers
_AXIS_SIZE = 4  # of the stand-ins for parameters: their structure matters, their size does not
_LOSS_DECAY = 0.99  # of the stand-in for the loss: what waits for a plateau must not find one


class Persistence(NamedTuple):
    """How long an optimizer goes on applying a gradient; from :func:`measure_persistence`.

    With r_j the response of the update j steps later and r_0 the first one that is not zero:
    """

    displacement: Any  # shape=(), dtype=float32, >= 1, sum of r_j / r_0: how far noise moves params
    deviation: Any  # shape=(), dtype=float32, >= 1, root of the sum of squares: noise in an update


class PersistenceSignal(NamedTuple):
    """Inside the state of an objective: asks the training loop for the signal `persistence`."""

    requires = ("persistence",)


def impulse_response(
    tx: optax.GradientTransformation, power: int = 1, *, num_steps: int = _NUM_STEPS
) -> float:
    r"""Measures for how many steps an optimizer goes on applying the noise of one gradient.

    .. math:: k = \Bigl(\sum_{j \ge 0} (r_j / r_0)^p\Bigr)^{1/p}, \qquad
      r_j = \langle \xi, (\partial u_{t+j} / \partial g_t)\, \xi\rangle

    with u the updates, g the gradients, :math:`\xi` noise, and :math:`r_0` the first response that
    is not zero. It needs no model: gradients that are pure noise are passed to the transformation.

    Args:
      tx: A differentiable optax chain.
      power: p, 1 or 2. With 1, k is how far a gradient moves the parameters in total, in units of
        its first step: 1 / (1 - m) for momentum m, 1 / (1 - b1) for Adam. With 2, k is the standard
        deviation of an update's noise in units of that of the newest gradient in it: 1 / sqrt(1 -
        m^2).
      num_steps: Steps over which the response is summed, an integer >= 1. It should be larger than
        what the momentum remembers.

    Returns:
      k, a float; 1 if all updates are zero.

    Raises:
      ValueError: If an argument is out of its range, or the chain cannot be followed: it needs an
        extra argument that only a training loop has, or its updates have no derivative.

    >>> import optax
    >>> round(impulse_response(optax.sgd(0.1, momentum=0.9)), 2)
    10.0
    >>> round(impulse_response(optax.sgd(0.1, momentum=0.9), power=2), 2)
    2.29
    """
    _validate.transformation(tx=tx)
    num_steps = _validate.integer(num_steps=num_steps, minimum=1)
    power = _validate.one_of((1, 2), power=power)
    return _total(_follow(tx, np.ones(64), num_steps, along_gradient=True), power)


def measure_persistence(tx: optax.GradientTransformation, params: PyTree) -> Persistence:
    """Measures :func:`impulse_response` on small stand-ins for the parameters of a model.

    They have the structure of `params` and the number of axes of each leaf, so that masks, and
    labels as in `optax.multi_transform`, work; frozen parameters do not count. Of children whose
    names differ by a number (layers of one kind), the first one stands for all. A chain inside
    `optax.MultiSteps` is measured in units of its updates. The batch-size rules and learning-rate
    rules of this library let the measurement pass through.

    Args:
      tx: The whole optimizer chain.
      params: Parameters, any pytree of arrays, tracers or shapes: their values are not used.

    Returns:
      A :class:`Persistence`. It is computed once for each `tx` and structure.

    Raises:
      ValueError: If the chain cannot be followed, see :func:`impulse_response`.

    >>> import jax.numpy as jnp, optax
    >>> k = measure_persistence(optax.adam(1e-3), {"w": jnp.ones((3, 5)), "b": jnp.ones(5)})
    >>> round(float(k.displacement)), round(float(k.deviation), 1)
    (10, 2.3)
    """
    try:
        found = _measure_persistence(tx, *_structure(_without_repetition(params)))
    except ValueError:  # labels or masks in `tx` may have the structure of all parameters
        found = None
    found = found or _measure_persistence(tx, *_structure(params))
    return found or Persistence(np.float32(1), np.float32(1))


@functools.lru_cache(maxsize=32)
def _measure_persistence(tx: Any, structure: Any, ranks: tuple[int, ...]) -> Persistence | None:
    """None if all updates are zero."""
    params = jax.tree.unflatten(structure, [np.ones([_AXIS_SIZE] * rank) for rank in ranks])
    responses = _follow(tx, params, _NUM_STEPS)
    if not np.any(responses):
        return None
    return Persistence(*(np.float32(max(1.0, _total(responses, power))) for power in (1, 2)))


def _structure(params: PyTree) -> tuple[Any, tuple[int, ...]]:
    """The structure of the parameters, and the number of axes of each leaf."""
    leaves, structure = jax.tree.flatten(params)
    return structure, tuple(jnp.ndim(leaf) for leaf in leaves)


def _without_repetition(params: PyTree) -> PyTree:
    """One of several children that differ only by a number in their name: a deep net compiles long."""
    if type(params) not in (dict, list, tuple):
        return params
    is_dict = isinstance(params, dict)
    kept, seen = {}, set()
    for key, child in params.items() if is_dict else enumerate(params):
        kind = re.sub(r"\d+", "#", str(key)), *_structure(child)
        if kind not in seen:
            seen.add(kind)
            kept[key] = _without_repetition(child)
    return kept if is_dict else type(params)(kept.values())


def _total(responses: np.ndarray, power: int) -> float:
    """The sum of all responses in units of the first one that is not zero, 1 if there is none."""
    nonzero = np.flatnonzero(responses)
    if not nonzero.size:
        return 1.0
    return float(np.sum((responses / responses[nonzero[0]]) ** power) ** (1 / power))


def _follow(tx: Any, params: PyTree, num_steps: int, along_gradient: bool = False) -> np.ndarray:
    """The response of each update to the first of `num_steps` gradients; zeros if all updates are."""
    try:
        responses, scale = _responses(tx, params, _WARM_UP, num_steps, along_gradient)
        if scale == 0:  # a schedule may have been larger than zero at the start
            responses, scale = _responses(tx, params, 0, num_steps, along_gradient)
        if along_gradient and _vanishes(responses, scale):  # of a clipped gradient
            responses, scale = _responses(tx, params, _WARM_UP, num_steps, False)
    except Exception as error:  # a transformation of somebody else may raise anything
        reason = str(error).strip().splitlines() or [""]
        raise _refusal(f"{type(error).__name__}: {reason[0]}") from error
    if not np.all(np.isfinite(responses)):
        raise _refusal("its response to a gradient is not finite")
    if scale > 0 and _vanishes(responses, scale):
        raise _refusal("its updates have no derivative with respect to the gradient")
    return responses


def _vanishes(responses: np.ndarray, scale: np.ndarray) -> bool:
    return bool(np.max(np.abs(responses)) <= 1e-5 * scale)  # of which float32 may be wrong


def _responses(
    tx: Any, params: PyTree, warm_up: int, num_steps: int, along_gradient: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(r_0, r_1, ..., the sum of the entries of the largest update), from one run, differentiated."""
    update = with_extra_args(tx).update

    leaves, structure = jax.tree.flatten(params)
    ends = np.cumsum([leaf.size for leaf in leaves])
    noise = _signs(0, (warm_up + num_steps, ends[-1]))
    # Independent of the gradient: clipping leaves nothing of a change along it.
    direction = noise[warm_up] if along_gradient else _signs(1, (ends[-1],))

    def derivative(params, noise, direction):
        losses = _LOSS_DECAY ** jnp.arange(len(noise), dtype=float)

        def step(state, inputs):
            gradient, loss = inputs
            parts = zip(jnp.split(gradient, ends[:-1]), leaves, strict=True)
            gradient = jax.tree.unflatten(structure, [x.reshape(leaf.shape) for x, leaf in parts])
            updates, state = update(gradient, state, params, value=loss, grad=gradient, probe=True)
            return state, jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(updates)])

        def run(bump):
            inputs = noise.at[warm_up].add(bump), losses
            _, updates = jax.lax.scan(step, tx.init(params), inputs)
            scale = jnp.max(jnp.sum(jnp.abs(updates[warm_up:]), axis=1))
            # In full precision, because a response may vanish only in the sum over all entries.
            return full_precision_matmul(updates, direction)[warm_up:], scale

        return jax.jvp(run, (jnp.zeros_like(direction),), (direction,), has_aux=True)[1:]

    # Compiled by itself, it runs while another function is traced. Within
    # `jax.ensure_compile_time_eval` each operation without a traced operand would be a program of
    # its own, dozens of them.
    inputs = params, noise, direction
    responses, scale = jax.jit(derivative).lower(*inputs).compile()(*inputs)
    return np.asarray(responses, np.float64), np.asarray(scale)


def _signs(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """``jax.random.rademacher(jax.random.PRNGKey(seed), shape, float)``, which takes long to compile.

    Threefry-2x32 with 20 rounds, of which the top bit is the sign.
    """
    dtype = jnp.zeros((), float).dtype
    keys = np.array([0, seed, 0x1BD11BDA ^ seed], np.uint32)
    first, second = np.full(math.prod(shape), keys[0]), np.arange(math.prod(shape), dtype=np.uint32)
    second = second + keys[1]
    for block in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[block % 2]:
            first = first + second
            second = first ^ ((second << np.uint32(turn)) | (second >> np.uint32(32 - turn)))
        first = first + keys[(block + 1) % 3]
        second = second + keys[(block + 2) % 3] + np.uint32(block + 1)
    # A number below one half is +1: of 32 bits, those of both words, or the upper 32 of 64 bits.
    bits = first if dtype == np.float64 else first ^ second
    return np.where(bits >> np.uint32(31), -1, 1).astype(dtype).reshape(shape)


def _refusal(reason: str) -> ValueError:
    return ValueError(
        f"persistence of the optimizer could not be measured ({reason}): give the rule a number, "
        "for noise_floor persistence=1 / (1 - momentum), or 1 / (1 - b1) for Adam."
    )


def check_persistence(persistence: Any, power: int = 1) -> float | None:
    """Checks the argument of an objective: None (measured later), a number, or an optimizer."""
    if persistence is None:
        return None
    if isinstance(persistence, optax.GradientTransformation):
        return max(1.0, impulse_response(persistence, power=power))
    try:
        return _validate.greater(1, closed=True, persistence=persistence)
    except ValueError as error:
        raise ValueError(f"{str(error)[:-1]}; an optimizer and None are allowed too.") from None
