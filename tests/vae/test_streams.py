"""One seed given to several ops: each draws noise of its own, the same in every implementation."""

import math

import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops.categorical.gumbel_softmax import draw_choice
from fastkl.ops.mixture.rsample_gmm import rsample_gmm, sample_gmm
from fastkl.ops.normal.rsample_normal import draw_normal
from fastkl.reference import Stream

from helpers import DEVICE, implementation

SEED = 2**62 + 12345
CALLS = 1024  # of Philox, four words each
STREAMS = {name: number for name, number in vars(Stream).items() if name.isupper()}
both = pytest.mark.parametrize("backend", ["torch", "native", "triton"])


def zeros(*shape):
    return torch.zeros(shape, device=DEVICE)


def of_normals(noise):
    """Radius and angle of both pairs of normals of a call: what its words were."""
    pairs = noise.view(CALLS, 2, 2).double()
    return torch.cat([pairs.square().sum(-1), torch.atan2(pairs[..., 1], pairs[..., 0])], 1)


def directions():
    """The gradient of the distance of e_0 from 0 along one direction t is 2 t_0 t."""
    x = zeros(1, 4 * CALLS)
    x[0, 0] = 1.0
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(fastkl.sliced_wasserstein(x, zeros(1, 4 * CALLS), 1, seed=SEED), x)
    return of_normals(gradient)


def relaxed_kl():
    """KL to the component that was chosen, at z = 0, where each is as probable as the others."""
    prior = fastkl.priors.GaussianMixture(4, 4).to(DEVICE)
    means = torch.eye(4, device=DEVICE)
    with torch.no_grad():
        prior.logits.zero_(), prior.means.copy_(means), prior.logvars.zero_()
    q = fastkl.DiagonalNormal(torch.tensor([[1.0, 2.0, 3.0, 4.0]], device=DEVICE).expand(CALLS, 4), zeros(CALLS, 4))
    kl = prior.kl_relaxed(q, zeros(1, CALLS, 4), 0.0, seed=SEED)
    of_each = 0.5 * (q.mean[:, None] - means).square().sum(-1)
    return (kl.unsqueeze(1) - of_each).abs() < 0.1


def draws():
    """Op -> numbers of each call that give its words away, [CALLS, some]."""
    logits, apart, same = zeros(4), 100.0 * torch.eye(4, device=DEVICE), zeros(4, 4)
    prior = fastkl.priors.StandardNormal(4).to(DEVICE)
    _, component = sample_gmm(zeros(64), zeros(64, 1), num_samples=CALLS, seed=SEED)
    return {
        "rsample_normal": of_normals(fastkl.rsample_normal(zeros(CALLS, 4), zeros(CALLS, 4), seed=SEED)),
        "gumbel_softmax": fastkl.gumbel_softmax(zeros(CALLS, 4), seed=SEED),
        "sliced_wasserstein": directions(),
        "a prior": of_normals(prior.sample(CALLS, seed=SEED)),
        "rsample_gmm's choice": rsample_gmm(logits, apart, hard=True, num_samples=CALLS, seed=SEED) > 50,
        "rsample_gmm": of_normals(rsample_gmm(logits, same, num_samples=CALLS, seed=SEED)),
        "sample_gmm's choice": component.unsqueeze(1),
        "sample_gmm": of_normals(sample_gmm(logits, same, num_samples=CALLS, seed=SEED)[0]),
        "kl_relaxed": relaxed_kl(),
    }


@both
def test_no_two_ops_draw_alike(backend):
    with implementation(backend):
        drawn = draws()
    names = [name for name, numbers in drawn.items() for _ in range(numbers.shape[1])]
    numbers = torch.cat([numbers.double() for numbers in drawn.values()], 1)
    correlation = torch.corrcoef(numbers.T).abs()
    worst = {}
    for i, first in enumerate(names):
        for j, second in enumerate(names[:i]):
            if first != second and correlation[i, j] > 5 / math.sqrt(CALLS):
                worst[second, first] = round(correlation[i, j].item(), 3)
    assert worst == {}


@both
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_noise_of_every_stream_is_that_of_the_definition(backend, stream):
    shape, seed = (5, 12), torch.tensor(SEED, device=DEVICE)
    mu, logvar = (zeros(*shape).requires_grad_() for _ in range(2))
    eps, gumbel = reference.normal_noise(seed, shape, stream=stream), reference.gumbel_noise(seed, shape, stream)
    with implementation(backend):
        z = draw_normal(stream, shape, mu, logvar, seed)
        dlogvar = torch.autograd.grad(z.sum(), logvar)[0]
        soft, hard = (draw_choice(stream, mu, 0.7, hard, -1, seed) for hard in (False, True))
        dlogits = torch.autograd.grad(hard[:, 0].sum(), mu)[0]
    torch.testing.assert_close(z, eps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dlogvar, 0.5 * eps, rtol=1e-5, atol=1e-5)
    weights = torch.softmax(gumbel / 0.7, -1)
    torch.testing.assert_close(soft, weights, rtol=1e-5, atol=1e-6)
    assert torch.equal(hard.argmax(-1), weights.argmax(-1))
    expected = weights[:, :1] * (torch.eye(12, device=DEVICE)[0] - weights) / 0.7
    torch.testing.assert_close(dlogits, expected, rtol=1e-5, atol=1e-6)


def test_streams_differ_and_none_is_0():
    assert len(set(STREAMS.values())) == len(STREAMS)
    assert 0 not in STREAMS.values()
