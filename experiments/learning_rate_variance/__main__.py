"""``python -m experiments.learning_rate_variance``."""

from experiments import _runner
from experiments.learning_rate_variance import CONFIGS, __doc__, plot, run, table

_runner.main("learning_rate_variance", CONFIGS, run, plot, table, __doc__.splitlines()[0])
