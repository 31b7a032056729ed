"""Free bits, capacity and balancing: their published meanings, their gradients, and one graph for all thresholds."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import Normal, kl_divergence

import fastkl
from fastkl import remedies

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


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("per", PER)
# A row; feature maps with a threshold for every pixel, row of pixels, map; packed along the first dimension of the
# event, which is one of the batch's as soon as a threshold belongs to less than a datum.
@pytest.mark.parametrize(
    ("event", "joint_ndim", "packed"),
    [((5,), 0, False), ((3, 2, 2), 0, False), ((3, 2, 2), 1, True), ((3, 2, 2), 2, True), ((5,), 0, True)],
)
def test_free_bits_are_the_definition(backend, per, event, joint_ndim, packed):
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
    for level, gradient in ((1.0, 1.0), (0.999, 1.0), (1.001, 0.0)):
        kl = leaf(torch.ones(1, 1))
        remedies.free_bits(kl if per != "sample" else kl[0], level, per=per).sum().backward()
        assert kl.grad.item() == gradient


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
    kl = torch.full((1001, 2), 0.1, dtype=dtype, device=DEVICE)
    exact = kl[0, 0].item()
    # In float16 the mean's sum would be rounded to 1/16, in bfloat16 to 1/2.
    values = (remedies.free_bits(kl, 0.0, per="batch"), remedies.capacity(kl[:, 0], 0.0, per="batch"))
    torch.testing.assert_close(torch.stack(values).cpu(), torch.tensor([2 * exact, exact]), rtol=1e-5, atol=0)
    assert remedies.balance(kl).dtype == torch.float32


@pytest.mark.parametrize("per", PER)
def test_thresholds_that_change_need_no_recompilation(per):
    def loss(mu, logvar, level):
        q = fastkl.DiagonalNormal(mu, logvar)
        groups = remedies.balance([q.kl(), q.kl() ** 2], [1, 3], beta=level)
        bits = remedies.free_bits(q, level, per=per).mean()
        return bits + remedies.capacity(q.kl(), level, per="batch") + groups.mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    inputs = draw(4, 3, dtype=torch.float32)
    compiled(*inputs, torch.tensor(0.0, device=DEVICE))
    with torch.compiler.set_stance("fail_on_recompile"):
        for level in (0.1, 0.5, 1.0, 3.0):
            level = torch.tensor(level, device=DEVICE)
            torch.testing.assert_close(compiled(*inputs, level), loss(*inputs, level))


def test_capacity_of_a_datum_and_of_the_batch():
    kl = leaf(torch.tensor([1.0, 2.0, 6.0]))
    value = remedies.capacity(kl, 2.0)
    assert value.tolist() == [1.0, 0.0, 4.0]
    assert torch.autograd.grad(value.sum(), kl)[0].tolist() == [-1.0, 0.0, 1.0]
    value = remedies.capacity(kl, torch.tensor(4.0, device=DEVICE), per="batch")
    assert value.item() == 1.0
    torch.testing.assert_close(torch.autograd.grad(value, kl)[0].cpu(), torch.full((3,), -1 / 3))


def test_balancing_weighs_by_kl_over_size():
    (kl,) = draw(6, 3, count=1)  # of either sign, as Monte-Carlo estimates are
    sizes = [2, 8, 32]
    wanted = [(sum(abs(row[g].item()) for row in kl) / 6 + 0.01) / sizes[g] for g in range(3)]
    wanted = torch.tensor([3 * w / sum(wanted) for w in wanted], dtype=torch.float64, device=DEVICE)
    weights = remedies.balance_weights(kl, sizes)
    torch.testing.assert_close(weights, wanted)
    assert not weights.requires_grad
    for value in (remedies.balance(kl, sizes), remedies.balance(list(kl.unbind(1)), sizes, beta=0.99)):
        torch.testing.assert_close(value, (kl * wanted).sum(1))
        torch.testing.assert_close(torch.autograd.grad(value.sum(), kl)[0], wanted.expand(6, 3))
    for beta in (1.0, 4, torch.ones(1, device=DEVICE)):
        torch.testing.assert_close(remedies.balance(kl, sizes, beta=beta), kl.sum(1))
    assert remedies.balance_weights(torch.zeros(2, 2), [1, 1]).tolist() == [1.0, 1.0]


def test_empty_batches_have_no_mean():
    mu, logvar = draw(0, 3)
    q = fastkl.DiagonalNormal(mu, logvar)
    assert [remedies.free_bits(q, 1.0, per=per).shape for per in PER] == [(0,), (0,), ()]
    assert remedies.free_bits(q, 1.0, per="batch").isnan()
    assert remedies.balance(mu).shape == (0,)


Q = fastkl.DiagonalNormal(torch.zeros(2, 3), torch.zeros(2, 3))
KL = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        (remedies.free_bits, (Q, 1.0), {"per": "datum"}, ValueError, "per must be one of"),
        (remedies.free_bits, (Q, -1.0), {}, ValueError, "threshold must be a finite number"),
        (remedies.free_bits, (Q, torch.ones(3)), {}, ValueError, "threshold must have one value"),
        (remedies.free_bits, (Q, 1.0), {"joint_ndim": 1}, ValueError, "a whole datum is joint"),
        (remedies.free_bits, (Q, 1.0), {"per": "batch", "joint_ndim": 2}, ValueError, "joint_ndim must be at most 1"),
        (remedies.free_bits, (Q, 1.0), {"per": "batch", "group": "world"}, TypeError, "group must be"),
        (remedies.free_bits, (Q, 1.0), {"group": "world"}, ValueError, 'group is for per="batch"'),
        (remedies.free_bits, (KL, 1.0), {"prior": Q}, ValueError, "kl is given as a tensor"),
        (remedies.free_bits, (KL[0], 1.0), {"per": "batch"}, ValueError, "kl must be .batch, dimensions"),
        (remedies.free_bits, ([1.0], 1.0), {}, TypeError, "kl must be a torch.Tensor"),
        (remedies.free_bits, (fastkl.DiagonalNormal(KL[0], KL[0]), 1.0), {}, ValueError, "with batch dimensions"),
        (remedies.capacity, (KL, float("nan")), {}, ValueError, "target must be a finite number"),
        (remedies.capacity, (KL, 1.0), {"per": "dimension"}, ValueError, "per must be one of"),
        (remedies.balance, (KL, [1, 2]), {}, ValueError, "one for each of the 3 groups"),
        (remedies.balance, (KL, [1, 2, 0]), {}, ValueError, "sizes must be a finite number above 0"),
        (remedies.balance, (KL[:, :0],), {}, ValueError, "one group at least"),
        (remedies.balance, ([KL, KL[0]],), {}, ValueError, "tensors of one shape"),
        (remedies.balance, ([],), {}, TypeError, "kl must be a tensor"),
        (remedies.balance, (KL,), {"beta": KL}, ValueError, "beta must have one value"),
        (remedies.balance, (KL,), {"group": "world"}, TypeError, "group must be"),
    ],
)
def test_bad_input_is_refused(function, arguments, options, error, message):
    with pytest.raises(error, match=message):
        function(*arguments, **options)
