"""``python -m experiments.noise_rules``."""

from experiments import _runner
from experiments.noise_rules import CONFIGS, __doc__, plot, run, table

_runner.main("noise_rules", CONFIGS, run, plot, table, __doc__.splitlines()[0])
