"""Monitors: the figures of a stream equal those of all data at once, however it is split."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions

import fastkl
from fastkl import monitors

from helpers import DEVICE
from prior_helpers import mixture


def posteriors(count=20, event=(3,), dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    mu, logvar = (torch.randn(count, *event, generator=generator, dtype=torch.float64) for _ in range(2))
    return mu.to(DEVICE, dtype), logvar.to(DEVICE, dtype)


def log_weights():
    return posteriors()[0].view(5, 12)


PRIOR = mixture()
LOG_R = PRIOR.responsibilities(posteriors()[0]).detach()
# name -> (a monitor, how it is given some of 12 data, the figure of all of them at once)
MONITORS = {
    "active units": (
        monitors.ActiveUnits,
        lambda monitor, rows: monitor.update(fastkl.DiagonalNormal(*(t[rows] for t in posteriors(12)))),
        lambda: posteriors(12)[0].var(0),
    ),
    "active units, means": (
        monitors.ActiveUnits,
        lambda monitor, rows: monitor.update(posteriors(12, (2, 2))[0][rows]),
        lambda: posteriors(12, (2, 2))[0].var(0),
    ),
    "kl per dimension": (
        monitors.KLPerDimension,
        lambda monitor, rows: monitor.update(fastkl.DiagonalNormal(*(t[rows] for t in posteriors(12)))),
        lambda: fastkl.kl_normal_per_dim(*posteriors(12)),
    ),
    "kl per dimension, means": (
        monitors.KLPerDimension,
        lambda monitor, rows: monitor.update(
            fastkl.kl_normal_per_dim(*(t[rows] for t in posteriors(12))), count=len(posteriors(12)[0][rows])
        ),
        lambda: fastkl.kl_normal_per_dim(*posteriors(12)),
    ),
    "mutual information": (  # of posteriors so far apart that every draw tells its datum
        monitors.MutualInformation,
        lambda monitor, rows: monitor.update(*(fastkl.DiagonalNormal(m, 0 * m) for m in (_far()[rows], _far()))),
        lambda: torch.tensor(math.log(12), dtype=torch.float64, device=DEVICE),
    ),
    "component usage": (
        monitors.ComponentUsage,
        lambda monitor, rows: monitor.update(LOG_R[:12][rows]),
        lambda: PRIOR.usage(posteriors()[0][:12]),
    ),
    "component usage, moments": (
        monitors.ComponentUsage,
        lambda monitor, rows: monitor.update(
            fastkl.gmm_moments(posteriors()[0][:12][rows], **PRIOR.mixture()._asdict())
        ),
        lambda: PRIOR.usage(posteriors()[0][:12]),
    ),
    "effective sample size": (
        monitors.EffectiveSampleSize,
        lambda monitor, rows: monitor.update(log_weights().t()[rows], dim=1),
        lambda: fastkl.effective_sample_size(log_weights()).mean(),
    ),
}
every = pytest.mark.parametrize("name", MONITORS)


def _far():
    return 1e3 * torch.arange(12, dtype=torch.float64, device=DEVICE).unsqueeze(1)


def same(found, wanted):
    torch.testing.assert_close(
        list(found) if isinstance(found, tuple) else found, list(wanted) if isinstance(wanted, tuple) else wanted
    )


@every
def test_batches_are_the_whole(name):
    make, update, whole = MONITORS[name]
    monitor = make()
    for rows in (slice(5), slice(5, 6), slice(6, 6), slice(6, None)):  # a single datum, none
        update(monitor, rows)
    same(monitor.compute(), whole())
    monitor.reset()
    update(monitor, slice(0))
    with pytest.raises(ValueError, match=r"compute needs an update"):
        monitor.compute()
    update(monitor, slice(None))
    same(monitor.compute(), whole())


@every
def test_monitors_merge(name):
    make, update, whole = MONITORS[name]
    one, other, empty = make(), make(), make()
    update(one, slice(5))
    update(other, slice(5, None))
    for each in (other, empty):
        one.merge(each)
    same(one.compute(), whole())
    empty.merge(one)
    same(empty.compute(), whole())
    with pytest.raises(TypeError, match=f"other must be another {make.__name__}"):
        one.merge(None)


def test_variances_survive_means_far_from_zero():
    """With sums of squares, a variance of 1 would be lost next to a square of 1e16."""
    mu = posteriors(64)[0] + 1e8
    monitor = monitors.ActiveUnits()
    for part in mu.split(7):
        monitor.update(part)
    # The mean itself is rounded, to 1e-8.
    torch.testing.assert_close(monitor.compute(), mu.var(0), rtol=1e-7, atol=0)


def test_units_are_active_above_the_threshold():
    mu = torch.tensor([[0.0, 0.2], [0.1, 0.0]], dtype=torch.float64)  # variances 0.005 and 0.02
    for threshold, active in ((0.01, [False, True]), (0.02 - 1e-12, [False, True]), (0.03, [False, False])):
        monitor = monitors.ActiveUnits(threshold)
        monitor.update(mu)
        assert monitor.active().tolist() == active
        assert monitor.count() == sum(active)


def test_mutual_information_is_the_difference_of_two_kls():
    """E KL(q(z|x) || p) - KL(q(z) || p), here by quadrature in one dimension; in batches of their own at most ln M."""
    mu, logvar = torch.tensor([[-1.0], [0.3], [0.5], [2.0]]), torch.tensor([[-1.0], [0.0], [-3.0], [0.5]])
    z = torch.linspace(-12, 12, 24_001, dtype=torch.float64)
    each = distributions.Normal(mu.double(), (logvar.double() / 2).exp()).log_prob(z)
    average = each.logsumexp(0) - math.log(4)
    prior = distributions.Normal(0.0, 1.0).log_prob(z)
    kl = (each.exp() * (each - prior)).sum(1) * 0.001
    exact = kl.mean() - (average.exp() * (average - prior)).sum() * 0.001
    q = fastkl.DiagonalNormal(mu.to(DEVICE), logvar.to(DEVICE))
    monitor = monitors.MutualInformation()
    monitor.update(q, num_samples=20_000, seed=0)
    assert monitor.compute().item() == pytest.approx(exact.item(), abs=0.01)
    alike = fastkl.DiagonalNormal(torch.ones(6, 2, 2), torch.zeros(6, 2, 2))
    monitor.reset()
    monitor.update(alike)
    assert abs(monitor.compute().item()) < 1e-6


def test_bfloat16_posteriors_are_drawn_from_in_float32():
    """Two neighbours among the bfloat16 numbers, a spacing apart: rounded, a draw would be one of them, or a third."""
    mu = torch.tensor([[3.0], [3.015625]], device=DEVICE)
    figures = []
    for dtype in (torch.bfloat16, torch.float64):
        monitor = monitors.MutualInformation()
        q = fastkl.DiagonalNormal(mu.to(dtype), torch.full_like(mu, -9.25, dtype=dtype))
        monitor.update(q, num_samples=2000, seed=1)
        figures.append(monitor.compute().item())
    assert figures[0] == pytest.approx(figures[1], abs=0.001)


def test_effective_sample_fraction_uses_each_updates_samples():
    monitor = monitors.EffectiveSampleSize()
    monitor.update(torch.zeros(2, 3))
    monitor.update(torch.zeros(3, 8), dim=1)
    assert (monitor.compute().item(), monitor.fraction().item()) == (5.0, 1.0)


Q = fastkl.DiagonalNormal(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("monitor", "arguments", "options", "error", "message"),
    [
        (monitors.ActiveUnits, ([1.0],), {}, TypeError, "q must be a fastkl.DiagonalNormal"),
        (monitors.ActiveUnits, (torch.zeros(3),), {}, ValueError, "or its means"),
        (monitors.KLPerDimension, (torch.zeros(3),), {}, ValueError, "needs count"),
        (monitors.KLPerDimension, (Q,), {"count": 2}, ValueError, "only for q given as means"),
        (monitors.MutualInformation, (fastkl.DiagonalNormal(Q.mean[0], Q.mean[0]),), {}, ValueError, "batch dimension"),
        (monitors.MutualInformation, (Q, fastkl.DiagonalNormal(*[torch.zeros(2, 4)] * 2)), {}, ValueError, "of 3 dim"),
        (monitors.ComponentUsage, (torch.zeros(()),), {}, ValueError, "responsibilities must be"),
        (monitors.EffectiveSampleSize, ([0.0],), {}, TypeError, "log_w"),
    ],
)
def test_bad_updates_are_refused(monitor, arguments, options, error, message):
    monitor = monitor()
    with pytest.raises(error, match=message):
        monitor.update(*arguments, **options)


def test_other_bad_input_is_refused():
    monitor = monitors.ActiveUnits()
    monitor.update(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"expected values of shape .*3.* as before"):
        monitor.update(torch.zeros(2, 4))
    with pytest.raises(TypeError, match="group must be"):
        monitors.ActiveUnits(group="world")
    with pytest.raises(ValueError, match="threshold must be"):
        monitors.ActiveUnits(-1.0)
