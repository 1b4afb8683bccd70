"""Every public name has an entry in the API reference; the build of the site checks the rest."""

import importlib
import inspect
import pkgutil
import re

import pytest

import arbiter_jax as aj
from tests.pages import SITE

PACKAGES = ["arbiter_jax"] + [
    f"arbiter_jax.{module.name}"
    for module in pkgutil.iter_modules(aj.__path__)
    if not module.name.startswith("_")
]
DIRECTIVE = re.compile(r"^\.\. (currentmodule|auto\w+):: ([\w.]+)$", re.MULTILINE)


def entries():
    """The names that the pages of the API document."""
    names = []
    for path in sorted((SITE / "api").glob("*.md")):
        package = ""
        for directive, name in DIRECTIVE.findall(path.read_text()):
            if directive == "currentmodule":
                package = name
            else:
                names.append(name if name.startswith("arbiter_jax") else f"{package}.{name}")
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_has_an_entry(package):
    documented = {id(pkgutil.resolve_name(name)) for name in entries()}
    module = importlib.import_module(package)
    assert id(module) in documented
    names = [name for name in getattr(module, "__all__", ()) if name != "__version__"]
    assert [name for name in names if id(getattr(module, name)) not in documented] == []


def test_no_name_has_two_entries():
    assert len(set(entries())) == len(entries())


def test_the_first_page_has_every_name_of_the_package():
    text = (SITE / "api" / "arbiter_jax.md").read_text()
    names = {name for name in aj.__all__ if name != "__version__"}
    listed = re.findall(r"^   (\w+)$", text, re.MULTILINE)
    assert len(set(listed)) == len(listed)
    assert names - set(listed) == set()
    extra = [getattr(aj, name) for name in set(listed) - names]
    assert all(inspect.ismodule(value) for value in extra)
