"""``python -m experiments.benchmark``."""

from experiments import _runner
from experiments.benchmark import CONFIGS, __doc__, plot, run, table

_runner.main("benchmark", CONFIGS, run, plot, table, __doc__.splitlines()[0])
