"""DiagonalNormal: the same results as torch.distributions, without needless memory traffic."""

import dataclasses

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

import fastkl

from helpers import DEVICE, implementation, leaf


class Traffic(TorchDispatchMode):
    """Which ops run, and how many bytes they allocate."""

    def __init__(self):
        super().__init__()
        self.ops, self.storages = [], {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        self.ops.append(op.name().split(".")[0])
        given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if _real(t)}
        for t in filter(_real, torch.utils._pytree.tree_leaves(out)):
            if t.untyped_storage().data_ptr() not in given:
                self.storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return out


def _real(t):
    return isinstance(t, torch.Tensor) and t.device.type != "meta"


def posterior(shape, scale="logvar", packed_dim=None):
    generator = torch.Generator().manual_seed(4)
    mu, parameter = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    std = {
        "logvar": lambda p: (0.5 * p).exp(),
        "log_std": torch.exp,
        "std": lambda p: p.abs() + 0.1,
        "softplus": torch.nn.functional.softplus,
    }[scale](parameter)
    parameter = std if scale == "std" else parameter
    if packed_dim is not None:
        q = fastkl.DiagonalNormal.from_packed(
            torch.cat([mu, parameter], packed_dim).to(DEVICE), packed_dim, scale=scale
        )
    else:
        q = fastkl.DiagonalNormal(mu.to(DEVICE), parameter.to(DEVICE), scale=scale)
    return q, Independent(Normal(mu.to(DEVICE), std.to(DEVICE)), len(shape) - 1)


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("packed_dim", [None, 1, -1])
@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (2, 2, 3, 4), (2, 2, 2, 3, 4)], ids=str)
def test_agrees_with_torch_distributions(backend, shape, packed_dim):
    for scale in ("logvar", "log_std", "std", "softplus"):
        q, expected = posterior(shape, scale, packed_dim)
        with implementation(backend):
            z, kl = q.rsample_kl(num_samples=2, seed=1)
            standard = Independent(Normal(torch.zeros_like(q.mean), torch.ones_like(q.mean)), len(shape) - 1)
            close(kl, kl_divergence(expected, standard))
            close(q.kl(), kl)
            close(q.kl_per_dim(), kl_divergence(expected.base_dist, standard.base_dist).mean(0))
            close(q.log_prob(z), expected.log_prob(z))
            close(q.entropy(), expected.entropy())
            close(q.rsample(num_samples=2, seed=1), z)
            prior = fastkl.DiagonalNormal(q.mean + 1, torch.full_like(q.mean, 0.3))
            other = Independent(Normal(q.mean + 1, torch.full_like(q.mean, 0.15).exp()), len(shape) - 1)
            close(q.kl(prior), kl_divergence(expected, other))
            close(q.rsample_kl(prior)[1], kl_divergence(expected, other))
        for name in ("mean", "mode"):
            close(getattr(q, name), expected.mean)
        close(q.std, expected.stddev)
        close(q.var, expected.variance)
        assert q.event_ndim == len(shape) - 1
        assert kl.shape == shape[:1]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_bounds_hold_for_everything():
    q = fastkl.DiagonalNormal(torch.zeros(1, 2), torch.tensor([[-50.0, 50.0]]), bounds=(-2.0, 1.0))
    clamped = fastkl.DiagonalNormal(torch.zeros(1, 2), torch.tensor([[-2.0, 1.0]]))
    z = q.rsample(seed=3)
    assert torch.equal(z, clamped.rsample(seed=3))
    for method in ("kl", "kl_per_dim", "entropy"):
        assert torch.equal(getattr(q, method)(), getattr(clamped, method)())
    assert torch.equal(q.log_prob(z), clamped.log_prob(z))
    assert torch.equal(q.logvar, clamped.logvar)


@pytest.mark.parametrize("what", ["kl", "rsample_kl"])
@pytest.mark.parametrize(("shape", "dim"), [((8, 16, 8, 8), 1), ((8, 6, 32), -1)], ids=str)
def test_packed_head_costs_one_packed_gradient_and_nothing_else(what, shape, dim):
    """No cat, no copy: forward allocates its results, backward one tensor of the head's size."""
    head = leaf(torch.randn(shape))
    half, n = head.numel() // 2 * 4, shape[0] * 4
    with implementation("triton"):
        q = fastkl.DiagonalNormal.from_packed(head, dim)
        seed = torch.zeros((), dtype=torch.int64, device=DEVICE)
        with Traffic() as forward:
            outputs = [q.kl()] if what == "kl" else q.rsample_kl(seed=seed)
        gradients = [torch.ones_like(output) for output in outputs]
        with Traffic() as backward:
            torch.autograd.backward(outputs, gradients)
    for record, allowed in ((forward, n if what == "kl" else half + n), (backward, 2 * half)):
        assert not {"aten::cat", "aten::clone", "aten::copy_", "aten::contiguous", "aten::_to_copy"} & set(record.ops)
        assert sum(name.startswith("fastkl::") for name in record.ops) == 1
        assert sum(record.storages.values()) <= allowed + 256
    assert head.grad.shape == head.shape
    # What chunk() and the plain function cost instead: the same gradient, and a cat of its halves.
    with Traffic() as plain:
        fastkl.kl_normal(*head.chunk(2, dim), event_ndim=len(shape) - 1).sum().backward()
    assert "aten::cat" in plain.ops


