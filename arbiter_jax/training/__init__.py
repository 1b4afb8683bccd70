"""From a gradient to a run: one compiled window, and the loop over windows.

The loop knows no rule and no rule knows the loop; they meet in :mod:`arbiter_jax.base` alone.

:func:`fit` also scales a run, with one argument each:

=======================  ===========================================================================
`micro_batch_size`       batches of any size in one program, in the memory of one group of rows
`mesh`, `sampling`       the devices that share each batch, of one process or several
`checkpoints`, `resume`  a killed run continues bit for bit, see :func:`arbiter_jax.checkpoints`
`key`, a vector          several seeds in one program
=======================  ===========================================================================

:func:`run_window` and :func:`next_window` take `micro_batch_size` too, and :func:`run_window` uses
the mesh of ``jax.set_mesh``. On an accelerator, `fit` compiles the programs of the neighboring
buckets while a window trains; at level DEBUG the logger "arbiter_jax" says why a program is traced.

A whole run in one program, as reinforcement learning is often written, is :func:`run_window` inside
``jax.lax.scan``, and inside ``jax.vmap`` for several seeds. There the bucket is fixed and only masks
move, so that a small batch saves no time; see its docstring. Optimizers that evaluate the loss
themselves, such as `optax.lbfgs`, get it by `extra_args`.
"""

from arbiter_jax.training._accumulate import Accumulator, accumulate
from arbiter_jax.training._callbacks import Callback, RunStart
from arbiter_jax.training._compilations import count_compilations
from arbiter_jax.training._fit import fit
from arbiter_jax.training._next_window import next_window
from arbiter_jax.training._out_of_memory import OutOfMemoryError
from arbiter_jax.training._own_loop import value_grad_and_signals
from arbiter_jax.training._records import FitResult, WindowRecord
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
    "Accumulator",
    "Callback",
    "Data",
    "FitResult",
    "OutOfMemoryError",
    "RunStart",
    "TrainState",
    "Unfinished",
    "WindowRecord",
    "accumulate",
    "count_compilations",
    "fit",
    "init_state",
    "next_window",
    "no_unfinished_window",
    "resume_state",
    "run_window",
    "value_grad_and_signals",
]
