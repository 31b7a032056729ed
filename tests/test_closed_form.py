"""The CPU's block-by-block closed forms give what the whole tensors give, and touch little memory beside them."""

import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops import _arguments, _sampling

# More than two blocks of rows, the last one short; a row alone larger than a block; samples; one row only.
SHAPES = [(700, 100), (3, 70_000), (5, 40, 10, 50), (1, 70_000)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_samples", [None, 2])
def test_blocks_change_nothing(shape, num_samples, monkeypatch):
    event_ndim = len(shape) - 1

    def run():
        generator = torch.Generator().manual_seed(0)
        head = torch.randn(shape[0], 2 * shape[1], *shape[2:], generator=generator).requires_grad_()
        prior = [torch.randn(shape[1:], generator=generator).requires_grad_() for _ in range(2)]
        q = fastkl.DiagonalNormal.from_packed(head)
        z, kl = q.rsample_kl(fastkl.DiagonalNormal(*prior, event_ndim=event_ndim), num_samples=num_samples, seed=3)
        log_likelihood = fastkl.bernoulli_log_prob(q.mean, q.mean.detach(), event_ndim=event_ndim)
        log_prob = fastkl.normal_log_prob(q.mean, prior[0], prior[1], event_ndim=event_ndim)
        value = kl + q.kl() + log_likelihood + 0.3 * log_prob
        return [z, value, *torch.autograd.grad(value.sum() + z.square().sum(), [head, *prior])]

    blocked = run()
    assert len(_arguments.row_blocks(torch.empty(shape))) == {700: 3, 3: 3, 5: 5, 1: 1}[shape[0]]
    monkeypatch.setattr(_arguments, "row_blocks", lambda tensor: [_arguments.EVERYTHING])
    for actual, expected in zip(blocked, run()):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("seed", [0, 1, -1, 2**62 + 99, -(2**63)])
def test_noise_in_32_bit_words_is_that_of_the_definition(seed):
    shape = (3, 4 * _sampling.GROUPS + 5)  # two runs of Philox calls, the last one cut
    q = [torch.empty(shape)] * 2
    seed = torch.tensor(seed)
    for num_samples in (None, 2):
        drawn = _sampling.draw(q, -1, seed, None, num_samples)
        assert torch.equal(drawn, reference.normal_noise(seed, shape, num_samples))


def test_philox_is_the_published_one():
    """Known answers of Philox4x32-10 (Random123's kat_vectors): counter and key of zeros."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = [int(w) for w in reference.philox(torch.tensor(0), zero, zero, 0)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
