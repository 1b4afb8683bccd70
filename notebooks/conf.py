"""Builds the site: `python -m sphinx -W -n --keep-going -b html notebooks build/site`.

It needs no network. With ``ARBITER_JAX_EXECUTE=1`` the notebooks are executed, and the site shows
their figures.
"""

import inspect
import os
import pathlib
import pkgutil
import re
import sys
import tomllib

from docutils import nodes
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxRole
from sphinx.util.nodes import make_refnode

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

exclude_patterns = ["**/.ipynb_checkpoints"]
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
nb_execution_in_temp = True
nb_execution_timeout = 600
nb_execution_raise_on_error = True

# The API.
default_role = "code"  # `x` in a docstring is code
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # Args have shape, unit and range
autodoc_default_options = {"members": True}
autosummary_generate = False
napoleon_custom_sections = ["Reference"]
napoleon_numpy_docstring = False
nitpick_ignore_regex = [("py:.*", r"(collections|jax|flax|numpy|optax|typing)\..*")]
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


def find(name):
    """The object of a dotted name, or None."""
    try:
        return pkgutil.resolve_name(name)
    except (AttributeError, ImportError, ValueError):
        return None


def resolve(app, env, node, text):
    """Leads from any public name of an object to its entry: `training.fit` is `arbiter_jax.fit`."""
    objects = env.domains.python_domain.objects
    entries = {id(find(name)): name for name, entry in objects.items() if not entry.aliased}
    packages = {name.rpartition(".")[0] for name in objects if "._" not in name}
    for prefixes in ([""], [f"{node.get('py:module')}."], [f"{package}." for package in packages]):
        found = {entries.get(id(find(prefix + node["reftarget"]))) for prefix in prefixes} - {None}
        if len(found) == 1:
            (name,) = found
            page, anchor = objects[name].docname, objects[name].node_id
            return make_refnode(app.builder, node["refdoc"], page, anchor, text, name)
    return None


def comments_of_fields(cls):
    """The comments behind the fields of a class, by field."""
    comments, field = {}, None
    for line in inspect.getsource(cls).splitlines():
        field = next(iter(re.findall(r"^    (\w+): ", line)), field)
        comment = re.search(r"  # (.*)", line)
        if field in cls.__annotations__ and comment:
            comments.setdefault(field, comment[1])
    return comments


def process_docstring(app, what, name, value, options, lines):
    """Adds the fields of a class and the text below a constant; `Returns` are text without a type."""
    for i, line in enumerate(lines[:-1]):
        if line in ("Returns:", "Yields:"):
            lines[i + 1] = re.sub(r"^( *)", r"\1: ", lines[i + 1])
    if what == "class" and "__annotations__" in vars(value):
        comments = comments_of_fields(value)
        lines += [".. rubric:: Fields", ""] if comments else []
        for field, comment in comments.items():
            lines.append(f"* ``{field}``: " + re.sub(r"([*|\\])", r"\\\1", comment))
        lines.append("")
    if what == "data":
        package, _, bare = name.rpartition(".")
        inner = [x for x in sys.modules if x.startswith(package)]
        texts = [ModuleAnalyzer.for_module(x).find_attr_docs().get(("", bare)) for x in inner]
        lines[:] = next((text for text in texts if text), [])


def skip_member(app, what, name, value, skip, options):
    """Fields have their comments."""
    return skip or type(value).__name__ == "_tuplegetter"


def links_of_experiments(app, path, docname, text):
    """A link in an experiment's document leads to the page of that experiment, or to the repository."""
    folder = (pathlib.Path(app.srcdir) / path).parent

    def lead(link):
        target = (folder / link[2]).resolve().relative_to(ROOT)
        page = target.parent.name if target.name == "README.md" else target.stem
        if (ROOT / f"notebooks/guides/results/{page}.md").exists():
            return f"[{link[1]}]({page}.md)"
        words = "" if link[1] == target.name else f"{link[1]}, "
        return f"{words}{{repo}}`{target}`"

    text[0] = re.sub(r"\[([^]]+)\]\((?!https?:|#)([^)]+)\)", lead, text[0])


def setup(app):
    app.connect("include-read", links_of_experiments)
    app.add_role("repo", RepoRole())
    app.connect("autodoc-process-docstring", process_docstring, priority=0)  # before napoleon
    app.connect("autodoc-skip-member", skip_member)
    app.connect("missing-reference", resolve)
