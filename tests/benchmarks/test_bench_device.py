"""bench/device.py and what is built on it, with a stand-in for torch.cuda whose work takes as long as it says."""

import contextlib
import functools
import multiprocessing
import time
import types

import pytest
import torch

from bench import device, host, measure, store, tune_timed, workers
from bench.case import Case, leaves
from bench.timing import Contender


class Cuda:
    """Records what reaches the device, in order; its clock advances by the duration of each piece of work."""

    def __init__(self):
        self.log, self.now, self.capturing, self.reads, self.mode = [], 0.0, None, False, "default"

    def ask(self, mode):
        self.mode = mode

    def work(self, name, ms):
        if self.reads and self.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        assert not (self.reads and self.capturing is not None), "a capture that fails spoils what follows"
        if self.capturing is not None:
            self.capturing.append((name, ms))
            return
        self.log.append(name)
        self.now += ms

    def graph(self):
        cuda, steps = self, []

        class Graph:
            def capture_begin(self, pool=None):
                cuda.capturing = steps

            def capture_end(self):
                cuda.capturing = None

            def pool(self):
                return "pool"

            def replay(self):
                for name, ms in steps:
                    cuda.work(f"{name}, replayed", ms)

        return Graph()

    def event(self, enable_timing):
        cuda = self

        class Event:
            def record(self):
                self.at = cuda.now
                cuda.log.append("event")

            def synchronize(self):
                pass

            def elapsed_time(self, other):
                return other.at - self.at

        return Event()


class Flush(device.Flush):
    def __init__(self, cuda):
        self.cuda, self.milliseconds, self.buffer = cuda, 0.1, "there"

    def __call__(self, times):
        self.cuda.work(f"flush {times}", 0.1 * times)


