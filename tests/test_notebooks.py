"""Every notebook runs from top to bottom; outputs are never committed."""

import json
import pathlib
import subprocess
import sys

import pytest

NOTEBOOKS = sorted((pathlib.Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path):
    # A process of its own: the kernel's warnings are not ours, and nbmake wants its own options.
    command = [sys.executable, "-m", "pytest", "-q", "--nbmake", "--nbmake-timeout=600"]
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-c", "/dev/null", str(path)]
    done = subprocess.run(command + options, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
