"""torch.export: an exported program has the gradients of the original calls."""

import pytest
import torch
from test_contract import OPS, SHARED, draw

import fastkl

from helpers import DEVICE


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


MORE = {
    "kl_gmm, stl": (
        lambda *t: fastkl.kl_gmm(*t, num_samples=2, seed=5, gradient="stl"),
        lambda n: [(n, 4), (n, 4), (3,), (3, 4), (3, 4)],
    ),
    "gumbel_softmax, hard": (lambda x: fastkl.gumbel_softmax(x, 0.7, True, seed=1), lambda n: [(n, 4)]),
}
ALL = OPS | SHARED | MORE


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_an_exported_program_has_the_gradient(name, strict):
    function, shapes = ALL[name]
    inputs = draw(*shapes(3), dtype=torch.float32)
    program = torch.export.export(Module(function), tuple(inputs), strict=strict).module()
    found, expected = program(*inputs), function(*inputs)
    weights = torch.linspace(1, 2, expected.numel(), device=DEVICE).view(expected.shape)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(value, inputs, weights) for value in (found, expected)]
    torch.testing.assert_close(*gradients)
