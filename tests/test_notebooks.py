"""Every notebook runs from top to bottom and shows its figures; outputs are never committed."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path):
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_and_shows_its_figures(path, tmp_path):
    copy = shutil.copy(path, tmp_path)
    # In its own process, because nbmake needs other options and the kernel causes warnings.
    command = [sys.executable, "-m", "pytest", "-q", "--nbmake", "--nbmake-timeout=600"]
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, "--overwrite", copy]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command + options,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    plots = [
        cell
        for cell in json.loads(pathlib.Path(copy).read_text())["cells"]
        if cell["cell_type"] == "code" and "plotting." in "".join(cell["source"])
    ]
    assert plots or "plotting" not in path.read_text()
    for cell in plots:
        assert any("image/png" in output.get("data", {}) for output in cell["outputs"])
