"""From a gradient to a run: one compiled window, and the loop over windows.

The loop knows no rule and no rule knows the loop; they meet in :mod:`arbiter_jax.base` alone.
"""

from arbiter_jax.training._compilations import count_compilations
from arbiter_jax.training._fit import fit
from arbiter_jax.training._next_window import next_window
from arbiter_jax.training._out_of_memory import OutOfMemoryError
from arbiter_jax.training._records import Callback, FitResult, WindowRecord
from arbiter_jax.training._resume import resume_state
from arbiter_jax.training._state import (
    Data,
    TrainState,
    Unfinished,
    init_state,
    no_unfinished_window,
)
from arbiter_jax.training._window import run_window

__all__ = [
    "Callback",
    "Data",
    "FitResult",
    "OutOfMemoryError",
    "TrainState",
    "Unfinished",
    "WindowRecord",
    "count_compilations",
    "fit",
    "init_state",
    "next_window",
    "no_unfinished_window",
    "resume_state",
    "run_window",
]
