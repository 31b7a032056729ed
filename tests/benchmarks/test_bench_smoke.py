"""The findings of the smoke test on a GPU, with a stand-in for torch.cuda on CPU tensors."""

import contextlib
import json

import pytest
import torch

from bench import smoke
from bench.smoke_cases import Call, calls


class Graph:
    """A stand-in for a CUDA graph: replay repeats the captured step, unless it used values fixed at capture."""

    follows = True

    def replay(self):
        call, inputs, captured = self.step
        if self.follows:
            for old, new in zip(captured, real_step(call, inputs)):
                old.copy_(new)


real_step = smoke.step


@pytest.fixture
def cuda(monkeypatch):
    """A forbidden operation raises RuntimeError, like torch under set_sync_debug_mode("error")."""
    state = {"graph": None, "mode": "default"}

    @contextlib.contextmanager
    def capturing(graph):
        state["graph"] = graph
        yield
        state["graph"] = None

    def step(call, inputs, weights=None):
        found = real_step(call, inputs, weights)
        if state["graph"] is not None:
            state["graph"].step = call, inputs, found
        return found

    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    for name, value in {
        "CUDAGraph": Graph, "graph": capturing, "Stream": stream, "current_stream": stream,
        "stream": lambda side: contextlib.nullcontext(), "synchronize": lambda: None, "device_count": lambda: 1,
        "get_device_name": lambda: "A card", "set_sync_debug_mode": lambda mode: state.update(mode=mode),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(smoke, "CUDA", True)
    monkeypatch.setattr(smoke, "step", step)
    return state


def wrong(function, *shapes, waits=False):
    row, usable = smoke.attempt("it", Call(function, list(shapes), waits), [torch.float32])
    assert usable
    assert row["ok"] == (not row["float32"]["wrong"])
    assert row["device"] == "A card"
    return row["float32"]["wrong"]


def test_a_call_that_does_neither_is_ok(cuda):
    assert wrong(lambda x: x.sin().sum(1), (3, 4)) == []
    assert cuda["mode"] == "default"


def test_one_that_waits_is_not(cuda):
    def reads(x):
        if cuda["mode"] == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nwith a trace")
        return x.sin()

    assert wrong(reads, (3, 4)) == ["waits: called a synchronizing CUDA operation"]
    assert wrong(reads, (3, 4), waits=True) == []  # as its documentation says


def test_one_that_cannot_be_captured_is_not(cuda):
    def allocates(x):
        if cuda["graph"] is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x.sin()

    assert wrong(allocates, (3, 4)) == ["not captured: operation not permitted when stream is capturing"]


def test_one_whose_graph_keeps_the_first_values_is_not(cuda, monkeypatch):
    monkeypatch.setattr(Graph, "follows", False)
    assert wrong(lambda x: x.sin(), (3, 4)) == ["a graph's replay differs"]


def test_a_broken_device_ends_the_process_and_the_next_goes_on(cuda, monkeypatch, tmp_path):
    def broken(x):
        if x.dtype != torch.float64:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return x

    every = {"broken": Call(broken, [(3, 4)]), "sound": Call(lambda x: x.sin(), [(3, 4)])}
    monkeypatch.setattr(smoke, "calls", lambda small: every)
    started = []
    monkeypatch.setattr(smoke.os, "execv", lambda path, arguments: started.append(arguments))
    smoke.work(list(every), tmp_path, True)
    assert started
    assert started[0][1:3] == ["-m", "bench.smoke"]
    rows = [json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1)]
    assert [row["ok"] for row in rows] == [False, True]
    assert "illegal memory access" in smoke.line(rows[0])
    assert smoke.line(rows[1]).startswith("ok ")


def test_every_public_function_is_called():
    import fastkl

    public = {name for name in fastkl.__all__ if callable(getattr(fastkl, name)) and name.islower()}
    assert public == {name.partition(" ")[0] for name in calls(False)}
