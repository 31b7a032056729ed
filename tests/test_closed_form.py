"""On a CPU, closed forms by blocks give the same results as on whole tensors, and allocate little memory."""

import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops import _arguments, _sampling
from fastkl.reference import Stream

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
        log_likelihood = fastkl.bernoulli_log_prob(q.mean.detach(), q.mean, event_ndim=event_ndim)
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
    seed = torch.tensor(seed)
    for num_samples, stream in ((None, Stream.POSTERIOR), (2, Stream.PRIOR)):
        drawn = _sampling.draw(torch.Size(shape), None, seed, num_samples, stream)
        assert torch.equal(drawn, reference.normal_noise(seed, shape, num_samples, stream=stream))


def test_philox_is_the_published_one():
    """Known answers of Philox4x32-7 (Random123's kat_vectors): zeros, and the digits of pi."""
    cases = {
        (0, 0, 0, 0, 0): [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48],
        (0x299F31D0A4093822, 0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344): [
            0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A,
        ],
    }  # fmt: skip
    for (seed, low, high, sample, stream), expected in cases.items():
        seed, low, high = (torch.tensor(number) for number in (seed, low, high))
        assert [int(word) for word in reference.philox(seed, low, high, sample, stream)] == expected
