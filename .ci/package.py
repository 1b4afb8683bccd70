"""Checks the content of the wheel and the sdist in a folder: `python .ci/package.py dist`."""

import pathlib
import sys
import tarfile
import zipfile

folder = pathlib.Path(sys.argv[1])
(wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
root = pathlib.Path(__file__).parents[1]
modules = {str(path.relative_to(root)) for path in root.glob("arbiter_jax/**/*.py")}

with zipfile.ZipFile(wheel) as archive:
    names = set(archive.namelist())
info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
needed = modules | {"arbiter_jax/py.typed", "arbiter_jax/CHANGELOG.md", f"{info}/licenses/LICENSE"}
assert needed <= names, f"the wheel lacks {sorted(needed - names)}"
foreign = sorted(name for name in names if not name.startswith(("arbiter_jax/", f"{info}/")))
assert not foreign, f"the wheel has {foreign}"

with tarfile.open(sdist) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
needed = modules | {"README.md", "LICENSE", "pyproject.toml", "tests/conftest.py", ".ci/run"}
assert needed <= names, f"the sdist lacks {sorted(needed - names)}"
print(wheel.name, sdist.name)
