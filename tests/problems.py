"""What several test files share: statistics made by hand, runs of one rule."""

import jax
import jax.numpy as jnp

import arbiter_jax as aj


def grad_stats(batch_size=10.0, **fields):
    """Statistics of ten examples; a field that a test does not name is NaN, so that none reads it."""
    fields = {"batch_size": batch_size, **fields}
    names = aj.GradStats._fields
    return aj.GradStats(*(jnp.float32(fields.get(name, jnp.nan)) for name in names))


def run_rule(rule, steps, updates=None):
    """The sizes after each step of a rule by itself, and its last state."""
    state, sizes = rule.init(jax.tree.map(jnp.zeros_like, updates)), []
    update = jax.jit(lambda state, signals: rule.update(updates, state, **signals)[1])
    for signals in steps:
        state = update(state, signals)
        sizes.append(int(aj.get_batch_size(state)))
    return sizes, state


def sizes_of(rule, num_steps, **signals):
    """The size before each step, as a window of one step would read it."""
    state, found = rule.init(None), []
    for _ in range(num_steps):
        found.append(int(aj.get_batch_size(state)))
        _, state = rule.update(None, state, **signals)
    return found


def proposing(*sizes):
    """A rule whose proposals are given: sizes[t] after step t, the last one for ever."""
    table = jnp.asarray([sizes[0], *sizes])
    return aj.schedulers.from_schedule(lambda t: table[jnp.minimum(t, len(sizes))])
