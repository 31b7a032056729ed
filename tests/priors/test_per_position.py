"""PerPosition: one prior for the channels at every position, compared with a loop over the positions."""

import pytest
import torch

import fastkl
from fastkl import objectives, priors

from helpers import DEVICE
from prior_helpers import MAKE, D, K, every_prior, mixture

N, H, W = 3, 2, 4


def latent(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, H, W, dtype=torch.float64, generator=generator).to(DEVICE)


@every_prior
def test_every_position_counts_once(make):
    torch.manual_seed(0)
    prior = make().to(DEVICE)
    whole, z, logvar = priors.PerPosition(prior, (H, W)), latent(1).float(), latent(2).float()
    q = fastkl.DiagonalNormal(z, logvar)
    places = [(i, j) for i in range(H) for j in range(W)]
    torch.testing.assert_close(whole.log_prob(z.flatten(1)), sum(prior.log_prob(z[:, :, i, j]) for i, j in places))
    kl = whole.kl(q, num_samples=2, seed=1)
    assert kl.shape == (N,)
    if "upper" in prior.methods:
        each = (fastkl.DiagonalNormal(z[:, :, i, j], logvar[:, :, i, j]) for i, j in places)
        expected = sum(prior.kl(one, method="upper") for one in each)
        torch.testing.assert_close(whole.kl(q, method="upper"), expected)
    for draw, own in ((whole.sample, prior.sample), (whole.rsample, prior.rsample)):
        rows = own(5 * H * W, seed=3)
        torch.testing.assert_close(draw(5, seed=3).view(5, D, H, W), rows.view(5, H, W, D).permute(0, 3, 1, 2))
        assert draw((2, 5), seed=3).shape == (2, 5, D * H * W)


def test_objectives_and_fits_take_it():
    q, whole = fastkl.DiagonalNormal(latent(1), latent(2)), priors.PerPosition(mixture(), (H, W))
    for method in ("mc", "upper", "relaxed"):
        loss = objectives.elbo(q, whole, lambda z: 0 * z.flatten(-3).sum(-1), method=method)
        assert loss.terms["kl"].isfinite()
    loss.loss.backward()
    assert all(parameter.grad is not None for parameter in whole.parameters())
    own = mixture()
    own.fit(latent(1).permute(0, 2, 3, 1), seed=0)
    whole.fit(latent(1).flatten(1), seed=0)
    assert all(map(torch.equal, own.parameters(), whole.parameters()))
    whole.fit(q, seed=0)
    assert len(whole.prior.logits) == K


def test_what_does_not_fit_is_named():
    whole = priors.PerPosition(MAKE["diag"]().to(DEVICE), (H, W))
    q = fastkl.DiagonalNormal(*torch.zeros(2, 2, D, H, W + 1, device=DEVICE))
    for call, error, message in [
        (lambda: whole.kl(q), ValueError, "q has events of shape .* but the prior has 24"),
        (
            lambda: whole.log_prob(torch.zeros(2, D, device=DEVICE)),
            ValueError,
            r"z must be \(\*batch, 24\), channels at",
        ),
        (lambda: priors.PerPosition(whole, (2, 0)), ValueError, "shape must be at least 1, got 0"),
        (lambda: priors.PerPosition("gmm", 2), TypeError, "prior must be one of fastkl.priors, got str"),
    ]:
        with pytest.raises(error, match=message):
            call()
