"""One mixture per datum: the launchers, called directly, against the float64 definition and its autograd."""

import functools

import pytest
import torch

from fastkl import reference

from gmm_helpers import check_launch, check_parts, written
from helpers import DEVICE, DTYPES, launcher, leaf, poisoned_memory

FORMS = ("point", "expected", "convolved")
# (samples, data, components, columns): why
SHAPES = [
    (1, 5, 3, 8),  # several data in one tile, padded components, data past the end
    (3, 4, 6, 5),  # samples, rows that are not aligned
    (1, 2, 9, 33),  # several tiles of components, dz gathered over them
    (2, 2, 9, 33),  # the same with samples: two launches
    (1, 3, 1, 1),  # one component, one dimension
    (2, 2, 2, 600),  # long rows, one component after the other
    (6, 2, 2, 3),  # more samples than data
]


def draw(
    samples, data, components, columns, form="point", dtype=torch.float32, logvars="full", logits="datum", spread=1.0
):
    generator = torch.Generator().manual_seed(7)

    def normal(*shape):
        return leaf((spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype))

    sizes = {"shared": 1, "datum": data, "row": samples * data, "half": samples * data // 2}
    shapes = {
        "full": (data, components, columns), "spherical": (data, components, 1), "tied": (data, 1, columns),
        "one": (1, components, columns), "scalar": (1, 1, 1), "one spherical": (1, components, 1),
    }  # fmt: skip
    return [
        normal(samples * data, columns),
        None if form == "point" else normal(samples * data, columns),
        normal(sizes[logits], components),
        normal(data, components, columns),
        None if logvars == "none" else normal(*shapes[logvars]),
    ]


def launch(tensors, weights, form, wanted=None):
    with poisoned_memory():
        inputs = (*(None if t is None else t.detach() for t in tensors), None)
        value = launcher("gmm_per_datum.fwd")(*inputs, form, "exact")
        dlp = weights.to(reference.compute_dtype(*inputs))
        gradients = written(launcher("gmm_per_datum.bwd"), dlp, value, inputs, form, "exact", wanted)
        return [value.to(dlp.dtype), *gradients]


check = functools.partial(check_launch, launch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, form):
    check(draw(*shape, form), form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    for form in FORMS:
        check(draw(2, 3, 5, 16, form, dtype=dtype), form)


@pytest.mark.parametrize("logvars", ["none", "spherical", "tied", "one", "scalar", "one spherical"])
@pytest.mark.parametrize("shape", [(1, 5, 3, 8), (2, 2, 9, 33)], ids=str)
def test_log_variances_that_broadcast(shape, logvars, monkeypatch):
    import fastkl.kernels.mixture.gmm_per_datum as kernels

    check(draw(*shape, logvars=logvars), "point")
    monkeypatch.setattr(kernels, "BUFFER_BYTES", 1)  # one datum at a time
    check(draw(*shape, "expected", logvars=logvars), "expected")


@pytest.mark.parametrize("logits", ["shared", "row", "half"])
@pytest.mark.parametrize("shape", [(1, 6, 3, 8), (4, 3, 5, 6), (4, 2, 9, 33)], ids=str)
def test_logits_of_all_rows_of_one_and_of_some(shape, logits):
    if logits != "half" or shape[0] > 1:
        check(draw(*shape, logits=logits), "point")


def test_rows_longer_than_a_tile(monkeypatch):
    import fastkl.kernels.mixture._gmm_per_datum as kernels

    monkeypatch.setitem(kernels.LONGEST, torch.float32, 16)
    monkeypatch.setitem(kernels.THREAD_TILE, torch.float32, 1)
    for samples, form in ((1, "point"), (2, "expected"), (2, "convolved")):
        check(draw(samples, 2, 3, 37, form, logits="half" if samples == 2 else "datum"), form)


def test_zero_weights_far_rows_and_strides():
    z, _, logits, means, logvars = (None if t is None else t.detach() for t in draw(2, 4, 5, 8))
    logits[1, 2] = logits[2, :4] = -torch.inf
    check([leaf(z), None, leaf(logits), leaf(means), leaf(logvars)], "point")
    check([leaf(z + 1e4), None, leaf(logits), leaf(means), leaf(logvars)], "point")
    check([leaf(z), None, leaf(logits), leaf(means * 0.1 + 10), leaf(logvars * 0.1 - 4.6)], "point")


def test_strided_inputs_and_gradients():
    tensors = [t.detach() for t in draw(2, 4, 5, 8, "expected")]
    z, logvar, logits, means, logvars = tensors
    head = torch.cat([z, logvar], 1)
    views = [
        *head.chunk(2, 1),
        logits.mT.contiguous().mT,
        torch.stack([means] * 2, 3)[..., 1],
        logvars.mT.contiguous().mT,
    ]
    weights = torch.ones((), device=DEVICE).expand(8)
    for got, expected in zip(launch(views, weights, "expected"), launch(tensors, weights.contiguous(), "expected")):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_gradient_asked_for_alone_has_the_same_bits():
    for shape in ((1, 3, 4, 8), (2, 2, 9, 33)):
        check_parts(launch, draw(*shape, "expected"))


@pytest.mark.parametrize("shape", [(0, 3, 2, 4), (2, 3, 2, 0)], ids=str)
def test_empty(shape):
    check(draw(*shape, "expected"), "expected")


def aot_calls():
    fwd, bwd = launcher("gmm_per_datum.fwd"), launcher("gmm_per_datum.bwd")
    calls = {}

    def add(name, shape, form="point", dtype=torch.float32, **settings):
        tensors = [None if t is None else t.detach() for t in draw(*shape, form, dtype=dtype, **settings)]
        rows = torch.empty(shape[0] * shape[1], dtype=reference.compute_dtype(tensors[0]))
        calls[f"{name} fwd"] = lambda: fwd(*tensors, None, form, "exact")
        inputs = (*tensors, None)
        calls[f"{name} bwd"] = lambda: bwd(rows, rows.double(), inputs, inputs, form, "exact")

    add("core aligned point", (1, 64, 16, 64))
    add("expected bfloat16", (1, 64, 16, 64), "expected", torch.bfloat16)
    add("aligned convolved", (1, 64, 16, 64), "convolved")
    add("aligned samples", (4, 64, 4, 64), "expected")
    add("samples of many components, float16", (4, 64, 128, 32), "convolved", torch.float16)
    add("aligned longest row", (1, 2, 3, 2048), "expected")
    add("aligned several blocks of columns", (2, 2, 3, 8192), "convolved")
    add("spherical, shared logits", (1, 64, 10, 64), logvars="spherical", logits="shared")
    add("no log-variances, logits of each row", (4, 64, 10, 64), logvars="none", logits="row")
    add("one column", (1, 64, 10, 1), "expected")
    add("odd bfloat16", (3, 64, 10, 37), "convolved", torch.bfloat16)
    add("odd float32", (1, 64, 30, 37), "expected")
    add("float64", (1, 64, 10, 48), "convolved", torch.float64)
    add("odd float64", (2, 64, 10, 37), "convolved", torch.float64)
    add("long float64", (1, 4, 3, 1024), "expected", torch.float64)
    add("small float64", (2, 3, 5, 16), "expected", torch.float64)
    add("small float16", (2, 3, 5, 16), dtype=torch.float16)
    return calls
