"""Runs of the noise floor with a given loss and noise, so that sizes are known by hand."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import arbiter_jax as aj
from arbiter_jax import schedulers

LIMITS = {"min_batch_size": 2, "max_batch_size": 4096}
SLOPE, NOISE = 0.12, 30.0  # F = 3 - .12 log t, and xi . du = -30 / B
MAX_WINDOWS, TABLE = 2**14, 1024


def noise_signals(product, signal=0.0):
    """xi . du = -product, and |G|^2 = signal tr S."""
    root = jnp.sqrt(jnp.asarray(product, jnp.float32))
    stats = aj.GradStats(*map(jnp.float32, (signal, 1.0, 2.0, 1.0, 0.0, 1.0)))
    return {"gradient_noise": root, "update_noise": -root, "grad_stats": stats}


def loss_at(t, slope=SLOPE):
    """A loss that falls evenly in log time."""
    return 3 - slope * jnp.log(jnp.asarray(t, jnp.float32))


def size_by_hand(noise=NOISE, noise_share=0.3, persistence=1.0, *, t=1, left=0):
    """Eqs. 10 and 16: the size after t steps, with `left` examples to go."""
    now = persistence * noise / (4 * noise_share * 4 * SLOPE)
    b = now
    for _ in range(100):
        b = math.sqrt(b * now * (1 + left / b / t) ** 0.1)
    return b


def grown_by_hand(left, num_steps, b, held, noise_share=0.3, final_growth=32.0):
    """Eq. 12: the size to which `held` has grown."""
    factor = final_growth * math.sqrt(b / held)
    return factor * held / (1 + factor * left / (2 * noise_share * b * num_steps))


class Run(NamedTuple):
    """The windows of a run, and the state after it."""

    seen: np.ndarray  # examples before each window
    steps: np.ndarray  # steps before each window
    sizes: np.ndarray  # batch size of each window
    state: Any

    def at(self, seen):
        """(examples, steps, size) of the first window after so many examples."""
        i = int(np.argmax(self.seen >= seen))
        return self.seen[i], self.steps[i], self.sizes[i]


@functools.cache
def _program(window, options):
    rule = schedulers.noise_floor(**LIMITS | {"persistence": 1.0} | dict(options))

    def run(state, num_steps, budget, shift, noise):
        def step(carry):
            state, size, left, seen, t, windows, count = carry
            starts = left == 0
            size = jnp.where(starts, state.batch_size, size)
            left = jnp.where(starts, jnp.clip(state.window_steps, 1, window), left)
            row = jnp.stack([seen, t, size])
            windows = windows.at[jnp.where(starts, count, MAX_WINDOWS)].set(row, mode="drop")
            signals = noise_signals(noise[jnp.minimum(t, TABLE - 1)] / size)
            signals |= {"value": loss_at(t + 1) + shift, "batch_size": size, "num_examples": seen}
            state = rule.update(jnp.ones(()), state, budget=budget, **signals)[1]
            return state, size, left - 1, seen + size, t + 1, windows, count + starts

        def unfinished(carry):
            _, _, _, seen, t, _, count = carry
            return (t < num_steps) & ((budget == 0) | (seen < budget)) & (count < MAX_WINDOWS)

        zero = jnp.int32(0)
        windows = jnp.zeros((MAX_WINDOWS, 3), jnp.int32)
        carry = (state, zero, zero, zero, zero, windows, zero)
        state, *_, windows, count = jax.lax.while_loop(unfinished, step, carry)
        return state, windows, count

    return jax.jit(run)


def follow(num_steps=2**30, *, budget=0, start=None, window=20, shift=0.0, noise=NOISE, **options):
    """A run of windows as long as the rule asks for, at most `window` steps.

    It ends after `num_steps` steps or with the budget, which the rule is given as a signal, as `fit`
    does it; `noise` may be a table, one number per step. One program for each set of options.
    """
    made = LIMITS | {"persistence": 1.0} | options
    state = schedulers.noise_floor(**made | {"initial_batch_size": start}).init(None)
    table = np.full(TABLE, noise, np.float32) if np.ndim(noise) == 0 else np.float32(noise)
    state, windows, count = _program(window, tuple(sorted(options.items())))(
        state, num_steps, budget, shift, table
    )
    seen, steps, sizes = np.asarray(windows)[: int(count)].T
    return Run(seen, steps, sizes, state)
