"""Every notebook runs from top to bottom and shows a picture; outputs are never committed."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"].get("urls", {})
MOST_CELLS = 15
# On two cores that others use as well; 60 seconds if they are idle.
TIMEOUT = 600
INSTALL = re.compile(
    r"try:\n(    (import|from) .*\n|\n)+except ImportError:.*\n    %pip install -q .*\n"
)

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path, kind=None):
    """The cells, or the sources of those of one kind."""
    cells = json.loads(pathlib.Path(path).read_text())["cells"]
    if kind is None:
        return cells
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == kind]


@each
def test_outputs_are_stripped(path):
    for cell in cells_of(path):
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@each
def test_is_short(path):
    assert len(cells_of(path)) <= MOST_CELLS


@each
def test_installs_only_what_is_missing(path):
    first, *others = cells_of(path, "code")
    assert INSTALL.match(first), f"the first code cell must begin with\n{INSTALL.pattern}"
    assert "pip install" not in "".join(others)


@each
def test_opens_in_colab_if_the_repository_is_known(path):
    """A badge needs the address of the repository, which is `urls.Repository` in pyproject.toml."""
    title = cells_of(path, "markdown")[0]
    assert title.startswith("# ")
    if "Repository" not in URLS:
        assert "colab" not in path.read_text()
        return
    owner_and_name = URLS["Repository"].removeprefix("https://github.com/").strip("/")
    address = f"colab.research.google.com/github/{owner_and_name}/blob/main/notebooks/{path.name}"
    assert f"(https://{address})" in title


@pytest.mark.slow
@each
def test_runs_and_shows_a_picture(path, tmp_path):
    copy = shutil.copy(path, tmp_path)
    # In its own process, because nbmake needs other options and the kernel causes warnings.
    command = [sys.executable, "-m", "pytest", "-q", "--nbmake", f"--nbmake-timeout={TIMEOUT}"]
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "-c", os.devnull, "--overwrite", copy]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command + options,
        capture_output=True,
        text=True,
        timeout=TIMEOUT + 60,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    code = [cell for cell in cells_of(copy) if cell["cell_type"] == "code"]
    shows = lambda cell: any("image/png" in output.get("data", {}) for output in cell["outputs"])
    assert any(map(shows, code))
    # A figure that is made is also shown.
    assert all(shows(cell) for cell in code if is_figure(cell))


def is_figure(cell):
    """Whether the cell draws with the functions of `plotting`."""
    return re.search(r"\bplotting\.[a-z]", "".join(cell["source"])) is not None
