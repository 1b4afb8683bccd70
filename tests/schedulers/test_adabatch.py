"""AdaBatch and its learning rate."""

import jax
import jax.numpy as jnp
import pytest

from arbiter_jax import schedulers
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
    with pytest.raises(ValueError, match=r"epochs \* dataset_size must be <= 2147483647"):
        schedulers.adabatch(10**9, epochs=20)
