"""event_ndim means the same in every op: None is one value per datum, 0 one per element."""

import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

import fastkl

from helpers import DEVICE, implementation, leaf

BOUNDS = (-1.0, 0.5)


def _draw(*shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [leaf(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def _normal(mu, logvar):
    return Normal(mu, (0.5 * logvar).exp())


def _kl(mu, logvar, *prior):
    return kl_divergence(_normal(mu, logvar), _normal(*(prior or (torch.zeros_like(mu), torch.zeros_like(mu)))))


def _wasserstein2(mu, logvar):
    return mu.square() + ((0.5 * logvar).exp() - 1).square()


def _bernoulli(x, logits):
    return Bernoulli(logits=logits, validate_args=False).log_prob(x)


# name -> (op, its terms element by element, written apart from fastkl, how many tensors it takes)
OPS = {
    "kl_normal": (fastkl.kl_normal, _kl, 2),
    "kl_normal, prior": (fastkl.kl_normal, _kl, 4),
    "kl_normal, bounds": (
        lambda m, v, **s: fastkl.kl_normal(m, v, bounds=BOUNDS, **s),
        lambda m, v: _kl(m, v.clamp(*BOUNDS)),
        2,
    ),
    "rsample_kl": (lambda *t, **s: fastkl.rsample_kl(*t, seed=1, **s)[1], _kl, 2),
    "rsample_kl, prior": (lambda *t, **s: fastkl.rsample_kl(*t, seed=1, **s)[1], _kl, 4),
    "wasserstein2_normal": (fastkl.wasserstein2_normal, _wasserstein2, 2),
    "normal_log_prob": (fastkl.normal_log_prob, lambda x, m, v: _normal(m, v).log_prob(x), 3),
    "bernoulli_log_prob": (fastkl.bernoulli_log_prob, _bernoulli, 2),
    "DiagonalNormal.kl": (lambda *t, **s: fastkl.DiagonalNormal(*t, **s).kl(), _kl, 2),
    "DiagonalNormal.rsample_kl": (lambda *t, **s: fastkl.DiagonalNormal(*t, **s).rsample_kl()[1], _kl, 2),
}
SHAPES = [(5,), (3, 4), (2, 3, 4), (2, 3, 2, 5)]
BACKENDS = [("torch", torch.float64), ("native", torch.float32), ("triton", torch.float32)]


def _summed(terms, event_ndim):
    if event_ndim is None:
        event_ndim = max(1, terms.dim() - 1)
    return terms.sum(tuple(range(terms.dim() - event_ndim, terms.dim()))) if event_ndim else terms


@pytest.mark.parametrize("event_ndim", [None, 0])
@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=[name for name, _ in BACKENDS])
@pytest.mark.parametrize("name", OPS)
def test_one_value_per_datum_or_per_element(name, backend, dtype, event_ndim):
    op, terms, count = OPS[name]
    for shape in SHAPES:
        tensors = _draw(*[shape] * count, dtype=dtype)
        wide = [leaf(tensor.detach().cpu().double()) for tensor in tensors]
        with implementation(backend):
            value = op(*tensors) if event_ndim is None else op(*tensors, event_ndim=event_ndim)
            gradients = torch.autograd.grad(value.sin().sum(), tensors)
        expected = _summed(terms(*wide), event_ndim)
        assert value.shape == expected.shape
        torch.testing.assert_close(value.cpu().double(), expected, rtol=2e-5, atol=2e-5)
        for got, want in zip(gradients, torch.autograd.grad(expected.sin().sum(), wide)):
            torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)


def test_kl_normal_per_dim_latent_shape():
    for shape in SHAPES:
        mu, logvar = _draw(shape, shape)
        terms = _kl(mu, logvar)
        expected = terms.mean(0) if len(shape) > 1 else terms
        torch.testing.assert_close(fastkl.kl_normal_per_dim(mu, logvar), expected)
    with pytest.raises(ValueError, match="event_ndim must be at least 1, got 0: there would be no latent dimension"):
        fastkl.kl_normal_per_dim(mu, logvar, event_ndim=0)


def test_a_number_is_broadcast_element_by_element():
    (logvar,) = _draw((3, 4))
    assert fastkl.kl_normal(0.0, logvar, 1.0, event_ndim=0).shape == (3, 4)
    assert fastkl.normal_log_prob(logvar, 0.0, 0.0, event_ndim=0).shape == (3, 4)
    assert fastkl.kl_normal(logvar[0, 0], logvar[0, 0], event_ndim=0).shape == ()


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=[name for name, _ in BACKENDS])
def test_packed_head_and_shared_prior_gradients(backend, dtype):
    head, prior_mu, prior_logvar = _draw((3, 4, 2), (1, 2, 1), (2,), dtype=dtype)
    tensors = [head, prior_mu, prior_logvar]
    wide = [leaf(tensor.detach().cpu().double()) for tensor in tensors]
    expected = _kl(*wide[0].chunk(2, 1), *wide[1:])
    q, prior = (
        fastkl.DiagonalNormal.from_packed(head, event_ndim=0, bounds=(-9, 9)),
        fastkl.DiagonalNormal(prior_mu, prior_logvar, event_ndim=0),
    )
    with implementation(backend):
        for value in (q.kl(prior), q.rsample_kl(prior, seed=1)[1]):
            gradients = torch.autograd.grad(value.sin().sum(), tensors)
            torch.testing.assert_close(value.cpu().double(), expected, rtol=2e-5, atol=2e-5)
            found = torch.autograd.grad(expected.sin().sum(), wide, retain_graph=True)
            for got, want in zip(gradients, found):
                torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-4)