FORMS = {
    "packed": lambda head: fastkl.DiagonalNormal.from_packed(head, -1, event_ndim=1),
    "pair": lambda head: fastkl.DiagonalNormal(*head.chunk(2, -1), event_ndim=1, scale="softplus", bounds=(-9.0, 9.0)),
    "broadcast": lambda head: fastkl.DiagonalNormal(head, head[..., :1], event_ndim=1, bounds=fastkl.SoftBounds(-9, 9)),
}


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_torch_sees_its_tensors_and_makes_it_again(make):
    head = leaf(torch.randn(4, 3, 6))
    q = make(head)
    (expected,) = torch.autograd.grad(q.kl().sum(), head)
    again = [
        dataclasses.replace(q),
        torch.utils._pytree.tree_map(lambda tensor: tensor, q),
        torch.func.vmap(make)(head),
        torch.func.vmap(lambda q: q, in_dims=1, out_dims=1)(q),
        dataclasses.replace(q, tensors=tuple(tensor.clone() for tensor in q.tensors)),
    ]
    for other in again:
        assert (other.shape, other.event_ndim) == (q.shape, 1)
        assert (other.kind, other.bounds, other.packed_dim) == (q.kind, q.bounds, q.packed_dim)
        (gradient,) = torch.autograd.grad(other.kl().sum(), head)
        torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(torch.func.vmap(lambda q: q.kl())(q), q.kl())
    with pytest.raises(ValueError, match="same size in the mapped dimension"):
        torch.func.vmap(lambda q: q.kl())(fastkl.DiagonalNormal(torch.zeros(3, 3), torch.zeros(3)))
    assert torch.utils._pytree.tree_map(lambda tensor: tensor.dtype, q).tensors[0] == torch.float32


class _Encoder(torch.nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, head):
        return self.make(2 * head)


class _Kl(torch.nn.Module):
    def forward(self, q):
        return q.kl()


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_goes_in_and_out_of_exported_programs(make, tmp_path):
    head = torch.randn(4, 6, device=DEVICE)
    torch.export.save(torch.export.export(_Encoder(make), (head,)), tmp_path / "encoder.pt2")
    q = torch.export.load(tmp_path / "encoder.pt2").module()(head)
    assert isinstance(q, fastkl.DiagonalNormal)
    kl = torch.export.export(_Kl(), (q,)).module()(q)
    torch.testing.assert_close(kl, make(2 * head).kl())


@pytest.mark.parametrize("name", ["std", "var"])
def test_gradients_of_moments_beyond_float16_are_finite(name):
    factor = 0.5 if name == "std" else 1.0
    parameter = torch.tensor([[15.0 / factor, 1.0]], dtype=torch.float16, device=DEVICE, requires_grad=True)
    q = fastkl.DiagonalNormal(torch.zeros_like(parameter), parameter)
    (gradient,) = torch.autograd.grad(getattr(q, name), parameter, torch.full_like(parameter, 2.0**-20))
    exact = 2.0**-20 * factor * torch.exp(factor * parameter.detach().double())
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-3, atol=2.0**-24)


@pytest.mark.parametrize("method", ["kl", "kl_per_dim", "rsample_kl", "log_prob", "free_bits", "mixture"])
def test_a_narrower_posterior_is_exact_beside_float64(method):
    """Its logarithm is taken in the dtype of the whole call."""
    wide = torch.tensor([[0.3, 1.7]], dtype=torch.float64, device=DEVICE)
    narrow = [torch.tensor([[0.7, 0.1]], dtype=torch.float32, device=DEVICE) for _ in range(2)]
    q, other = fastkl.DiagonalNormal(wide, wide), fastkl.DiagonalNormal(*narrow, scale="std")
    truth = Independent(Normal(*(t.double() for t in narrow)), 1)
    one = fastkl.priors.GaussianMixture(1, 2).double().to(DEVICE)  # the bound is the KL itself
    of_mixture = kl_divergence(truth.base_dist, Normal(one.means, (one.logvars / 2).exp())).sum(-1)
    kl = kl_divergence(Normal(wide, (wide / 2).exp()), truth.base_dist)
    found, exact = {
        "kl": lambda: (q.kl(other), kl.sum(-1)),
        "kl_per_dim": lambda: (q.kl_per_dim(other), kl.mean(0)),
        "rsample_kl": lambda: (q.rsample_kl(other)[1], kl.sum(-1)),
        "log_prob": lambda: (other.log_prob(wide), truth.log_prob(wide)),
        "mixture": lambda: (one.kl(other, method="upper"), of_mixture),
        "free_bits": lambda: (fastkl.remedies.free_bits(q, 0.0, per="dimension", prior=other), kl.sum(-1)),
    }[method]()
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("event_ndim", [0, 1, 2])
def test_what_is_computed_of_16_bits_is_not_rounded_to_them(event_ndim):
    mu, std = torch.randn(3, 1, 5).bfloat16(), torch.rand(3, 4, 5).add(0.5).bfloat16()
    q = fastkl.DiagonalNormal(mu, std, scale="std", event_ndim=event_ndim)
    exact = 2 * std.double().log()
    assert [tensor.shape for tensor in q.given] == [mu.shape, std.shape]
    assert q.logvar.dtype is torch.bfloat16
    torch.testing.assert_close(q.exact_logvar, exact.float())
    torch.testing.assert_close(q.mean_and_logvar(exact)[1], exact)
    rows = [t.flatten(3 - event_ndim) if event_ndim else t.unsqueeze(-1) for t in (mu.expand_as(std).float(), exact)]
    for found, expected in zip(q.vectors(), rows):
        torch.testing.assert_close(found, expected.float())
