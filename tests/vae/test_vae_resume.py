"""A run that is killed, interrupted or out of disk space resumes bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys

import pytest

from fastkl.vae import checkpoint, loop
from fastkl.vae.stop import Stop

from vae_helpers import BARE, SMALL, assert_same_state, command, environment, posix, run, train

# Torch is imported once; every run is a forked process of its own, which dies by a true kill -9.
KILLER = """
import os, signal, sys, time
import fastkl.vae.loop, fastkl.vae.cli, fastkl.vae.data, fastkl.vae.checkpoint
import torch._dynamo  # what an optimiser imports at its first step
import sklearn.datasets

def die(): os.kill(os.getpid(), signal.SIGKILL)

def child(options, where, at):
    from fastkl.vae import checkpoint, loop
    if where == "step":  # gradients are there, the weights are about to change
        batch = loop.batch
        def dying_batch(run):
            if run.step == at: die()
            return batch(run)
        loop.batch = dying_batch
    elif where in ("fsync", "replace"):  # in the middle of the at-th checkpoint: content written, name not yet changed
        real, calls = getattr(os, where), [0]
        def dying(*arguments):
            calls[0] += 1
            if calls[0] == at: die()
            return real(*arguments)
        setattr(os, where, dying)
    os._exit(fastkl.vae.cli.main(options))

def launch(options, where, at):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        child(options, where, at)
    if where == "time":
        time.sleep(at / 1000)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

folder, whole, *rest = sys.argv[1:]
split = rest.index("--")
kills, options = rest[:split], rest[split + 1:]
print("exit", launch(["train", "--out", whole, *options], "nowhere", 0))
for kill in kills:
    where, at = kill.split("=")
    resume = ["--resume"] if os.path.exists(os.path.join(folder, "settings.json")) else []  # killed as it began
    print("exit", launch(["train", "--out", folder, *resume, *options], where, int(at)))
print("exit", launch(["train", "--out", folder, "--resume", *options], "nowhere", 0))
"""


@posix
def test_killed_runs_go_on_bit_for_bit(tmp_path):
    chance = random.Random()
    steps = sorted(chance.sample(range(1, 60), 3))
    # Besides those at steps: one before the settings have their name, one before the first checkpoint has it (two files
    # with their folder, twice synchronised each, come first), one while a later one is renamed, and one from outside,
    # at whatever the process is doing then.
    kills = ["fsync=1", "fsync=5", f"step={steps[0]}", "replace=4", f"step={steps[1]}",
             f"time={chance.randrange(50, 700)}", f"step={steps[2]}"]  # fmt: skip
    options = ["--hidden", "16", "--latent", "3", "--steps", "60", "--checkpoint-every", "7", "--log-every", "5", *BARE]
    paths = [str(tmp_path / "killed"), str(tmp_path / "whole")]
    done = run([sys.executable, "-c", KILLER, *paths, *kills, "--", *options])
    exits = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("exit")]
    assert exits[0] == exits[-1] == 0, done.stdout + done.stderr
    # The kill from outside may come too late; a step that the run has passed is not reached again.
    assert exits.count(-signal.SIGKILL) >= 3, (kills, exits)
    assert_same_state(tmp_path / "killed", tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.tmp")), "a temporary file of a killed process was left behind"


HANGUP = [pytest.param(signal.SIGHUP, id="SIGHUP")] if hasattr(signal, "SIGHUP") else []


@pytest.fixture
def _restore_sighup():
    """Undo nohup: tests started by it inherit an ignored SIGHUP."""
    before = [(param.values[0], signal.signal(param.values[0], signal.SIG_DFL)) for param in HANGUP]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.usefixtures("_restore_sighup")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, *HANGUP])
def test_interrupt_leaves_a_usable_checkpoint(tmp_path, capsys, monkeypatch, number):
    real = loop.batch

    def interrupted(run):
        if run.step == 5:
            signal.raise_signal(number)  # in the middle of the sixth step
        return real(run)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "batch", interrupted)
        assert train(tmp_path / "run", *BARE) == 130
    assert "continue with: fastkl train --resume" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "run")["step"] == 6, "the step under way is finished, and none after it begins"
    assert train(tmp_path / "run", "--resume", *BARE) == 0, "the signal is no wish of this run"
    assert train(tmp_path / "whole", *BARE) == 0
    assert_same_state(tmp_path / "run", tmp_path / "whole")


@posix
def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
        assert not stop.asked
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@posix
@pytest.mark.usefixtures("_restore_sighup")
def test_a_closed_terminal_leaves_a_checkpoint(tmp_path):
    """The terminal is gone when the signal arrives, so any later print would fail."""
    pty, fcntl, termios = (pytest.importorskip(name) for name in ("pty", "fcntl", "termios"))
    near, far = pty.openpty()
    options = ["--hidden", "16", "--steps", "1000000", "--checkpoint-every", "1000000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command(*options, *BARE), env=environment(), stdin=far, stdout=far, stderr=far, start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(far)
    seen = b""
    while b"1000000" not in seen or b"ELBO" not in seen:  # the bar runs
        seen += os.read(near, 4096)
    os.close(near)
    assert process.wait(60) == 130
    assert checkpoint.load(tmp_path / "run")["step"] > 0


def test_a_closed_pipe_does_not_end_a_run(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert train(tmp_path, *BARE) == 0
    assert checkpoint.load(tmp_path)["step"] == 12


def test_second_interrupt_is_immediate(tmp_path, monkeypatch):
    def impatient(run):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "batch", impatient)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores the signal
    try:
        assert train(tmp_path, *BARE) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert not (tmp_path / checkpoint.NAME).exists()


def test_resuming_twice_adds_nothing(tmp_path):
    assert train(tmp_path, *BARE) == 0
    before = (tmp_path / checkpoint.NAME).read_bytes()
    assert train(tmp_path, *BARE, "--resume") == 0
    assert (tmp_path / checkpoint.NAME).read_bytes() == before


def test_tensorboard_has_no_step_twice(tmp_path):
    """A run dies after steps that its checkpoint does not hold; their events must not appear twice."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    kill = KILLER.replace('print("exit", launch(["train", "--out", whole, *options], "nowhere", 0))\n', "")
    options = ["--no-report", *SMALL, "--log-every", "1", "--checkpoint-every", "5"]
    done = run([sys.executable, "-c", kill, str(tmp_path / "run"), "-", "step=9", "--", *options])
    assert f"exit {-signal.SIGKILL}" in done.stdout, done.stderr
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/elbo")] == list(range(1, 13))
    assert {"train/kl", "train/data_per_second", "test/elbo"} <= set(events.Tags()["scalars"])
    assert {"reconstruction", "sample"} <= {tag.split("/")[0] for tag in events.Tags()["images"]}
