"""``python -m experiments.feasibility``."""

from experiments import _runner
from experiments.feasibility import CONFIGS, __doc__, plot, run, table

_runner.main("feasibility", CONFIGS, run, plot, table, __doc__.splitlines()[0])
