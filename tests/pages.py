"""Runs the ```python blocks of a page of Markdown, top to bottom, as a reader would paste them."""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
SITE = ROOT / "notebooks"

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_TOCTREE = re.compile(r"^```\{toctree\}\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def run_blocks(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yields the one namespace of all blocks after each of them; an error has the line of the page."""
    text = path.read_text()
    namespace: dict[str, Any] = {"__name__": path.stem}
    for block in _BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], str(path), "exec"), namespace)
        yield namespace


def toctree_pages(path: pathlib.Path) -> list[pathlib.Path]:
    """The pages that the toctrees of a page and of its subpages list, with the suffix of the file."""
    pages = []
    for block in _TOCTREE.findall(path.read_text() if path.suffix == ".md" else ""):
        for line in block.splitlines():
            if line and not line.startswith(":"):
                for page in sorted(path.parent.glob(f"{line}.*")):
                    if page.suffix in (".md", ".ipynb"):  # and no figure of the same name
                        pages += [page, *toctree_pages(page)]
    return pages
