"""The pages have the tables of the committed results, and what is written between their markers."""

import json

import pytest

pytest.importorskip("matplotlib")

from bench import pages
from bench.store import HERE, Store


@pytest.fixture
def results():
    (folder,) = (path.parent for path in (HERE / "results").glob("*/machine.json"))
    return Store(folder, keep=True), json.loads((folder / "machine.json").read_text())


@pytest.mark.parametrize("page", pages.PAGES)
def test_the_tables_of_a_page_are_those_of_the_results(results, page):
    text = (pages.ROOT / page).read_text(encoding="utf-8")
    assert "<!-- bench: " in text
    assert pages.filled(text, *results) == text


def test_the_faster_one_of_two_compiled_formulas_counts(tmp_path):
    store = Store(tmp_path, keep=False)
    times = {"fastkl": 2.0, "torch.compile": 9.0, "torch.distributions": 50.5}
    for case, compiled in (("4 x 2 x 1", 9.0), ("4 x 2 x 1, expansion", 3.0)):
        rows = [{"op": "gmm_log_prob", "case": case, "threads": 1, "provider": name} for name in times]
        store.add("ops", [row | {"both_ms": {**times, "torch.compile": compiled}[row["provider"]]} for row in rows])
    table = pages.filled("<!-- bench: pairs -->\n<!-- end -->", store, {"cpu": "Some(R) CPU"})
    assert "| `gmm_log_prob`, 4 x 2 x 1 | `MixtureSameFamily` | 25 | 1.5 |\n" in table
    assert "expansion" not in table


def test_what_was_not_timed_is_named(tmp_path):
    store = Store(tmp_path, keep=False)
    store.add("ops", [{"op": "mmd", "case": "8", "threads": 1, "provider": "fastkl", "both_ms": 2.0}])
    assert "| `mmd`, 8 | the eager formula | not timed | not timed |" in pages.pairs(store, "")
