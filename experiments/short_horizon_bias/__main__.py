"""``python -m experiments.short_horizon_bias``."""

from experiments import _runner
from experiments.short_horizon_bias import CONFIGS, __doc__, plot, run, table

_runner.main("short_horizon_bias", CONFIGS, run, plot, table, __doc__.splitlines()[0])
