"""What bench/gpu.py times, and what it refuses to time; on a CPU, at small sizes."""

import pytest
import torch

from bench import gpu, gpu_cases
from bench.case import as_list, make_cotangents, run
from bench.device import Flush
from bench.gpu_cases import FIRST, MIB, PAIRS, REST, STREAMS, Job, Timed


@pytest.mark.parametrize("op", PAIRS)
def test_the_definition_by_rows_is_the_definition(op):
    _, timed = gpu_cases.build(Job(op, 0), "cpu", True)
    outputs = as_list(timed.functions["eager"](*timed.inputs))
    cotangents = make_cotangents(outputs, timed.inputs)
    exact = [x.detach().double().requires_grad_() for x in timed.inputs]
    whole = run(timed.functions["eager"], exact, [c.double() for c in cotangents])
    for block in (7, 32, timed.rows):  # the last one shorter, and not
        parts = gpu.truth(timed._replace(block=block), cotangents)
        for a, b in zip([*parts[0], *parts[1]], [*whole[0], *whole[1]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # a formula may hold its weights in float32
    assert [len(whole[0]), len(whole[1])] == [len(outputs), len(timed.inputs)]


@pytest.mark.parametrize("op", STREAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_stream_of_rows_matches_its_definition(op, dtype):
    _, timed = gpu_cases.build(Job(op, 1, dtype), "cpu", True)
    outputs = as_list(timed.functions["fastkl"](*timed.inputs))
    cotangents = make_cotangents(outputs, timed.inputs)
    expected = gpu.truth(timed, cotangents)
    for name, function in timed.functions.items():
        assert gpu.refusal(timed, name, cotangents, function, expected) == ""


def test_sizes_are_those_of_the_bytes_that_forward_moves():
    widths = {op: width for op, (_, _, width) in STREAMS.items()}
    work = gpu_cases.jobs(False)
    assert {job.op for job in work} == {*STREAMS, *PAIRS, *REST}
    assert {(job.op, job.mib) for job in work if job.op in STREAMS} == {(op, m) for op in STREAMS for m in (8, 34, 256)}
    assert {job.op for job in work if job.dtype == torch.bfloat16} == set(FIRST)
    _, timed = gpu_cases.build(Job("rsample_kl", 32, torch.bfloat16), "cpu", False)
    moved = timed.rows * widths["rsample_kl"] * 2
    assert 32 * MIB <= moved < 33 * MIB
    outputs = [out.detach() for out in timed.functions["fastkl"](*timed.inputs)]
    budget = gpu.budget(timed.budget, timed.inputs, outputs, make_cotangents(outputs, timed.inputs))
    assert budget.forward == pytest.approx(moved, rel=2e-3)  # beside the seed and a value for each row


@pytest.mark.parametrize("who", ["eager", "fastkl"])
def test_what_does_not_match_or_fails_is_not_timed(who, monkeypatch, tmp_path, capsys):
    def fails(x):
        raise ZeroDivisionError("of the formula")

    right = lambda x: x.square().sum(1)  # noqa: E731
    functions = {"fastkl": right, "eager": right, "other": fails}
    functions[who] = lambda x: x.square().sum(1) * 1.001
    inputs = [torch.randn(8, 4, requires_grad=True)]
    timed = Timed(inputs, functions, gpu_cases.sums(right), 8, block=3)
    monkeypatch.setattr(gpu, "build", lambda job, device, small: ("8 x 4", timed))
    monkeypatch.setattr(gpu, "jobs", lambda small: [Job("square", 1)])
    status = gpu.main(["--out", str(tmp_path / "t.csv"), "--small", "--no-compile", "--jobs", "1", "--rounds", "1"])
    assert status == (who == "fastkl")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("square")]
    said = {line.split()[5]: line for line in lines}
    assert "NOT TIMED: output 0 differs" in said[who]
    assert "NOT TIMED: failed: ZeroDivisionError" in said["other"]
    assert " ms" in said[({"eager", "fastkl"} - {who}).pop()]


def test_a_copy_is_a_hundred_per_cent_of_itself():
    given = type("Given", (), {"small": True, "compile": False, "rounds": 3, "case_seconds": 1.0})
    rows = gpu.rows_of(Job("kl_normal", 1), given, Flush("cpu"))
    copies = {row["direction"]: row for row in rows if row["contender"] == "copy"}
    assert set(copies) == {"forward", "backward", "both"}
    for row in rows:
        assert row["card"]
        assert row["percent_of_copy"] == pytest.approx(100 * copies[row["direction"]]["ms"] / row["ms"])
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
    assert all(row["times_as_fast_as_eager"] == 1 for row in rows if row["contender"] == "eager")
