"""The monitors of a run, and their warnings."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import fastkl
from fastkl.vae import progress
from fastkl.vae.parallel import Ranks
from fastkl.vae.settings import Settings
from fastkl.vae.watch import Watch


def test_warnings_name_the_remedy_once(monkeypatch, capsys):
    """A collapsed posterior is reported once, during the run."""
    settings = Settings(warm_up=10, log_every=1)
    watch = Watch(settings, Ranks())
    silent = fastkl.DiagonalNormal(torch.zeros(8, 20), torch.zeros(8, 20))
    said = []
    for step in range(1, 41):
        watch.record(step, silent, None)
        if step % 5 == 0:
            figures = watch.figures()
            assert figures["active_units"] == 0
            assert figures["mutual_information"] == pytest.approx(0, abs=1e-5)  # float32
            assert figures["kl_per_dimension"] == [0.0] * 20
            said += [(step, line) for line in watch.warnings(step, 100, figures, None)]
    (once,) = said
    assert once[0] == 30, "after the warm-up and a fifth of the run"
    assert once[1].startswith("posterior collapse (0 of 20 latent units active, KL 0 nats): free bits")
    late = Watch(Settings(warm_up=95, log_every=1), Ranks())
    assert [len(late.warnings(step, 100, figures, None)) for step in (99, 100)] == [0, 1], "at the end in any case"
    again = Watch(settings, Ranks())
    again.load_state_dict(watch.state_dict())
    again.record(41, silent, None)
    assert again.warnings(41, 100, again.figures(), None) == [], "nor after a resumption"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    run = types.SimpleNamespace(total_steps=100, batch_size=4, step=0)
    with progress.Terminal(run) as display:
        display.monitored(20, {"skipped_steps": 2, **figures}, [once[1]])
        assert display.line(20).count("2 skipped") == 1
    assert f"step 20: {once[1]}" in capsys.readouterr().out


def test_watch_goes_on_where_it_was():
    """A resumed run keeps what its monitors recorded earlier in the epoch."""
    generator = torch.Generator().manual_seed(0)
    batches = [fastkl.DiagonalNormal(*torch.randn(2, 8, 3, generator=generator)) for _ in range(4)]
    settings = Settings(log_every=2)
    whole, first, second = (Watch(settings, Ranks()) for _ in range(3))
    for step, q in enumerate(batches):
        torch.manual_seed(step)
        whole.record(step, q, None)
    for step, q in enumerate(batches):
        torch.manual_seed(step)
        if step == 2:
            second.load_state_dict(first.state_dict())
        (first if step < 2 else second).record(step, q, None)
    assert second.figures() == whole.figures()


def test_what_is_restored_lies_where_the_next_steps_look():
    settings = Settings(log_every=1)
    watch, again = Watch(settings, Ranks()), Watch(settings, Ranks())
    watch.record(1, fastkl.DiagonalNormal(torch.randn(8, 3), torch.zeros(8, 3)), None)
    again.load_state_dict(watch.state_dict(), device=torch.device("meta"))
    states = [monitor.state for monitor in again.monitors.values() if monitor.state is not None]
    assert states
    assert {value.device.type for state in states for value in state.values} == {"meta"}
