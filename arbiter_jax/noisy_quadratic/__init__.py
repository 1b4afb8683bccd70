"""The cost of greedy learning rates, momenta and batch sizes on a quadratic, in closed form."""

from arbiter_jax.noisy_quadratic._batch_sizes import (
    BatchSizeSchedule,
    greedy_batch_sizes,
    optimal_batch_sizes,
    rollout_batch_sizes,
)
from arbiter_jax.noisy_quadratic._greedy import greedy_schedule
from arbiter_jax.noisy_quadratic._moments import NoisyQuadratic, RateSchedule, rollout
from arbiter_jax.noisy_quadratic._optimal import optimal_schedule, receding_horizon_schedule

__all__ = [
    "BatchSizeSchedule",
    "NoisyQuadratic",
    "RateSchedule",
    "greedy_batch_sizes",
    "greedy_schedule",
    "optimal_batch_sizes",
    "optimal_schedule",
    "receding_horizon_schedule",
    "rollout",
    "rollout_batch_sizes",
]
