"""Callbacks: what a run does besides training. It is evaluated, logged, shown and saved.

Pass callbacks to ``fit(callbacks=[...])`` in this order, because each one sees what those before it
have recorded; checkpoints have an argument of their own.

====================  =============================================  ==================  ============
callback              what it writes, and where                      when                extra
====================  =============================================  ==================  ============
:func:`evaluate`      loss and accuracy on other data, into          every few windows,
                      ``record.evaluation``, the history and         and after the last
                      checkpoints
:func:`csv`           a row of all numbers, into one file            every window
:func:`tensorboard`   the same numbers as scalars, into event files  every window        "logging"
:func:`log`           the same numbers, to your function, e.g.       every window
                      ``wandb.log``
:func:`progress`      one line, in a terminal or a notebook;         every window, at    "progress"
                      `fit` shows it by default                      most 10 a second
:func:`checkpoints`   the whole run, into a directory:               every few windows,  "checkpoint"
                      ``fit(checkpoints=...)``                       and at the end
====================  =============================================  ==================  ============

A callback of your own is any function ``callback(record, state)``; a true result ends the run. It may
record numbers, ``record.evaluation["gap"] = 0.3``, which the callbacks after it see and the history
keeps. See :data:`arbiter_jax.training.Callback`: an object may also have `begin`, `end` and
`close`. Several seeds in one program are shown by `progress`; the others take one run.
"""

from arbiter_jax.callbacks._checkpoints import Checkpoints, checkpoints
from arbiter_jax.callbacks._csv import csv
from arbiter_jax.callbacks._evaluate import evaluate
from arbiter_jax.callbacks._log import log, tensorboard
from arbiter_jax.callbacks._progress import progress

__all__ = ["Checkpoints", "checkpoints", "csv", "evaluate", "log", "progress", "tensorboard"]
