"""Of the tests themselves: names that one can type after `pytest -k`, and what they import."""

import ast
import functools
import pathlib

FOLDER = pathlib.Path(__file__).parent
FILES = sorted(FOLDER.rglob("test_*.py"))


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text())


def nodes_of(path, kind):
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, kind)]


def test_names_have_at_most_50_characters():
    """The sentence that a test would be called goes into its docstring."""
    functions = [node.name for path in FILES for node in nodes_of(path, ast.FunctionDef)]
    tests = [name for name in functions if name.startswith("test_")]
    assert len(tests) > 1000
    assert [name for name in tests if len(name) > 50] == []


def test_no_test_module_imports_another():
    """What several of them use is in a module of its own, such as `rules`."""
    imports = [(path, node) for path in FILES for node in nodes_of(path, ast.ImportFrom)]
    modules = [(path.name, (node.module or "").split(".")) for path, node in imports]
    assert [m for m in modules if m[1][0] == "tests" and m[1][-1].startswith("test_")] == []
