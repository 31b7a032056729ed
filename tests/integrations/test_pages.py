"""The pages of the integrations: each Python block runs by itself, and every page says what it has to."""

import importlib.util
import re
from pathlib import Path

import pytest

PAGES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in (Path(__file__).parents[2] / "docs" / "integrations").glob("*.md")
}
NEEDS = {"README": "torch", "distributions": "torch", "trainers": "accelerate"}


@pytest.mark.parametrize("page", sorted(PAGES))
def test_python_blocks_run_by_themselves(page):
    if importlib.util.find_spec(NEEDS.get(page, page)) is None:
        pytest.skip(f"{page} is not installed")
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks, 1):
        exec(compile(block, f"{page}, block {number}", "exec"), {"__name__": page})


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"README"}))
def test_a_page_says_who_gains_and_who_does_not(page):
    for words in ("Tested with ", "## Measured", "Who gains", "Who does not"):
        assert words in PAGES[page]
    assert 40 <= PAGES[page].count("\n") <= 80


def test_the_readme_names_every_integration():
    """Each title of a page is in the table of the README and in that of the pages."""
    titles = [name for page in PAGES.keys() - {"README"} for name in PAGES[page].split("\n")[0][2:].split(" and ")]
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for text in (readme, PAGES["README"]):
        cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
        named = {name.strip(" []").partition("]")[0] for cell in cells for name in cell.split(",")}
        assert set(titles) <= named
