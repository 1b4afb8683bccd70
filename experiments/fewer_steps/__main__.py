"""``python -m experiments.fewer_steps``."""

from experiments import _runner
from experiments.fewer_steps import CONFIGS, __doc__, plot, run, table

if __name__ == "__main__":  # the processes of part B import this module
    _runner.main("fewer_steps", CONFIGS, run, plot, table, __doc__.splitlines()[0])
