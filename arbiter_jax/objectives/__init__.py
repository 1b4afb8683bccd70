"""Functions of the batch size whose minimum is known: rules take it, an agent descends to it.

The published response of Arbiter has no causal path from the batch size to the loss. The noise of
the gradient is one, and what it costs can be measured during the run. Derivation and assumptions:
``experiments/noise_rules/DERIVATION.md``.
"""

from arbiter_jax.objectives._expected_gain import GainState, expected_gain
from arbiter_jax.objectives._floor_sizes import FloorConfig, final_size, size_for_end
from arbiter_jax.objectives._noise_floor import FloorState, noise_floor
from arbiter_jax.objectives._noise_response import noise_response
from arbiter_jax.objectives._objective import NoiseObjective
from arbiter_jax.objectives._persistence import (
    Persistence,
    impulse_response,
    measure_persistence,
)

__all__ = [
    "FloorConfig",
    "FloorState",
    "GainState",
    "NoiseObjective",
    "Persistence",
    "expected_gain",
    "final_size",
    "impulse_response",
    "measure_persistence",
    "noise_floor",
    "noise_response",
    "size_for_end",
]
