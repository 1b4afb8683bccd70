"""The two objectives by name, for an agent."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from arbiter_jax import _validate
from arbiter_jax.objectives._expected_gain import expected_gain
from arbiter_jax.objectives._noise_floor import noise_floor
from arbiter_jax.objectives._objective import NoiseObjective

_KINDS: dict[str, Callable[..., NoiseObjective]] = {
    "noise_floor": noise_floor,
    "expected_gain": expected_gain,
}


def noise_response(
    kind: str = "noise_floor", *, loss_fn: Callable[..., Any] | None = None, **options: Any
) -> NoiseObjective:
    r"""Makes an objective with which :func:`arbiter_jax.arbiter` learns what gradient noise costs.

    With b(s) the batch size of the mixture s, the agent descends

    .. math::
      J_{floor}(s) &= a / b(s) + \log b(s), \\
      J_{gain}(s) &= \log(c_0 + b(s)) - \log(A_0 - q / b(s)).

    :math:`a` is the size at which noise costs a fixed share of the loss still to go, see
    :func:`arbiter_jax.objectives.noise_floor`; :math:`A_0` is what a step without noise gains and
    :math:`q / b` what its noise costs, see :func:`arbiter_jax.objectives.expected_gain`. The rules
    of the same names in :mod:`arbiter_jax.schedulers` take the minimum in closed form: compare the
    agent with them.

    Args:
      kind: "noise_floor" or "expected_gain".
      loss_fn: ``loss_fn(params, batch) -> float[M]``, the training loss. "expected_gain" needs it;
        "noise_floor" measures on validation examples only if it is given.
      **options: The other arguments of the function of that name in
        :mod:`arbiter_jax.objectives`.

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
    make = _KINDS[_validate.one_of(tuple(_KINDS), kind=kind)]
    allowed = [name for name in inspect.signature(make).parameters if name != "loss_fn"]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(
            f"options must be among {', '.join(allowed)} for kind={kind!r}, got "
            f"{', '.join(unknown)}."
        )
    return make(loss_fn, **options)
