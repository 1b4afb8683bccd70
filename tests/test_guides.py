"""The code of each page of the site runs, top to bottom, and each page is in the menu."""

import pytest

from tests.pages import SITE, run_blocks, toctree_pages

PAGES = [
    page
    for page in (SITE / "index.md", *sorted((SITE / "guides").glob("*.md")))
    if "```python" in page.read_text()
]


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_code_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for _ in run_blocks(path):
        pass


def test_every_page_is_in_the_menu_once():
    listed = toctree_pages(SITE / "index.md")
    there = {path for ending in ("md", "ipynb") for path in SITE.rglob(f"*.{ending}")}
    there -= {path for path in there if ".ipynb_checkpoints" in path.parts}
    assert sorted(listed) == sorted(there - {SITE / "index.md"})
