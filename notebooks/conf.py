"""Builds the site: `python -m sphinx -W -n --keep-going -b html notebooks OUT`, without network.

With ``ARBITER_JAX_EXECUTE=1`` the notebooks are executed, and the site shows their figures.
"""

import os
import pathlib
import tomllib

from docutils import nodes
from sphinx.util.docutils import SphinxRole

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

project = "arbiter_jax"
author = "the authors of arbiter_jax"
copyright = f"2026, {author}"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]

html_theme = "furo"
html_title = project
html_copy_source = False
html_show_sphinx = False
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True

# Pages and notebooks.
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "force" if os.environ.get("ARBITER_JAX_EXECUTE") == "1" else "off"
nb_execution_timeout = 600
nb_execution_raise_on_error = True

# The API.
default_role = "code"  # `x` in a docstring is code
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # Args have shape, unit and range
autosummary_generate = False
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 88


class RepoRole(SphinxRole):
    """{repo}`path` is a file of the repository: a link if the project metadata names its address."""

    def run(self):
        if not (ROOT / self.text).exists():
            message = self.inliner.reporter.warning(f"{self.text} is not in the repository")
            return [], [message]
        text = nodes.literal("", self.text)
        address = PROJECT.get("urls", {}).get("Repository")
        if address is None:
            return [text], []
        kind = "tree" if (ROOT / self.text).is_dir() else "blob"
        return [nodes.reference("", "", text, refuri=f"{address}/{kind}/main/{self.text}")], []


# To be deleted when all pages are there.
def drop_missing_pages(app, name, source):
    if name == "index":
        is_there = lambda x: any((ROOT / "notebooks").glob(f"{x}.*"))
        lines = source[0].splitlines()
        is_page = lambda x: x.startswith(("guides/", "0"))
        source[0] = "\n".join(x for x in lines if not is_page(x) or is_there(x))


def setup(app):
    app.connect("source-read", drop_missing_pages)
    app.add_role("repo", RepoRole())
