"""Run bench/gpu.sh to its end on this machine, and check its messages when a stage fails."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ["about", "smoke", "host", "timing", "tune", "tests", "step", "training"]
FILES = {"about.json", "host.csv", "log.txt", "smoke.jsonl", "step.csv", "timing.csv", "tune.csv", "tuned.py"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the project: the script links fastkl/kernels, which must not disturb other tests."""
    place = tmp_path_factory.mktemp("project") / "tree"
    left_out = shutil.ignore_patterns(".*", "results", "runs", "build", "docs", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, place, ignore=left_out, symlinks=True)
    return place


def call(tree, out, **settings):
    settings = {"OUT": str(out), "PYTHON": sys.executable, "JOBS": "1", **settings}
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | settings
    command = ["bash", str(tree / "bench" / "gpu.sh"), "--dry-run"]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True, timeout=500)
    return done, dict(re.findall(r"^-- (\w+): (.+) \(\d+ s\)$", done.stdout, re.M))


def test_every_stage_is_reported_and_leaves_its_results(tree, tmp_path):
    done, results = call(tree, tmp_path)
    assert results == dict.fromkeys(STAGES, "ok"), done.stdout[-6000:] + done.stderr[-2000:]
    assert done.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert done.stdout.splitlines()[-len(STAGES) :] == [
        line for line in (tmp_path / "log.txt").read_text().splitlines()[-len(STAGES) :]
    ]
    smoke = [json.loads(line) for line in (tmp_path / "smoke.jsonl").read_text().splitlines()]
    assert len(smoke) == 4
    assert all(row["ok"] and row["float32"]["error"] < 2e-4 for row in smoke)
    for name in ("timing", "host", "tune", "step"):
        rows = read(tmp_path / f"{name}.csv")
        assert rows
        assert all(row["card"] for row in rows)
        assert not any(row["note"] for row in rows)
    timed = {(row["op"], row["contender"], row["direction"]) for row in read(tmp_path / "timing.csv")}
    assert {("kl_normal", who, way) for who in ("eager", "fastkl", "copy") for way in ("forward", "both")} <= timed
    assert ("mixture", "fastkl tf32x3", "backward") in timed
    namespace = {}
    exec((tmp_path / "tuned.py").read_text(), namespace)
    assert set(namespace["TILES"]["kl_normal"]) == {2, 4, 8}
    assert set(namespace["GMM_DOT"]) == {"forward", "by_rows", "by_components"}


def test_a_failing_or_hanging_stage_does_not_stop_others(tree, tmp_path):
    """With a Python that fails, and that in the tests' stage hangs beyond the remaining time."""
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$1 $2" in "-m pytest") exec sleep 60 ;; "-m bench.gpu") exit 3 ;; *) exit 0 ;; esac\n'
    )
    python.chmod(0o755)
    (tmp_path / "out").mkdir()
    done, results = call(tree, tmp_path / "out", PYTHON=str(python), STAGES="about timing tests step", TOTAL="16")
    assert done.returncode == 1
    assert results["about"] == "ok"
    assert results["timing"] == "FAILED, exit status 3"
    assert re.fullmatch(r"STOPPED at its limit of 1\d s", results["tests"])
    assert results["step"] == "NOT RUN: no time left"
    assert "smoke" not in results
    for stages, status in ("about", 0), ("timing", 1):
        done, _ = call(tree, tmp_path / "out", PYTHON=str(python), STAGES=stages)
        assert done.returncode == status


def test_without_a_gpu_nothing_is_timed_by_mistake(tree, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" != -c ]\n')  # the script asks torch for a GPU, and there is none
    python.chmod(0o755)
    command = ["bash", str(tree / "bench" / "gpu.sh")]
    environment = os.environ | {"OUT": str(tmp_path / "out"), "PYTHON": str(python)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch finds no GPU" in done.stderr
    assert done.stdout == ""


def test_a_wrong_result_fails_the_smoke_test(tmp_path, monkeypatch, capsys):
    from bench import smoke, smoke_cases

    def wrong(mu, logvar):
        return (mu + logvar * (1 + 0.01 * (mu.dtype != smoke.torch.float64))).sum(1)

    calls = {"right": smoke_cases.Call(lambda x: x.sin(), [(3, 4)]), "wrong": smoke_cases.Call(wrong, [(3, 4)] * 2)}
    calls["broken"] = smoke_cases.Call(lambda x: x @ x, [(3, 4)])
    monkeypatch.setattr(smoke, "calls", lambda small: calls)
    assert smoke.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line[:4] for line in lines] == ["ok  ", "FAIL", "FAIL"]
    assert "allowed 2e-04" in lines[1]
    assert "RuntimeError" in lines[2]


def test_what_changes_from_call_to_call_fails_it(monkeypatch, capsys):
    from bench import smoke, smoke_cases

    drift = iter(range(99))
    changing = smoke_cases.Call(lambda x: x + 1e-6 * next(drift), [(3, 4)])
    monkeypatch.setattr(smoke, "calls", lambda small: {"changing": changing})
    assert smoke.main([]) == 1
    assert "four calls differ" in capsys.readouterr().out


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _no_threads_beside(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
