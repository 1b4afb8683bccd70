"""``python -m experiments.report``."""

from experiments.report import main

main()
