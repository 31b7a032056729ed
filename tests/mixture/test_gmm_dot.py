"""The tensor-core path of mixtures: the launchers, called directly, against the float64 definition and its autograd.

The interpreter's tl.dot is float32 whatever the precision: there these tests bound the expansion, not tf32.
"""

import functools

import pytest
import torch

from fastkl import reference

from gmm_helpers import check_parts, launch_and_differentiate, written
from helpers import DEVICE, launcher, leaf, poisoned_memory

# (rows, components, columns): why
SHAPES = [
    (5, 3, 4),  # less than one tile of anything
    (70, 70, 16),  # two tiles of rows and of components
    (33, 5, 70),  # two tiles of columns, not aligned
    (6, 1, 1),  # one component, one dimension
    (4, 330, 3),  # few rows: programs share the components
]


def draw(rows, components, columns, form="point", dtype=torch.float32, logits=1, logvars=None):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return leaf((0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype))

    return [
        normal(rows, columns),
        None if form == "point" else normal(rows, columns),
        normal(logits, components),
        normal(1, components, columns),
        None if logvars == "none" else normal(*(logvars or (1, components, columns))),
    ]


def launch(tensors, weights, form, wanted=None, precision="tf32x3"):
    with poisoned_memory():
        inputs = (*(None if t is None else t.detach() for t in tensors), None)
        value = launcher("gmm_dot.fwd")(*inputs, form, precision)
        dlp = weights.to(reference.compute_dtype(*inputs))
        gradients = written(launcher("gmm_dot.bwd"), dlp, value, inputs, form, precision, wanted)
        return [value.to(dlp.dtype), *gradients]


def check(tensors, form, precision="tf32x3"):
    """Rounding of the expansion: some units of the largest term, which for these narrow draws is the result's size."""
    actual, exact, _ = launch_and_differentiate(functools.partial(launch, precision=precision), tensors, form)
    rounding = 2.0**-10 if precision == "tf32" else 16 * torch.finfo(torch.float32).eps
    size = 1 + (exact[0].abs().max().item() if len(exact[0]) else 0.0)
    for index, (got, truth) in enumerate(zip(actual, exact)):
        assert got.shape == truth.shape
        if truth.numel():
            units = rounding * (size if index else 1.0) + 2 * torch.finfo(got.dtype).eps
            error = (got.double() - truth).abs().max().item()
            assert error <= units * (size if index == 0 else truth.abs().max().item() + 1e-3), index


@pytest.mark.parametrize("form", ["point", "expected"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, form):
    check(draw(*shape, form), form)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype):
    for form in ("point", "expected"):
        for precision in ("tf32x3", "tf32"):
            check(draw(6, 3, 16, form, dtype=dtype), form, precision)


@pytest.mark.parametrize("logvars", ["none", (1, 7, 1), (1, 1, 5), (1, 1, 1)], ids=str)
def test_log_variances_that_broadcast(logvars):
    check(draw(9, 7, 5, "expected", logvars=logvars), "expected")


@pytest.mark.parametrize("bytes_", [4, 100, 1000])
def test_blocks_of_rows(bytes_, monkeypatch):
    import fastkl.kernels.mixture.gmm_dot as kernels

    monkeypatch.setattr(kernels, "BUFFER_BYTES", bytes_)
    for logits in (1, 2, 4):
        check(draw(4, 3, 2, "expected", logits=logits), "expected")


def test_several_splits_of_the_rows_and_of_the_components(monkeypatch):
    import fastkl.kernels.mixture._products as kernels

    for programs in (1, 3):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        check(draw(90, 150, 3), "point")


def test_zero_weights_a_common_shift_and_strides():
    z, _, logits, means, logvars = (None if t is None else t.detach() for t in draw(8, 4, 6))
    logits[0, 2] = -torch.inf
    tensors = [z, None, logits, means, logvars]
    check([None if t is None else leaf(t) for t in tensors], "point")
    weights = torch.ones((), device=DEVICE).expand(8)
    at_rest = launch(tensors, weights, "point")
    shifted = launch([z + 64, None, logits, means + 64, logvars], weights, "point")
    views = [torch.cat([z, z], 1)[:, :6], None, logits.mT.contiguous().mT, means.mT.contiguous().mT, logvars]
    for rest, shift, view in zip(at_rest, shifted, launch(views, weights.contiguous(), "point")):
        torch.testing.assert_close(rest, view)
        torch.testing.assert_close(rest, shift, rtol=1e-4, atol=1e-4)


def test_a_gradient_asked_for_alone_has_the_same_bits():
    check_parts(launch, draw(9, 3, 5, "expected"))


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 2, 0)], ids=str)
def test_empty(shape):
    check(draw(*shape, "expected"), "expected")


def aot_calls():
    fwd, bwd = launcher("gmm_dot.fwd"), launcher("gmm_dot.bwd")
    calls = {}

    def add(name, shape, form="point", dtype=torch.float32, precision="tf32x3", forward=False):
        inputs = (*(None if t is None else t.detach() for t in draw(*shape, form, dtype=dtype)), None)
        row = torch.zeros(shape[0])
        if forward:  # its only kernel is one of backward's without the weights
            calls[f"{name} fwd"] = lambda: fwd(*inputs, form, precision)
        calls[f"{name} bwd"] = lambda: bwd(row, row.double(), inputs, inputs, form, precision)

    add("core aligned", (128, 128, 64), forward=True)
    add("expected bfloat16", (128, 128, 64), "expected", torch.bfloat16, forward=True)
    add("aligned few components, expected", (128, 16, 128), "expected")
    add("odd", (70, 37, 37), "expected", forward=True)
    add("odd bfloat16", (70, 37, 64), "expected", torch.bfloat16)
    add("one of each", (70, 1, 1))
    add("aligned tf32", (128, 128, 64), "expected", precision="tf32")
    return calls
