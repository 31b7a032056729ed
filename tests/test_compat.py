"""The compatibility table: what a new run replaces and keeps, and when the command fails."""

import json

import compat
import pytest


def row(triton, target="sm_90", **more):
    return {"torch": "2.13.0", "triton": triton, "target": target, "compiled": "3 of 3 calls", "failed": 0, **more}


def test_a_new_run_replaces_only_the_same_minor_version():
    old = [row("3.10.0"), row("3.5.0", executed="7 of 7 calls"), row("3.5.0", "sm_80")]
    found = compat.merged(old, [row("3.5.1", compiled="2 of 3 calls")], ("triton", "target"))
    assert [(r["triton"], r["target"]) for r in found] == [("3.5.0", "sm_80"), ("3.5.1", "sm_90"), ("3.10.0", "sm_90")]
    assert found[1]["compiled"] == "2 of 3 calls"
    assert "executed" not in found[1]  # which was said of other kernels


def test_the_page_has_the_rows_and_the_cards_that_were_timed(tmp_path, monkeypatch):
    (tmp_path / "bench" / "results" / "h100").mkdir(parents=True)
    about = {"used": {"name": "NVIDIA H100", "major": 9, "minor": 0}, "packages": {"triton": "3.5.1"}}
    (tmp_path / "bench" / "results" / "h100" / "about.json").write_text(json.dumps(about))
    monkeypatch.setattr(compat, "ROOT", tmp_path)
    monkeypatch.setattr(compat, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(compat, "PAGE", tmp_path / "page.md")
    marks = ["<!-- kernels -->", "old", "<!-- end of kernels -->", "between", "<!-- tests -->", "<!-- end of tests -->"]
    compat.PAGE.write_text("\n".join(["before", *marks, "after"]))
    compat.write({"kernels": [row("3.5.1"), row("3.5.1", "sm_80")], "tests": []})
    lines = compat.PAGE.read_text().splitlines()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert "old" not in lines
    assert "| 2.13.0 | 3.5.1 | sm_90 | 3 of 3 calls | – | NVIDIA H100 |" in lines
    assert "| 2.13.0 | 3.5.1 | sm_80 | 3 of 3 calls | – | – |" in lines


@pytest.mark.parametrize(
    ("rows", "limits", "status"),
    [([row("3.5.1")], 0, 0), ([row("3.5.1", failed=1)], 0, 1), ([row("3.5.1")], 1, 1), ([], 0, 1), (None, 0, 1)],
)
def test_a_fault_or_nothing_compiled_is_a_failure(rows, limits, status, monkeypatch):
    monkeypatch.setattr("sys.argv", ["compat.py", "--triton", "3.5"])
    monkeypatch.setattr(compat, "compile_with", lambda version, targets: rows and [dict(r) for r in rows])
    monkeypatch.setattr(compat, "limits_with", lambda version: limits)
    assert compat.main() == status
