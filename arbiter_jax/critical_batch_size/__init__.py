"""The critical batch size, measured by branching: beyond it a larger batch loses progress.

Merrill et al. (2025), "Critical Batch Size Revisited", arXiv:2505.23971.
"""

from arbiter_jax.critical_batch_size._branches import (
    CriticalBatchSize,
    measure_critical_batch_size,
)
from arbiter_jax.critical_batch_size._warm_up import measured_warm_up

__all__ = ["CriticalBatchSize", "measure_critical_batch_size", "measured_warm_up"]
