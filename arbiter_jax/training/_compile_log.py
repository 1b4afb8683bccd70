"""Logs at level DEBUG, as "arbiter_jax", why a window program was traced."""

from __future__ import annotations

import logging
from typing import Any

import jax

logger = logging.getLogger("arbiter_jax")

_last: dict[str, Any] = {}  # what the last program was traced for: names -> values or identities


def log_trace(state: Any, data: Any, **static: Any) -> None:
    """Logs what :func:`run_window` is traced for, and what of it the last trace did not have.

    A program is traced once for each combination of its static arguments and the types of the others,
    so what has changed since the last trace is the reason for this one.

    Args:
      state: A TrainState, traced.
      data: A Data, traced.
      **static: All static arguments.
    """
    if not logger.isEnabledFor(logging.DEBUG):
        return
    arrays = {"the types of state": state, "the types of data": data}
    now = {name: str(jax.tree.map(jax.typeof, tree)) for name, tree in arrays.items()}
    # Functions and chains by their identity, which keeps nothing alive.
    now |= {name: x if isinstance(x, int | str) else id(x) for name, x in static.items()}
    changed = [_change(name, x) for name, x in now.items() if _last.get(name, x) != x]
    reason = f"new: {', '.join(changed)}" if changed else "nothing new" if _last else "the first"
    _last.clear()
    _last.update(now)
    logger.debug(
        "run_window is traced for bucket %s, window %s; %s",
        static["bucket_size"],
        static["window"],
        reason,
    )


def _change(name: str, value: Any) -> str:
    if name in ("bucket_size", "window", "num_agent_inputs", "micro_batch_size"):
        return f"{name} {value}, was {_last[name]}"
    return name
