"""torch.distributions.kl_divergence of posteriors, and the names that they share with torch.distributions."""

import pytest
import torch
from torch.distributions import (
    Categorical,
    Independent,
    Laplace,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    kl_divergence,
)

import fastkl

from helpers import DEVICE


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE)


def pair(*shape):
    """A posterior, and the same as torch's."""
    mu, logvar = draw(*shape), draw(*shape, seed=1)
    q = fastkl.DiagonalNormal(mu, logvar)
    return q, Independent(Normal(mu, (0.5 * logvar).exp()), q.event_ndim)


def full(d, seed=2):
    tril = torch.tril(draw(d, d, seed=seed), -1) + torch.diag(draw(d, seed=seed + 1).exp())
    return MultivariateNormal(draw(d, seed=seed + 2), scale_tril=tril)


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)], ids=str)
def test_of_normals(shape):
    q, same = pair(*shape)
    normal = Normal(draw(*shape[1:], seed=5), draw(*shape[1:], seed=6).exp())
    independent = Independent(normal, len(shape) - 1)
    other = fastkl.DiagonalNormal(normal.loc.expand(shape), normal.scale.log().expand(shape), scale="log_std")
    expected, reverse = kl_divergence(same, independent), kl_divergence(independent, same)
    for p in (normal, independent, other):
        torch.testing.assert_close(kl_divergence(q, p), expected)
        torch.testing.assert_close(kl_divergence(p, q), reverse)
    assert (expected - reverse).abs().min() > 1e-3


def test_of_full_covariances():
    q, same = pair(5, 3)
    diagonal = MultivariateNormal(same.base_dist.loc, scale_tril=torch.diag_embed(same.base_dist.scale))
    p = full(3)
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(diagonal, p))
    torch.testing.assert_close(kl_divergence(p, q), kl_divergence(p, diagonal))


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_of_mixtures_by_one_draw(kind):
    """On average the same as by draws of torch's own densities."""
    q, same = pair(2, 3)
    loc, scale = draw(4, 3, seed=3), draw(4, 3, seed=4).exp()
    components = {
        "diagonal": Independent(Normal(loc, scale), 1),
        "full": MultivariateNormal(loc, scale_tril=torch.diag_embed(scale)),
    }[kind]
    mixture = MixtureSameFamily(Categorical(logits=draw(4, seed=5)), components)
    torch.manual_seed(0)
    many = 4000
    found = kl_divergence(fastkl.DiagonalNormal(q.mean.repeat(many, 1), q.logvar.repeat(many, 1)), mixture)
    z = same.sample((many,))
    expected = same.log_prob(z) - mixture.log_prob(z)
    error = (found.view(many, 2).var(0) + expected.var(0)).div(many).sqrt()
    assert ((found.view(many, 2).mean(0) - expected.mean(0)).abs() < 5 * error).all()
    assert (error < 0.2).all()


def test_of_priors():
    q, same = pair(5, 3)
    prior = fastkl.priors.StandardNormal(3).double().to(DEVICE)
    standard = Independent(Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean)), 1)
    torch.testing.assert_close(kl_divergence(q, prior), kl_divergence(same, standard))


def test_what_is_not_known_says_so():
    q, _ = pair(5, 3)
    laplace = Laplace(torch.zeros(3, device=DEVICE), torch.ones(3, device=DEVICE))
    with pytest.raises(NotImplementedError, match="Laplace"):
        kl_divergence(q, Independent(laplace, 1))
    with pytest.raises(NotImplementedError, match="mixture"):
        kl_divergence(q, MixtureSameFamily(Categorical(logits=torch.zeros(3, device=DEVICE)), laplace))
    with pytest.raises(ValueError, match="events of shape"):
        kl_divergence(q, Independent(Normal(torch.zeros(5, 3, device=DEVICE), 1.0), 2))
    with pytest.raises(NotImplementedError):
        kl_divergence(q, laplace)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)], ids=str)
def test_has_the_names_of_a_distribution(shape, packed):
    q, same = pair(*shape)
    if packed:
        q = fastkl.DiagonalNormal.from_packed(torch.cat([q.mean, q.logvar], 1), 1)
    for name in ("mean", "variance", "stddev", "mode", "batch_shape", "event_shape"):
        torch.testing.assert_close(getattr(q, name), getattr(same, name))
    torch.testing.assert_close(q.loc, same.base_dist.loc)
    torch.testing.assert_close(q.scale, same.base_dist.scale)
    torch.testing.assert_close(q.entropy(), same.entropy())
    for sample_shape in ((), (5,), (5, 2)):
        z = q.rsample(sample_shape)
        assert z.shape == q.sample(sample_shape).shape == same.sample(sample_shape).shape
        torch.testing.assert_close(q.log_prob(z), same.log_prob(z))
    assert q.rsample((5, 2), seed=3).equal(q.rsample(num_samples=10, seed=3).view(5, 2, *shape))
    for options in ({"num_samples": 2}, {"eps": torch.zeros_like(q.mean)}):
        with pytest.raises(ValueError, match="sample_shape excludes"):
            q.rsample((5,), **options)
    wide, expected = q.expand((7, *q.batch_shape)), same.expand((7, *same.batch_shape))
    assert (wide.batch_shape, wide.event_shape) == (expected.batch_shape, expected.event_shape)
    torch.testing.assert_close(wide.kl(), q.kl().expand(7, -1))


def test_moves_and_detaches():
    head = draw(4, 6).requires_grad_()
    q = fastkl.DiagonalNormal.from_packed(head, scale="softplus", bounds=(-3.0, 3.0))
    assert q.rsample().requires_grad
    assert not q.sample().requires_grad
    for other, dtype in ((q.detach(), torch.float64), (q.to(torch.float32), torch.float32), (q.to("cpu"), None)):
        assert (other.kind, other.bounds, other.packed_dim) == (q.kind, q.bounds, q.packed_dim)
        assert dtype is None or other.mean.dtype == dtype
    assert not q.detach().kl().requires_grad
    (gradient,) = torch.autograd.grad(q.to(torch.float32).kl().sum(), head)
    assert gradient.dtype == torch.float64
    torch.testing.assert_close(q.to(torch.float32).kl(), q.kl().float())
