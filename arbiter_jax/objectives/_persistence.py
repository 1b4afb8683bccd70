"""How long the noise of one gradient goes on acting in the updates of an optimizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arbiter_jax import _validate

Persistence = Any  # a number >= 1, or an optax.GradientTransformation


def impulse_response(
    tx: optax.GradientTransformation, num_steps: int = 1000, power: int = 1
) -> float:
    r"""How much longer than one step the noise of a gradient acts: k of the equations.

    .. math:: k = \Bigl(\sum_{j \ge 0} (r_j / r_0)^p\Bigr)^{1/p}, \qquad
      r_j = \langle \xi, (\partial u_{t+j} / \partial g_t)\, \xi\rangle

    measured on gradients that are nothing but noise, from the transformation alone. With p = 1 it
    is how far a gradient moves the parameters in all, in units of its first step: 1 / (1 - m) for
    momentum m, 1 / (1 - b1) for Adam. With p = 2 it is how much noise an update holds, in units of
    that of the newest gradient in it: 1 / sqrt(1 - m^2).

    Args:
      tx: A differentiable optax chain without a rule in it.
      num_steps: Steps over which the response is summed, an integer >= 1; it should outlast the
        momentum.
      power: p, 1 or 2.

    Returns:
      k, a float; 1 where the first response is zero.
    """
    num_steps = _validate.integer(num_steps=num_steps, minimum=1)
    power = _validate.one_of((1, 2), power=power)
    warm = 100  # running second moments have settled by then
    noise = jax.random.rademacher(jax.random.PRNGKey(0), (warm + num_steps, 64), float)
    params, direction = jnp.ones(64), noise[warm]
    tx = optax.with_extra_args_support(tx)

    def step(state, grads):
        updates, state = tx.update(grads, state, params)
        return state, updates

    def response(bump):
        state, _ = jax.lax.scan(step, tx.init(params), noise[:warm])
        grads = noise[warm:].at[0].add(bump)
        return jax.lax.scan(step, state, grads)[1] @ direction

    with jax.ensure_compile_time_eval():
        _, responses = jax.jit(
            lambda: jax.jvp(response, (jnp.zeros_like(direction),), (direction,))
        )()
        responses = np.asarray(responses, np.float64)
    if responses[0] == 0:
        return 1.0
    return float(np.sum((responses / responses[0]) ** power) ** (1 / power))


def resolve_persistence(persistence: Persistence, power: int = 1) -> float:
    """A number >= 1 as it is; of a transformation, the number that it is measured to have."""
    if isinstance(persistence, optax.GradientTransformation):
        return max(1.0, impulse_response(persistence, power=power))
    if _validate.positive(persistence=persistence) < 1:
        raise ValueError(f"persistence must be >= 1, or an optimizer, got {persistence!r}.")
    return float(persistence)
