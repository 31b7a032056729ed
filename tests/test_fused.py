"""Inside torch.compile on a CPU, small calls are compiled as their closed form, and larger ones as the op."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import fastkl
from fastkl.ops._fused import MOST_NOISE, MOST_TERMS

WIDTH = 8
LARGE = MOST_TERMS // WIDTH + 1


def leaves(*shapes):
    torch.manual_seed(0)
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def mixture(rows):
    components = 4
    z, logits, means, logvars = leaves(
        (rows, WIDTH // 4), components, (components, WIDTH // 4), (components, WIDTH // 4)
    )
    return fastkl.gmm_log_prob, [z, logits, means, logvars]


def of(function, *shapes):
    return lambda rows: (function, leaves(*[(rows, WIDTH)] * len(shapes)))


def with_noise(function):
    def case(rows):
        mu, logvar = leaves((rows, WIDTH), (rows, WIDTH))
        eps = torch.randn(rows, WIDTH)
        return lambda mu, logvar: function(mu, logvar, eps=eps), [mu, logvar]

    return case


CASES = {
    "kl_normal": of(fastkl.kl_normal, 1, 2),
    "kl_normal_with_prior": of(fastkl.kl_normal, 1, 2, 3, 4),
    "kl_normal_per_dim": of(fastkl.kl_normal_per_dim, 1, 2),
    "wasserstein2_normal": of(fastkl.wasserstein2_normal, 1, 2, 3, 4),
    "rsample_normal": with_noise(fastkl.rsample_normal),
    "rsample_kl": with_noise(lambda mu, logvar, eps: torch.cat(fastkl.rsample_kl(mu, logvar, eps=eps)[:1])),
    "bernoulli_log_prob": of(fastkl.bernoulli_log_prob, 1, 2),
    "normal_log_prob": of(fastkl.normal_log_prob, 1, 2, 3),
    "gmm_log_prob": mixture,
}


def compiled(function, ops):
    """The compiled function; the names of fastkl's ops in its graphs, forward and backward, are added to `ops`."""

    def record(graph, inputs):
        for node in graph.graph.nodes:  # an op that writes into its arguments is wrapped, as the first argument
            ops.extend(each for each in (node.target, *node.args[:1]) if str(each).startswith("fastkl."))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    return torch.compile(function, backend=aot_autograd(fw_compiler=record, bw_compiler=record), fullgraph=True)


@pytest.mark.parametrize("rows", [16, LARGE])
@pytest.mark.parametrize("name", CASES)
def test_a_small_call_is_compiled_without_the_op_and_a_large_one_with_it(name, rows):
    function, inputs = CASES[name](rows)
    ops = []
    value = compiled(function, ops)(*inputs)
    weight = torch.randn_like(value)
    found = torch.autograd.grad(value, inputs, weight)
    assert len(ops) == (0 if rows == 16 else 2), ops  # forward and backward
    expected = function(*inputs)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, inputs, weight), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [16, MOST_NOISE // WIDTH + 1])
def test_without_a_seed_only_the_noise_of_a_small_latent_is_the_compilers(rows):
    mu, logvar = torch.zeros(rows, WIDTH), torch.zeros(rows, WIDTH)
    ops = []
    draw = compiled(lambda mu, logvar: fastkl.rsample_kl(mu, logvar)[0], ops)
    torch.manual_seed(1)
    first, second = draw(mu, logvar), draw(mu, logvar)
    torch.manual_seed(1)
    assert torch.equal(draw(mu, logvar), first)
    assert not torch.equal(first, second)
    assert len(ops) == (0 if rows == 16 else 1)
    assert abs(first.mean()) < 5 / first.numel() ** 0.5
    assert 0.7 < first.std() < 1.3


def test_a_seed_gives_the_same_noise_as_without_the_compiler():
    mu, logvar = leaves((16, WIDTH), (16, WIDTH))
    ops = []
    z = compiled(lambda mu, logvar: fastkl.rsample_normal(mu, logvar, seed=3), ops)(mu, logvar)
    assert torch.equal(z, fastkl.rsample_normal(mu, logvar, seed=3))
    assert ops


def test_an_exported_program_keeps_the_op():
    class Loss(torch.nn.Module):
        def forward(self, mu, logvar):
            return fastkl.kl_normal(mu, logvar)

    program = torch.export.export(Loss(), (torch.zeros(4, WIDTH), torch.zeros(4, WIDTH)))
    assert "fastkl.kl_normal_fwd" in program.graph_module.code
