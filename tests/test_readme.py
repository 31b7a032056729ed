"""The pages: each Python block runs by itself, as a reader would type it, and every link leads somewhere."""

import re
from pathlib import Path

import pytest

import fastkl

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in [README, *ROOT.glob("docs/**/*.md")]}
BLOCKS = {
    f"{page}, block {count}": block
    for page, text in PAGES.items()
    if not page.startswith("docs/integrations/")  # these need other libraries: tests/integrations/test_pages.py
    for count, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL), 1)
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_python_block_runs_by_itself(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a block may train a model
    exec(compile(BLOCKS[name], name, "exec"), {})


def test_pages_have_python_blocks():
    assert {name.split(",")[0] for name in BLOCKS} >= {"README.md", "docs/mixtures.md", "docs/objectives.md"}


def test_the_readme_names_every_public_op_and_keeps_to_its_length():
    assert [name for name in fastkl.__all__ if name not in PAGES["README.md"]] == []
    assert len(PAGES["README.md"].split()) <= 1500


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_that_exist(page):
    links = re.findall(r"\]\(([^)#:]+)\)", PAGES[page])
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_every_page_is_linked():
    linked = {
        ((ROOT / page).parent / link).resolve()
        for page, text in PAGES.items()
        for link in re.findall(r"\]\(([^)#:]+\.md)\)", text)
    }
    assert set(ROOT.glob("docs/**/*.md")) <= linked
