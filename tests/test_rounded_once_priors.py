"""16-bit gradients of a prior's parameters are rounded once, and its KL is in the dtype that it is computed in."""

import pytest
import torch
from test_rounded_once import DTYPES, MIXTURE, D, N, bound, check, in_16_bits, posterior

import fastkl
from fastkl import objectives

from helpers import DEVICE
from prior_helpers import D as LATENT
from prior_helpers import every_prior


def prior_of(mixture):
    prior = fastkl.priors.GaussianMixture(3, D).to(DEVICE)
    prior._parameters.update(mixture)
    return prior


@in_16_bits
@pytest.mark.parametrize("method", ["lower", "upper"])
def test_the_kl_of_a_prior(dtype, method):
    def fused(mu, logvar, **mixture):
        return prior_of(mixture).kl(posterior(mu, logvar), method=method)

    check(fused, lambda **t: bound(method, **t), dtype, mu=(N, D), logvar=(D,), **MIXTURE)


@in_16_bits
def test_the_prior_of_vade(dtype):
    """By draws without noise, which are the means themselves."""
    generator = torch.Generator().manual_seed(1)
    mu = (torch.rand(N, D, generator=generator) + 0.25).to(DEVICE, dtype)
    logvar = torch.full((N, D), -0.5, device=DEVICE, dtype=dtype)
    eps = torch.zeros(1, N, D, device=DEVICE, dtype=dtype)

    def fused(**mixture):
        given = (posterior(mu, logvar), prior_of(mixture), lambda z: z.sum(-1) * 0)
        return objectives.vade(*given, eps=eps).loss

    def formula(logits, means, logvars):
        log_pi = logits.log_softmax(-1)
        of_each = torch.distributions.Normal(means, (logvars / 2).exp())
        log_r = (log_pi + of_each.log_prob(mu.double()[:, None]).sum(-1)).log_softmax(-1)
        q = torch.distributions.Normal(mu.double()[:, None], (logvar.double() / 2).exp()[:, None])
        kl = torch.distributions.kl_divergence(q, of_each).sum(-1)
        return (log_r.exp() * (kl + log_r - log_pi)).sum(-1).mean()

    check(fused, formula, dtype, **MIXTURE)


@every_prior
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *DTYPES], ids=str)
def test_the_kl_is_in_the_dtype_that_it_is_computed_in(make, dtype):
    prior, wide = make().to(DEVICE), torch.float64 if dtype == torch.float64 else torch.float32
    for module in (prior, getattr(prior, "encoder", prior)):  # which a VampPrior only refers to
        module.to(wide)
    q = fastkl.DiagonalNormal(*torch.zeros(2, 5, LATENT, device=DEVICE, dtype=dtype))
    for entropy in ("closed", "sampled"):
        for gradient in ("plain", "stl"):
            found = prior.kl(q, entropy=entropy, gradient=gradient)
            assert found.dtype == wide
