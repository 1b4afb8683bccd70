"""What the first update of an optimizer reveals: its sign, its learning rate, if it normalizes.

A transformation is opaque, so this is a guess from a few numbers. Use it for warnings only.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

# The smaller of two gradients, and the larger: below every usual clipping, above every usual epsilon.
_GRADIENTS = (1 / 256, 1 / 64)
_CASES = [(gradient, sign) for gradient in _GRADIENTS for sign in (1, -1)]
# Updates to wait for one that is not zero: a warm-up begins at 0, `optax.MultiSteps` collects.
_PATIENCE = 32


class FirstUpdate(NamedTuple):
    """The first update that moves anything."""

    learning_rate: (
        float  # times the gradient, or times 1 if normalized; negative: along the gradient
    )
    is_normalized: bool  # as large for a gradient that is four times smaller, as Adam's


def first_update(optimizer: optax.GradientTransformation, batch_size: int) -> FirstUpdate | None:
    """Applies the optimizer to small parameters made up here; None if that reveals nothing."""
    # Weights of 0 show no decay and have no trust ratio. What is relative to weights needs some.
    at_zero = _first_update_at(0.0, optimizer, batch_size)
    if at_zero is None or abs(at_zero.learning_rate) > 0.5:
        return at_zero
    at_one = _first_update_at(1.0, optimizer, batch_size)
    return max(at_zero, at_one or at_zero, key=lambda found: abs(found.learning_rate))


def _first_update_at(
    weight: float, optimizer: optax.GradientTransformation, batch_size: int
) -> FirstUpdate | None:
    leaf = lambda value: jnp.full((1, 1), value)
    grads = {f"w{i}": leaf(sign * g) for i, (g, sign) in enumerate(_CASES)}
    params = jax.tree.map(lambda _: leaf(weight), grads)
    signals = {"batch_size": jnp.int32(batch_size), "num_examples": jnp.int32(0)}
    update_fn = optax.with_extra_args_support(optimizer).update

    @jax.jit
    def updates():
        def step(carry):
            _, state, count = carry
            return *update_fn(grads, state, params, **signals), count + 1

        def is_waiting(carry):
            updates, _, count = carry
            return (count < _PATIENCE) & ~jnp.any(jnp.stack(jax.tree.leaves(updates)))

        start = jax.tree.map(jnp.zeros_like, grads), optimizer.init(params), jnp.int32(0)
        return jax.lax.while_loop(is_waiting, step, start)[0]

    try:
        with jax.ensure_compile_time_eval():  # also where a caller traces
            small, minus_small, large, minus_large = (float(x[0, 0]) for x in updates().values())
    except Exception:  # of a mask, of labels, of a signal that is missing: nothing is known
        return None
    # Half the difference of the updates for g and -g: without what is taken off the weights.
    small, large = (small - minus_small) / 2, (large - minus_large) / 2
    if not small:
        return None
    is_normalized = abs(large) < 2 * abs(small)
    return FirstUpdate(-small if is_normalized else -small / _GRADIENTS[0], is_normalized)
