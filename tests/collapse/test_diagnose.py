"""Norms of gradients by the part of a model, and what is said of figures that have gone wrong."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastkl import monitors

from helpers import DEVICE


def model():
    whole = nn.Module()
    whole.encoder, whole.decoder, whole.silent = nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(1, 1)
    whole.scale, whole.shape = nn.Parameter(torch.ones(2)), nn.Identity()
    whole.to(DEVICE)
    (whole.decoder(whole.encoder(torch.ones(4, 2, device=DEVICE)) ** 2) * whole.scale).sum().backward()
    return whole


def test_gradient_norms_of_parts_and_total():
    whole = model()
    norms = monitors.gradient_norms(whole)
    assert list(norms) == ["encoder", "decoder", "silent", "own", "total"]
    for name, part in (("encoder", whole.encoder), ("decoder", whole.decoder)):
        wanted = torch.cat([p.grad.flatten() for p in part.parameters()]).norm()
        torch.testing.assert_close(norms[name], wanted)
    assert norms["silent"] == 0
    torch.testing.assert_close(norms["own"], whole.scale.grad.norm())
    torch.testing.assert_close(norms["total"] ** 2, sum(norms[name] ** 2 for name in ("encoder", "decoder", "own")))
    parts = {"a": whole.encoder.parameters(), "b": [whole.encoder.weight]}  # which is counted once in the total
    named = monitors.gradient_norms(parts)
    torch.testing.assert_close(named["total"], norms["encoder"])
    torch.testing.assert_close(named["b"], whole.encoder.weight.grad.norm())


def test_the_norm_of_a_half_precision_gradient_is_not_rounded_to_it():
    for dtype, value in ((torch.float16, 6e4), (torch.bfloat16, 1.0)):
        weight = torch.zeros(101, dtype=dtype)
        weight.grad = torch.full_like(weight, value)
        wanted = weight.grad[0].item() * math.sqrt(101)
        assert monitors.gradient_norms({"all": [weight]})["total"].item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.filterwarnings("error")  # of a tensor with a gradient that becomes a number
@pytest.mark.parametrize(
    ("figures", "lines"),
    [
        ({}, []),
        ({"kl": 5.0, "active_units": 3, "latent_units": 20, "used_components": 3, "components": 10, "loss": 1.0}, []),
        ({"kl": torch.tensor(0.09, requires_grad=True)}, [("posterior collapse (KL 0.09 nats)", "free bits")]),
        ({"kl": 9.0, "active_units": 2, "latent_units": 20}, [("2 of 20 latent units active)", "warm-up")]),
        ({"kl": 0.0, "active_units": 0, "latent_units": 2}, [("0 of 2 latent units active, KL 0 nats", "decoder")]),
        ({"used_components": 2, "components": 10}, [("mixture collapse (2 of 10", "temperature")]),
        ({"used_components": 1, "components": 2}, [("mixture collapse (1 of 2", "warm-up")]),
        ({"used_components": 1, "components": 1, "effective_sample_size": 1.0, "samples": 1}, []),
        ({"effective_sample_size": 1.4, "samples": 10}, [("1.4 of 10", "ELBO")]),
        ({"effective_sample_size": 1.46, "samples": 10}, []),
        ({"loss": math.nan, "kl": math.inf, "gradient_norm": torch.tensor(1.0)}, [("(kl, loss)", "learning rate")]),
    ],
)  # fmt: skip
def test_diagnoses_name_what_is_wrong_and_a_remedy(figures, lines):
    found = monitors.diagnose(**figures)
    assert len(found) == len(lines)
    for line, parts in zip(found, lines):
        assert all(part in line for part in parts), line
        assert "\n" not in line


def test_parts_that_cannot_be_named_are_refused():
    with pytest.raises(TypeError, match="a module or a mapping"):
        monitors.gradient_norms([torch.zeros(1)])
    with pytest.raises(ValueError, match='called "total"'):
        monitors.gradient_norms({"total": []})
