"""Functions of the batch size whose minimum is known; rules take it and the agent descends to it.

The published response of Arbiter has no causal path from the batch size to the loss. The noise of
the gradient is one, and its cost can be measured during the run. Derivation and assumptions:
``experiments/noise_rules/DERIVATION.md``.
"""

from arbiter_jax.objectives._expected_gain import GainState, gain_objective
from arbiter_jax.objectives._noise_floor import FloorState, floor_objective
from arbiter_jax.objectives._noise_response import noise_response
from arbiter_jax.objectives._objective import NoiseObjective
from arbiter_jax.objectives._persistence import impulse_response

__all__ = [
    "FloorState",
    "GainState",
    "NoiseObjective",
    "floor_objective",
    "gain_objective",
    "impulse_response",
    "noise_response",
]
