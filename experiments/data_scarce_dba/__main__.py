"""``python -m experiments.data_scarce_dba``."""

from experiments import _runner
from experiments.data_scarce_dba import CONFIGS, __doc__, plot, run, table

_runner.main("data_scarce_dba", CONFIGS, run, plot, table, __doc__.splitlines()[0])
