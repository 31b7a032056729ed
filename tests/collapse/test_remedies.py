"""Remedies: capacity and balancing, levels that change within one graph, and what all of them refuse."""

from __future__ import annotations

import pytest
import torch

import fastkl
from fastkl import remedies

from helpers import DEVICE, leaf


def draw(*shape, dtype=torch.float64, count=2):
    generator = torch.Generator().manual_seed(3)
    return [leaf(0.7 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for _ in range(count)]


def test_levels_that_change_need_no_recompilation():
    def loss(mu, logvar, level):
        q = fastkl.DiagonalNormal(mu, logvar)
        groups = remedies.balance([q.kl(), q.kl() ** 2], [1, 3], beta=level)
        bits = [remedies.free_bits(q, level, per=per).mean() for per in ("sample", "dimension", "batch")]
        return sum(bits) + remedies.capacity(q.kl(), level, per="batch") + groups.mean()

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
    value = remedies.capacity(kl, torch.tensor([4.0], device=DEVICE), per="batch")
    assert value.shape == ()
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype):
    kl = torch.full((1001, 2), 0.1, dtype=dtype, device=DEVICE)
    exact = kl[0, 0].item()
    # In float16 the mean's sum would be rounded to 1/16, in bfloat16 to 1/2.
    values = (remedies.free_bits(kl, 0.0, per="batch"), remedies.capacity(kl[:, 0], 0.0, per="batch"))
    torch.testing.assert_close(torch.stack(values).cpu(), torch.tensor([2 * exact, exact]), rtol=1e-5, atol=0)
    assert remedies.balance(kl).dtype == torch.float32
    assert remedies.balance(kl[:0]).shape == (0,)


Q = fastkl.DiagonalNormal(torch.zeros(2, 3), torch.zeros(2, 3))
KL = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        (remedies.free_bits, (Q, 1.0), {"per": "datum"}, ValueError, "per must be one of"),
        (remedies.free_bits, (Q, -1.0), {}, ValueError, "threshold must be a finite number"),
        (remedies.free_bits, (Q, torch.ones(3)), {}, ValueError, "threshold must have one value"),
        (remedies.free_bits, (Q, 1.0), {"joint_ndim": 1}, ValueError, "already sums over the event"),
        (remedies.free_bits, (Q, 1.0), {"per": "batch", "joint_ndim": 2}, ValueError, "joint_ndim must be at most 1"),
        (remedies.free_bits, (Q, 1.0), {"per": "batch", "group": "world"}, TypeError, "group must be"),
        (remedies.free_bits, (Q, 1.0), {"group": "world"}, ValueError, 'group needs per="batch"'),
        (remedies.free_bits, (KL, 1.0), {"prior": Q}, ValueError, "need kl to be a posterior"),
        (remedies.free_bits, (KL[0], 1.0), {"per": "batch"}, ValueError, "kl must be .batch, dimensions"),
        (remedies.free_bits, ([1.0], 1.0), {}, TypeError, "kl must be a torch.Tensor"),
        (remedies.free_bits, (fastkl.DiagonalNormal(KL[0], KL[0]), 1.0), {}, ValueError, "with batch dimensions"),
        (remedies.capacity, (KL, float("nan")), {}, ValueError, "target must be a finite number"),
        (remedies.capacity, (KL, 1.0), {"per": "dimension"}, ValueError, "per must be one of"),
        (remedies.balance, (KL, [1, 2]), {}, ValueError, "one for each of the 3 groups"),
        (remedies.balance, (KL, [1, 2, 0]), {}, ValueError, "sizes must be a finite number above 0"),
        (remedies.balance, (KL[:, :0],), {}, ValueError, "at least one group"),
        (remedies.balance, ([KL, KL[0]],), {}, ValueError, "tensors of one shape"),
        (remedies.balance, ([],), {}, TypeError, "kl must be a tensor"),
        (remedies.balance, (KL,), {"beta": KL}, ValueError, "beta must have one value"),
        (remedies.balance, (KL,), {"group": "world"}, TypeError, "group must be"),
    ],
)
def test_bad_input_is_refused(function, arguments, options, error, message):
    with pytest.raises(error, match=message):
        function(*arguments, **options)
