"""AdaBatch and its learning rate."""

import jax
import jax.numpy as jnp
import pytest

from arbiter_jax import schedulers
from arbiter_jax.base import as_count
from tests.problems import sizes_of


def test_adabatch_doubles_every_k_epochs():
    """N = 100, k = 2: at 200, 400 and 600 examples, clipped at 50."""
    rule = schedulers.adabatch(100, epochs=2, max_batch_size=50, initial_batch_size=8)
    assert sizes_of(rule, 8, batch_size=jnp.int32(100)) == [8, 8, 16, 16, 32, 32, 50, 50]


def test_adabatch_learning_rate():
    """lr_0 0.75^floor(n / (k N)), and it jits."""
    rate = jax.jit(schedulers.adabatch_learning_rate(0.2, 100, epochs=2))
    assert [round(float(rate(n)), 5) for n in (0, 199, 200, 400)] == [0.2, 0.2, 0.15, 0.1125]


def test_adabatch_interval_must_be_countable():
    with pytest.raises(ValueError, match=r"epochs \* dataset_size must be <= 9223372036854775807"):
        schedulers.adabatch(10**18, epochs=20)


def test_epochs_may_be_longer_than_an_int32():
    """At the example at which they end, which a float32 could not tell from its neighbors."""
    rule = schedulers.adabatch(2**31, epochs=4, initial_batch_size=8)
    state = rule.init(None)
    for seen, size in ((2**33 - 101, 8), (2**33 - 100, 16), (2**34 - 101, 16), (2**34 - 100, 32)):
        _, state = rule.update(None, state, batch_size=100, num_examples=as_count(seen))
        assert int(state.batch_size) == size
        assert int(state.count) == seen + 100
    rate = schedulers.adabatch_learning_rate(1.0, 2**31, epochs=4)
    assert [float(rate(n)) for n in (2**33 - 1, 2**33, 2**34)] == [1.0, 0.75, 0.5625]
