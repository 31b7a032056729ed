"""The README's Python blocks run, one after the other, as a reader would type them."""

import re
from pathlib import Path

import fastkl

README = Path(__file__).parents[1] / "README.md"


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) >= 3
    namespace = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["head"].grad.shape == namespace["head"].shape


def test_names_every_public_op_and_links_files_that_exist():
    text = README.read_text()
    assert [name for name in fastkl.__all__ if name not in text] == []
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