@pytest.fixture
def cuda(monkeypatch):
    fake, stream = Cuda(), type("Stream", (), {"wait_stream": lambda self, other: None})
    for name, value in {
        "CUDAGraph": fake.graph, "Event": fake.event, "Stream": stream, "current_stream": stream,
        "stream": lambda side: contextlib.nullcontext(), "synchronize": lambda: None,
        "set_sync_debug_mode": fake.ask,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def step(cuda, name, forward, backward):
    return Contender(lambda: cuda.work(f"{name} forward", forward), lambda _: cuda.work(f"{name} backward", backward))


def test_each_direction_is_a_graph_timed_alone_after_a_flush(cuda):
    turns = device.turns_of(step(cuda, "a", 2.0, 3.0), "cuda")
    cuda.log.clear()
    times = device.measure(turns, Flush(cuda), 5, 1e9)
    assert {key: (found.median, found.how) for key, found in times.items()} == {
        "forward": (pytest.approx(2.0), "graph"), "backward": (pytest.approx(3.0), "graph"),
        "both": (pytest.approx(5.0), "graph"),
    }  # fmt: skip
    # A backward pass uses what a forward pass has left, which is not on its time.
    assert cuda.log[4:9] == ["a forward, replayed", "flush 2", "event", "a backward, replayed", "event"]
    assert cuda.log.count("flush 2") == 15


def test_contenders_take_turns(cuda):
    turns = {}
    for name in "ab":
        made = device.turns_of(step(cuda, name, 1.0, 1.0), "cuda", differentiates=False)
        assert set(made) == {"forward"}
        turns[name] = made["forward"]
    cuda.log.clear()
    device.measure(turns, Flush(cuda), 3, 1e9)
    assert [name[0] for name in cuda.log if "forward" in name] == list("ababab")


def test_what_waits_runs_behind_a_backlog_and_is_not_captured(cuda):
    cuda.reads = True
    turns = device.turns_of(step(cuda, "a", 2.0, 3.0), "cuda")
    assert turns["both"].how == "backlog: waits: called a synchronizing CUDA operation"
    assert cuda.mode == "default"
    cuda.reads = False
    assert device.turns_of(step(cuda, "a", 2.0, 3.0), "cuda", graphs=False)["both"].how == "backlog"
    # The host needs a millisecond to launch it: ten flushes keep the device busy until then.
    turns = {name: turn._replace(host_ms=1.0) for name, turn in turns.items()}
    cuda.log.clear()
    times = device.measure(turns, Flush(cuda), 3, 1e9)
    assert [times[name].median for name in ("forward", "backward", "both")] == pytest.approx([2.0, 3.0, 5.0])
    assert cuda.log[:4] == ["flush 12", "event", "a forward", "event"]


def test_long_steps_run_fewer_rounds_and_skip_out_of_memory(cuda, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(device.time, "perf_counter", lambda: next(clock))

    def exhausted():
        raise torch.cuda.OutOfMemoryError

    turns = {"a": device.Turn(lambda: cuda.work("a", 1.0), "graph"), "b": device.Turn(exhausted, "graph")}
    times = device.measure(turns, Flush(cuda), 50, 5.0)
    assert set(times) == {"a"}
    assert device.FEWEST <= cuda.log.count("a") < 10


def test_on_a_cpu_it_is_the_wall_clock():
    turns = device.turns_of(Contender(lambda: torch.zeros(3), lambda _: None), "cpu")
    times = device.measure(turns, device.Flush("cpu"), 3, 1.0)
    assert {found.how for found in times.values()} == {"wall"}
    assert all(0 < found.low <= found.median <= found.high < 1000 for found in times.values())


@pytest.mark.parametrize(("forward", "wins"), [(0.5, True), (0.99, False)], ids=["faster", "within the noise"])
def test_another_tile_must_be_faster_and_give_the_same(cuda, monkeypatch, forward, wins):
    table, right = {4: (2048, 4)}, torch.ones(3)
    spent = {(2048, 4): 1.0, (1024, 2): forward, (512, 2): 0.1}

    def launch():
        cuda.work("launch", spent[table[4]])
        return right if table[4] != (512, 2) else right * 1.01  # the fastest is wrong

    monkeypatch.setattr(tune_timed, "DEVICE", "cuda")
    monkeypatch.setattr(tune_timed, "release", lambda: None)
    monkeypatch.setattr(tune_timed, "launches", lambda *args: (launch, launch))
    monkeypatch.setattr(tune_timed.tune, "table_of", lambda op: table)
    tuning = tune_timed.Tuning(["kl_normal"], ["float32"], [(1024, 2), (512, 2)], False, 1)
    tuning.flush = Flush(cuda)
    rows, best = tuning.race("kl_normal", "float32", 4)
    assert best == ((1024, 2) if wins else (2048, 4))
    assert table == {4: (2048, 4)}  # as it was
    assert rows[-1]["tile"] == "512 x 2"
    assert "differs" in rows[-1]["note"]


def test_host_times_contenders_by_turns():
    seen = []
    steps = {name: functools.partial(seen.append, name) for name in ("eager", "fastkl")}
    assert set(host.measure(steps, rounds=2, calls=3)) == set(steps)
    assert seen == ["eager"] * 4 + ["fastkl"] * 4 + (["eager"] * 3 + ["fastkl"] * 3) * 2


def half(number):
    """For the processes of the next test."""
    if number < 0:
        time.sleep(1000)
    if number == 2:
        raise Unsendable("of the compiler", 2)
    return 1 // number


class Unsendable(Exception):
    """An exception that cannot be rebuilt from its message alone, as unpickling does."""

    def __init__(self, what, more):
        super().__init__(what)


def test_work_ahead_is_done_in_other_processes_and_ends_in_time(capsys):
    began = time.monotonic()
    done = dict(workers.ahead(half, [1, 0, 2], jobs=1, seconds=60))
    assert done == {1: "", 0: "ZeroDivisionError: integer division or modulo by zero", 2: "Unsendable: of the compiler"}
    workers.report("cases", iter(done.items()), 4)
    assert capsys.readouterr().out.startswith("1 of 4 cases compiled ahead")
    work = workers.ahead(half, [-1, 3], jobs=2, seconds=600)
    assert next(work) == (3, "")
    work.close()  # must not wait for the sleeping process, nor leave it running
    assert not multiprocessing.active_children()
    assert list(workers.ahead(half, [-1], jobs=1, seconds=1)) == []
    assert not multiprocessing.active_children()
    assert time.monotonic() - began < 500


@pytest.mark.parametrize(("on", "rows"), [("cpu", 0), ("cuda", 4)])
def test_host_time_uses_empty_data_only_if_the_host_would_wait(monkeypatch, on, rows):
    """With empty data nothing is launched on a GPU, and launching is most of the host's time."""
    seen = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("synchronized"))

    def function(x):
        seen.append(len(x))
        return x.sum(1)

    case = Case("", leaves("cpu", (4, 3)), function, function, function)
    found = measure.host_times(case, {"fastkl": function}, on, False)
    assert set(found) == {"fastkl"}
    assert set(seen) - {"synchronized"} == {rows}
    assert ("synchronized" in seen) == (on == "cuda")


def test_a_machine_without_git_has_no_commit(monkeypatch):
    def missing(*args, **settings):
        raise FileNotFoundError("git")

    monkeypatch.setattr(store.subprocess, "run", missing)
    assert store.commit() == ""
    assert store.machine("cpu", [1])["commit"] == ""


def test_the_cache_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(L2_cache_size=50 << 20))
    assert store.cache_bytes() == 50 << 20
