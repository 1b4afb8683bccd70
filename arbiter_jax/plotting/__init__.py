"""Figures of runs: batch sizes, losses, the proposals of an agent, shadows. Needs matplotlib.

Every function returns a ``matplotlib.figure.Figure`` that is independent of pyplot and its backend:
save it with ``savefig``, or put it in the last line of a notebook cell to display it.
"""

from arbiter_jax.plotting._figures import COLORS, figure, label_ends
from arbiter_jax.plotting._proposals import proposals
from arbiter_jax.plotting._runs import batch_sizes, losses, runs
from arbiter_jax.plotting._shadow import shadow

__all__ = ["COLORS", "batch_sizes", "figure", "label_ends", "losses", "proposals", "runs", "shadow"]
