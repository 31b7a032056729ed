"""Free bits: the three published definitions, with gradients, for posteriors and for precomputed KLs."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.distributions import Normal, kl_divergence

import fastkl
from fastkl import remedies
from fastkl.remedies import _per_dimension

from helpers import DEVICE, implementation, leaf

PER = ("sample", "dimension", "batch")
THRESHOLD = 0.4


def draw(*shape, dtype=torch.float64, count=2):
    generator = torch.Generator().manual_seed(3)
    return [leaf(0.7 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for _ in range(count)]


def compared(kl, per, joint_ndim=0):
    """What the threshold is compared with, from the KL of every element [N, *event]: [N], [N, maxima] or [maxima]."""
    if per == "sample":
        return kl.flatten(1).sum(1)
    kl = kl.flatten(kl.dim() - joint_ndim).sum(-1) if joint_ndim else kl
    return kl.flatten(1) if per == "dimension" else kl.mean(0).flatten()


def expected(kl, threshold, per, joint_ndim=0):
    felt = compared(kl, per, joint_ndim).clamp(min=threshold)
    return felt if per == "sample" else felt.sum(-1)


def elements(mu, logvar, prior=None):
    prior = Normal(torch.zeros_like(mu), 1.0) if prior is None else Normal(prior[0], prior[1].mul(0.5).exp())
    return kl_divergence(Normal(mu, logvar.mul(0.5).exp()), prior)


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("per", PER)
# A row; feature maps with a threshold for every pixel, row of pixels, map; packed along the first dimension of the
# event, which is one of the batch's as soon as a threshold belongs to less than a datum.
@pytest.mark.parametrize(
    ("event", "joint_ndim", "packed"),
    [((5,), 0, False), ((3, 2, 2), 0, False), ((3, 2, 2), 1, True), ((3, 2, 2), 2, True), ((5,), 0, True)],
)
def test_free_bits_are_the_definition(backend, per, event, joint_ndim, packed, monkeypatch):
    monkeypatch.setattr(_per_dimension, "plain", lambda device: backend == "torch")
    joint_ndim = 0 if per == "sample" else joint_ndim  # a datum is joint already
    mu, logvar = draw(4, *event)
    q = fastkl.DiagonalNormal(mu, logvar)
    if packed:
        q = fastkl.DiagonalNormal.from_packed(torch.cat([mu, logvar], 1))
    terms = compared(elements(mu, logvar), per, joint_ndim)
    threshold = terms.mean().item()  # some are above it, some below
    felt = terms > threshold
    assert felt.any()
    assert not felt.all()
    with implementation(backend):
        value = remedies.free_bits(q, threshold, per=per, joint_ndim=joint_ndim)
        gradient = torch.autograd.grad(value.square().sum(), (mu, logvar))
    wanted = expected(elements(mu, logvar), threshold, per, joint_ndim)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted.square().sum(), (mu, logvar)))


@pytest.mark.parametrize("prior", [False, True])
def test_rows_in_blocks_are_rows(prior):
    """More elements than a block holds, and a last block that is smaller; strided; with bounds and another scale."""
    heads, p = draw(530, 300), draw(150) if prior else None
    mu, parameter = (head.chunk(2, 1)[1] for head in heads)
    q = fastkl.DiagonalNormal(mu, parameter, scale="softplus", bounds=(-1.0, 1.0))
    threshold = 0.5
    value = remedies.free_bits(q, threshold, per="dimension", prior=None if p is None else fastkl.DiagonalNormal(*p))
    wanted = expected(elements(mu, q.logvar, p), threshold, "dimension")
    torch.testing.assert_close(value, wanted)
    inputs = [*heads, *(p or ())]
    first = [torch.autograd.grad(v.square().sum(), inputs, retain_graph=True) for v in (value, wanted)]
    torch.testing.assert_close(*first)
    weights = torch.stack([2 * value.detach(), value.detach().cos()])
    batched = torch.autograd.grad(value, inputs, weights, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(tuple(gradient[0] for gradient in batched), first[0])
    twice = []
    for v in (value, wanted):
        # Of a logarithm, so that gradients are about 1: the sine of a large one would keep few of its digits.
        once = torch.autograd.grad(100 * v.log().sum(), inputs, create_graph=True)
        twice.append(torch.autograd.grad(sum(g.sin().sum() for g in once), inputs))
    torch.testing.assert_close(*twice)


def test_examples_in_vmap():
    tensors = [tensor.detach() for tensor in draw(3, 4, 5)]

    def value(mu, logvar):
        return remedies.free_bits(fastkl.DiagonalNormal(mu, logvar), THRESHOLD, per="dimension").sum()

    for function in (value, torch.func.grad(value)):
        each = torch.stack([function(*(tensor[i] for tensor in tensors)) for i in range(3)])
        torch.testing.assert_close(torch.func.vmap(function)(*tensors), each)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("shape", [(4,), (4, 4)])  # a prior that data share, and one for each
def test_free_bits_to_another_prior(per, shape):
    mu, logvar, *prior = draw(4, 4, count=4)
    prior = [tensor[0] if len(shape) == 1 else tensor for tensor in prior]
    p = fastkl.DiagonalNormal(*prior, event_ndim=1)
    value = remedies.free_bits(fastkl.DiagonalNormal(mu, logvar), THRESHOLD, per=per, prior=p)
    wanted = expected(elements(mu, logvar, prior), THRESHOLD, per)
    torch.testing.assert_close(value, wanted)
    inputs = (mu, logvar, *prior)
    torch.testing.assert_close(*(torch.autograd.grad(v.square().sum(), inputs) for v in (value, wanted)))


@pytest.mark.parametrize("per", PER)
def test_free_bits_of_a_kl_are_those_of_its_posterior(per):
    mu, logvar = draw(4, 5)
    q = fastkl.DiagonalNormal(mu, logvar)
    kl = elements(mu, logvar)
    value = remedies.free_bits(q.kl() if per == "sample" else kl, THRESHOLD, per=per)
    torch.testing.assert_close(value, remedies.free_bits(q, torch.tensor([THRESHOLD], device=DEVICE), per=per))
    tokens = kl.view(2, 2, 5)  # batch dimensions are all but the last
    if per == "batch":
        torch.testing.assert_close(remedies.free_bits(tokens, THRESHOLD, per=per), value)


@pytest.mark.parametrize("per", PER)
def test_gradients_are_exact_and_at_the_threshold_the_kl_s(per):
    def loss(mu, logvar):
        return remedies.free_bits(fastkl.DiagonalNormal(mu, logvar), THRESHOLD, per=per)

    assert gradcheck(loss, draw(4, 3))
    assert gradgradcheck(loss, draw(4, 3))
    for level, gradient in ((1.0, 1.0), (0.999, 1.0), (1.001, 0.0)):
        kl = leaf(torch.ones(1, 1))
        remedies.free_bits(kl if per != "sample" else kl[0], level, per=per).sum().backward()
        assert kl.grad.item() == gradient
    mu = leaf(torch.ones(2, 1))  # whose KL is 1/2
    remedies.free_bits(fastkl.DiagonalNormal(mu, torch.zeros_like(mu)), 0.5, per=per).mean().backward()
    assert mu.grad.tolist() == [[0.5], [0.5]]


def test_the_batch_mean_lets_a_datum_be_silent():
    """Where the three meanings part: one dimension, of which one datum says all that the threshold asks for."""
    kl = torch.tensor([[1.0], [0.0]])
    means = [remedies.free_bits(kl[:, 0] if per == "sample" else kl, 0.5, per=per).mean().item() for per in PER]
    assert means == [0.75, 0.75, 0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    mu, logvar = draw(4, 3, dtype=dtype)
    for per in PER:
        value = remedies.free_bits(fastkl.DiagonalNormal(mu, logvar), THRESHOLD, per=per)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected(elements(mu.float(), logvar.float()), THRESHOLD, per))


def test_empty_batches_have_no_mean():
    mu, logvar = draw(0, 3)
    q = fastkl.DiagonalNormal(mu, logvar)
    assert [remedies.free_bits(q, 1.0, per=per).shape for per in PER] == [(0,), (0,), ()]
    assert remedies.free_bits(q, 1.0, per="batch").isnan()
