"""torch.export and torch.compile: one program for any batch and number of samples; no size is specialised."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastkl
from fastkl import objectives, priors, remedies

from helpers import DEVICE

D, K = 3, 4


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64).to(DEVICE)


MIXTURE = (draw(K), draw(K, D), draw(K, D) / 2)
TRIL = torch.eye(D, dtype=torch.float64, device=DEVICE).expand(K, D, D) * 1.5
PRIOR = priors.GaussianMixture(K, D).double().to(DEVICE)
Q, SAMPLED = fastkl.DiagonalNormal, {"num_samples": 2, "num_estimates": 2}


def minus_square(z):
    return -z.square().sum(-1)


# Of x and y, whose rows are the batch.
SAME_ROWS = {
    "kl_normal": lambda x, y: fastkl.kl_normal(x, y, MIXTURE[1][0], MIXTURE[2][0]),
    "kl_gmm": lambda x, y: fastkl.kl_gmm(x, y, *MIXTURE, seed=1),
    "kl_multivariate_normal": lambda x, y: fastkl.kl_multivariate_normal(x, y.exp(), 0 * x, TRIL[:1]),
    "mmd_normal of posteriors": lambda x, y: fastkl.mmd_normal(x, y),
    "iwae": lambda x, y: fastkl.iwae(x),
    "rsample_gmm": lambda x, y: fastkl.rsample_gmm(MIXTURE[0] + x[:, :1], MIXTURE[1], scale_tril=TRIL, seed=1),
    "sample_gmm": lambda x, y: fastkl.sample_gmm(MIXTURE[0] + x[:, :1], *MIXTURE[1:], num_samples=2, seed=1)[0],
    "free_bits": lambda x, y: remedies.free_bits(Q(x, y), 0.1, per="dimension"),
    "balance": lambda x, y: remedies.balance(x.exp()),
    "objective": lambda x, y: objectives.miwae(Q(x, y), PRIOR, minus_square, eps=torch.stack([y] * 4), **SAMPLED)[0],
}
# Of x and y, each with rows of its own.
OWN_ROWS = {
    "mmd": lambda x, y: fastkl.mmd(x, y),
    "sliced_wasserstein": lambda x, y: fastkl.sliced_wasserstein(x, y, 7, p=1, seed=1),
    "sinkhorn_divergence": lambda x, y: fastkl.sinkhorn_divergence(x, y, 0.5, diameter=1.0),
}


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.prior = function, PRIOR

    def forward(self, x, y):
        return self.function(x, y)


@pytest.mark.parametrize("name", [*SAME_ROWS, *OWN_ROWS])
def test_an_exported_program_takes_any_batch(name):
    function = (SAME_ROWS | OWN_ROWS)[name]
    rows = [torch.export.Dim(dim, min=2, max=1 << 24) for dim in "NM"]
    first, second = (rows[0], rows[0]) if name in SAME_ROWS else rows
    # As many rows as dimensions: no program may depend on that.
    example = draw(D, D), draw(D if name in SAME_ROWS else D + 1, D)
    exported = torch.export.export(Module(function), example, dynamic_shapes={"x": {0: first}, "y": {0: second}})
    program = exported.module()
    for n, m in ((2, 5), (7, 7)):
        x, y = draw(n, D), draw(n if name in SAME_ROWS else m, D)
        torch.testing.assert_close(program(x, y), function(x, y))


X, Y = draw(5, D).requires_grad_(), draw(5, D).requires_grad_()
# Of the number of samples.
SAMPLES = {
    "iwae": lambda n: fastkl.iwae(X[:1].expand(n, D) * 1.0),
    "rsample_normal": lambda n: fastkl.rsample_normal(X, Y, num_samples=n, seed=1),
    "rsample_kl": lambda n: sum(part.sum() for part in fastkl.rsample_kl(X, Y, num_samples=n, seed=1)),
    "kl_gmm": lambda n: fastkl.kl_gmm(X, Y, *MIXTURE, num_samples=n, seed=1),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_growing_number_of_samples_compiles_twice_at_most(name):
    """Once for the number that the first call had, and once for any."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(SAMPLES[name], fullgraph=True, backend=counter)
    for count in (2, 3, 5):
        found, expected = compiled(count), SAMPLES[name](count)
        torch.testing.assert_close(found, expected)
        if expected.requires_grad:
            pair = [torch.autograd.grad(out.sum(), X) for out in (found, expected)]
            torch.testing.assert_close(*pair)
    assert counter.frame_count <= 2
