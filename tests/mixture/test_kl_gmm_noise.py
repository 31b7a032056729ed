"""kl_gmm with the caller's own noise in place of the seed's."""

import pytest
import torch
from torch import distributions as td

import fastkl
from fastkl import reference

from gmm_helpers import BACKENDS, draw, triangles
from helpers import DEVICE, implementation, leaf

N, K, D, L = 6, 4, 3, 5
SEED = torch.tensor(3, device=DEVICE)


def _inputs(covariance="diagonal", dtype=torch.float64):
    q = [draw(N, D, dtype=dtype), 0.5 * draw(N, D, seed=1, dtype=dtype)]
    own = (N,) if covariance == "of each datum" else ()
    mixture = [draw(*own, K, seed=2, dtype=dtype), 2 * draw(*own, K, D, seed=3, dtype=dtype)]
    if covariance == "full":
        return [leaf(t) for t in (*q, *mixture, triangles(K, size=D).to(dtype))]
    return [leaf(t) for t in (*q, *mixture, 0.5 * draw(K, D, seed=4, dtype=dtype))]


def _kl(inputs, covariance, **settings):
    *others, spread = inputs
    spread = {"scale_tril": spread} if covariance == "full" else {"logvars": spread}
    return fastkl.kl_gmm(*others, **spread, num_samples=L, **settings)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gradient", ["plain", "stl"])
@pytest.mark.parametrize("entropy", ["closed", "sampled"])
@pytest.mark.parametrize("covariance", ["diagonal", "full", "of each datum"])
def test_the_seeds_own_noise_gives_the_seeds_value_and_gradients(backend, covariance, entropy, gradient):
    inputs = _inputs(covariance)
    settings = {"entropy": entropy, "gradient": gradient}
    with implementation(backend):
        results = []
        for noise in ({"seed": SEED}, {"eps": reference.normal_noise(SEED, (N, D), L).double()}):
            value = _kl(inputs, covariance, **settings, **noise)
            results.append([value, *torch.autograd.grad(value.sin().sum(), inputs)])
    for found, expected in zip(*results):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("entropy", ["closed", "sampled"])
def test_value_and_gradients_are_those_of_torch_distributions(entropy):
    inputs, eps = _inputs(), leaf(draw(L, N, D, seed=9))
    mu, logvar, logits, means, logvars = inputs
    components = td.Independent(td.Normal(means, (logvars / 2).exp()), 1)
    q = td.Independent(td.Normal(mu, (logvar / 2).exp()), 1)
    z = mu + (logvar / 2).exp() * eps
    log_q = -q.entropy() if entropy == "closed" else q.log_prob(z).mean(0)
    exact = log_q - td.MixtureSameFamily(td.Categorical(logits=logits), components).log_prob(z).mean(0)
    found = _kl(inputs, "diagonal", entropy=entropy, eps=eps)
    torch.testing.assert_close(found, exact)
    wanted = [*inputs, eps]
    for one, other in zip(*(torch.autograd.grad(value.sin().sum(), wanted) for value in (found, exact))):
        torch.testing.assert_close(one, other)


def test_stl_omits_the_gradient_at_a_fixed_sample():
    """For q = p the gradient is 0 for every sample."""
    mu, logvar = leaf(draw(1, D)), leaf(draw(1, D, seed=1))
    settings = {"eps": draw(L, 1, D, seed=9), "num_samples": L, "gradient": "stl"}
    kl = fastkl.kl_gmm(mu, logvar, torch.zeros(1, device=DEVICE), mu.detach(), logvar.detach(), **settings)
    for gradient in torch.autograd.grad(kl.sum(), [mu, logvar]):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_noise_that_samples_or_data_share_is_broadcast():
    inputs = [t.detach() for t in _inputs()]
    for shape in ((N, D), (L, 1, D), (1, N, D), (D,)):
        eps = draw(*shape, seed=9)
        torch.testing.assert_close(
            _kl(inputs, "diagonal", eps=eps), _kl(inputs, "diagonal", eps=eps.expand(L, N, D).contiguous())
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_arguments_are_computed_in_float32(dtype):
    narrow = _inputs(dtype=dtype)
    eps = leaf(draw(L, N, D, seed=9, dtype=torch.float32).to(dtype))
    wide, wide_eps = [leaf(t.detach().double()) for t in narrow], leaf(eps.detach().double())
    found, exact = _kl(narrow, "diagonal", eps=eps), _kl(wide, "diagonal", eps=wide_eps)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(found.sum(), [*narrow, eps])
    for one, other in zip(gradients, torch.autograd.grad(exact.sum(), [*wide, wide_eps])):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=1e-2, atol=1e-3)


def test_it_compiles_and_its_gradients_have_gradients():
    torch._dynamo.reset()
    inputs, eps = _inputs(), draw(L, N, D, seed=9)
    compiled = torch.compile(lambda *t: _kl(t, "diagonal", eps=eps), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), _kl(inputs, "diagonal", eps=eps))
    small = [leaf(t.detach()[:1, :2]) for t in inputs[:2]] + [
        inputs[2].detach(),
        *(t.detach()[:, :2] for t in inputs[3:]),
    ]
    noise = leaf(draw(1, 1, 2, seed=9))
    assert torch.autograd.gradgradcheck(lambda e, *t: fastkl.kl_gmm(*t, eps=e), [noise, *small])


def test_an_empty_batch_has_no_values():
    inputs = [t.detach() for t in _inputs()]
    assert _kl([t[:0] for t in inputs[:2]] + inputs[2:], "diagonal", eps=draw(L, 0, D)).shape == (0,)


def test_bad_noise_is_named():
    inputs = [t.detach() for t in _inputs()]
    for eps, error, message in [
        (draw(L + 1, N, D), ValueError, r"eps must have the shape of the samples, \(5, 6, 3\), got \(6, 6, 3\)"),
        (draw(L, N, D).long(), TypeError, "eps must be a floating-point tensor"),
        (draw(L, N, D).to("meta"), ValueError, "eps is on meta, but mu is on"),
    ]:
        with pytest.raises(error, match=message):
            _kl(inputs, "diagonal", eps=eps)
    with pytest.raises(ValueError, match="seed and eps exclude each other"):
        _kl(inputs, "diagonal", eps=draw(L, N, D), seed=1)