def test_samples_and_noise_are_the_same_for_every_event_ndim():
    mu, logvar = _draw((3, 4), (1, 4), dtype=torch.float32)
    eps = torch.randn(2, 3, 4, device=DEVICE)
    for noise in ({"seed": 3}, {"eps": eps}):
        draws = [fastkl.rsample_kl(mu, logvar, num_samples=2, event_ndim=n, **noise)[0] for n in (None, 1, 0)]
        assert all(torch.equal(draw, draws[0]) for draw in draws)
        assert draws[0].shape == eps.shape
    with pytest.raises(ValueError, match=r"eps must have the shape"):
        fastkl.rsample_kl(mu, logvar, num_samples=2, event_ndim=0, eps=eps[..., :3])


def test_a_posterior_of_scalars_has_every_method():
    mu, logvar = _draw((5,), (5,))
    q, expected = fastkl.DiagonalNormal(mu, logvar, event_ndim=0), _normal(mu, logvar)
    torch.testing.assert_close(q.entropy(), expected.entropy())
    torch.testing.assert_close(q.log_prob(q.mean), expected.log_prob(mu))
    kl = kl_divergence(expected, Normal(0.0, 1.0))
    for prior in (fastkl.priors.StandardNormal(1), fastkl.priors.LearnedNormal(1)):
        torch.testing.assert_close(prior.to(mu).kl(q), kl)
    loss = fastkl.objectives.elbo(q, None, lambda z: -z.square())
    torch.testing.assert_close(loss.terms["kl"], kl.mean())
    torch.testing.assert_close(fastkl.remedies.free_bits(q, 0.3, per="dimension"), kl.clamp(min=0.3))
    assert q.vectors()[1].shape == (5, 1)


def test_an_elbo_of_images_has_one_value_per_datum_throughout():
    x, mu, logvar = _draw((2, 1, 4, 4), (2, 3, 2, 2), (2, 3, 2, 2))
    elbo = fastkl.normal_log_prob(x, 0.0, 0.0) - fastkl.kl_normal(mu, logvar)
    assert elbo.shape == (2,)


def test_event_ndim_none_and_0_are_one_graph_when_compiled():
    torch._dynamo.reset()
    for settings in ({}, {"event_ndim": 0}):
        tensors = _draw((3, 2, 4), (3, 2, 4), dtype=torch.float32)
        compiled = torch.compile(lambda m, v, s=settings: fastkl.kl_normal(m, v, **s), backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*tensors), fastkl.kl_normal(*tensors, **settings))
