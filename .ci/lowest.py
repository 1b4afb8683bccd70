"""Prints the lowest supported versions as pins: `pip install . $(python .ci/lowest.py)`."""

import pathlib
import tomllib

text = (pathlib.Path(__file__).parents[1] / "pyproject.toml").read_text()
dependencies = tomllib.loads(text)["project"]["dependencies"]
print(*(requirement.replace(">=", "==") for requirement in dependencies))
