"""Objectives whose gradient depends on the batch size: expected gain, and the noise floor.

The published response of Arbiter has no causal path from the batch size to the loss. The noise of
the gradient is one, and its cost can be measured on the run, without unrolling and without a
hypernetwork. Derivation and assumptions: ``experiments/NOISE.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from arbiter_jax import _validate
from arbiter_jax.objectives._expected_gain import GainState, gain_objective
from arbiter_jax.objectives._noise_floor import FloorState, floor_objective
from arbiter_jax.objectives._objective import NoiseObjective
from arbiter_jax.objectives._persistence import impulse_response

__all__ = ["FloorState", "GainState", "NoiseObjective", "impulse_response", "noise_response"]


def noise_response(
    kind: str = "noise_floor", *, loss_fn: Callable[..., Any] | None = None, **options: Any
) -> NoiseObjective:
    r"""An objective of the batch size that is measured on the run, for :func:`aj.arbiter`.

    With b(s) the batch size of the mixture s, the agent descends

    .. math::
      J_{gain}(s) &= \log(c_0 + b(s)) - \log(A_0 - q / b(s)), \\
      J_{floor}(s) &= a / b(s) + \log b(s).

    :math:`A_0` is the progress of a noiseless step and :math:`q / b` what noise takes from it; both
    are measured on validation examples. :math:`a` is the size
    at which the noise floor, :math:`k (-B E\langle \xi, du \rangle) / (4 b)`, is a given share of
    the loss still to go: :func:`arbiter_jax.schedulers.noise_floor`. Either has a closed form for
    its minimum, which is a rule of its own and what an agent is to be compared with.

    Args:
      kind: "noise_floor" or "expected_gain".
      loss_fn: ``loss_fn(params, batch) -> float[M]``, the training loss. "expected_gain" needs it;
        "noise_floor" looks at validation examples only where it is given.
      **options: The constants of the rule of that name: for "noise_floor" `num_examples`, `share`,
        `hold`, `growth`, `persistence`, `step_cost`, `optimal_loss`; for "expected_gain"
        `persistence`, `step_cost`.

    Returns:
      A :class:`NoiseObjective`.

    Raises:
      ValueError: If an argument is out of its range, or `loss_fn` is missing.

    *Guarantees*: the objective is least at `best`; a step whose signals are not finite changes
    nothing.

    >>> import arbiter_jax as aj
    >>> objective = noise_response("noise_floor", num_examples=100_000)
    >>> agent = aj.mlp_agent((3,))
    >>> tx = aj.arbiter(agent, objective=objective, min_batch_size=8, max_batch_size=512)
    """
    _validate.one_of(("noise_floor", "expected_gain"), kind=kind)
    if kind == "expected_gain" and loss_fn is None:
        raise ValueError("loss_fn is needed for kind='expected_gain', got None.")
    make = {"noise_floor": floor_objective, "expected_gain": gain_objective}[kind]
    unknown = set(options) - set(make.__kwdefaults__)
    if unknown:
        raise ValueError(
            f"options must be among {', '.join(make.__kwdefaults__)} for kind={kind!r}, got "
            f"{', '.join(sorted(unknown))}."
        )
    return make(loss_fn, **options)
