"""Mixtures with full covariances: the launchers, called directly, against the float64 definition and its autograd."""

import pytest
import torch

import fastkl
from fastkl import reference

from gmm_helpers import check_launch, check_parts, written
from helpers import DEVICE, DTYPES, launcher, leaf, poisoned_memory

# (rows, components, columns): why
SHAPES = [
    (5, 3, 4),  # less than one tile of anything
    (70, 2, 16),  # two blocks of rows
    (33, 3, 37),  # rows that are not aligned
    (9, 2, 130),  # three tiles of columns, those above the diagonal left out
    (6, 1, 1),  # one component, one dimension
]


def draw(rows, components, columns, form="point", dtype=torch.float32, logits=1):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    scale = normal(1, components, columns, columns) * (0.5 / max(1, columns) ** 0.5)
    scale = scale + torch.diag_embed(0.7 + normal(1, components, columns).abs())  # what is above is not read
    values = [
        normal(rows, columns),
        None if form == "point" else normal(rows, columns),
        normal(logits, components),
        normal(1, components, columns),
        scale,
    ]
    return [None if value is None else leaf(value.to(dtype)) for value in values]


def launch(tensors, weights, form, wanted=None, precision="exact"):
    with poisoned_memory():
        z, logvar, logits, means, scale = (None if t is None else t.detach() for t in tensors)
        inputs, places = (z, logvar, logits, means, None, scale), wanted and {5 if i == 4 else i for i in wanted}
        value = launcher("gmm_full.fwd")(*inputs, form, precision)
        dlp = weights.to(value.dtype)
        return [value, *written(launcher("gmm_full.bwd"), dlp, value, inputs, form, precision, places)]


def check(tensors, form):
    assert not check_launch(launch, tensors, form)[-1].triu(1).any()


@pytest.mark.parametrize("form", ["point", "expected"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, form):
    check(draw(*shape, form), form)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    from fastkl.kernels._layout import DOT_TAKES_FLOAT64

    if dtype == torch.float64 and not DOT_TAKES_FLOAT64:
        pytest.skip("tl.dot of Triton 3.4 takes no float64; such mixtures go to the closed form")
    for form in ("point", "expected"):
        check(draw(6, 3, 16, form, dtype=dtype), form)


@pytest.mark.parametrize("bytes_", [4, 100, 1000])
def test_blocks_of_rows_and_components(bytes_, monkeypatch):
    """Buffers of a few bytes: one row or one component at a time, or several."""
    import fastkl.kernels.mixture.gmm_full as kernels

    monkeypatch.setattr(kernels, "BUFFER_BYTES", bytes_)
    for logits in (1, 2, 4):
        check(draw(4, 3, 2, "expected", logits=logits), "expected")


def test_zero_weights_far_rows_ill_conditioned_and_strided():
    z, _, logits, means, scale = (None if t is None else t.detach() for t in draw(8, 4, 6))
    logits[0, 2] = -torch.inf
    check([leaf(z), None, leaf(logits), leaf(means), leaf(scale)], "point")
    check([leaf(z + 1e4), None, leaf(logits), leaf(means), leaf(scale)], "point")
    thin = scale * torch.logspace(-3, 1, 6, device=DEVICE)[:, None]
    check([leaf(z * 0.1), None, leaf(logits), leaf(means * 0.1), leaf(thin)], "point")
    views = [
        torch.cat([z, z], 1)[:, ::2],
        None,
        logits.mT.contiguous().mT,
        means.mT.contiguous().mT,
        scale.mT.contiguous().mT,
    ]
    weights = torch.ones((), device=DEVICE).expand(8)
    whole = [None if t is None else t.contiguous() for t in views]
    for got, expected in zip(launch(views, weights, "point"), launch(whole, weights.contiguous(), "point")):
        torch.testing.assert_close(got, expected)


def test_a_gradient_asked_for_alone_has_the_same_bits():
    check_parts(launch, draw(9, 3, 5, "expected"))


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 2, 0)], ids=str)
def test_empty(shape):
    check(draw(*shape, "expected"), "expected")


def test_what_has_no_kernel_is_refused():
    z, logvar, logits, means, scale = draw(4, 2, 3, "convolved")
    for m, form in ((means, "convolved"), (means.expand(4, -1, -1), "point")):
        inputs, settings = (z, logvar, logits, m, None, scale), (form, "exact")
        assert launcher("gmm_log_prob.fwd")(*inputs, *settings, 1) is NotImplemented
        refused = launcher("gmm_log_prob.bwd")(z[:, 0], z[:, 0], None, *inputs, *inputs, *settings)
        assert refused is NotImplemented


def test_float64_has_no_kernel_where_dot_takes_none(monkeypatch):
    from fastkl.kernels.mixture import gmm_log_prob

    monkeypatch.setattr(gmm_log_prob, "DOT_TAKES_FLOAT64", False)
    for dtype, refused in ((torch.float64, True), (torch.float32, False)):
        z, _, logits, means, scale = draw(4, 2, 3, dtype=dtype)
        inputs = (z.detach(), None, logits.detach(), means.detach(), None, scale.detach(), "point", "exact")
        assert (launcher("gmm_log_prob.fwd")(*inputs, 1) is NotImplemented) == refused


def aot_calls():
    bwd = launcher("gmm_full.bwd")
    calls = {}

    def add(name, shape, form="point", dtype=torch.float32, precision="exact"):
        z, logvar, logits, means, scale = (None if t is None else t.detach() for t in draw(*shape, form, dtype=dtype))
        inputs = (z, logvar, logits, means, None, scale)
        row = torch.zeros(len(z), dtype=reference.compute_dtype(z))
        calls[name] = lambda: bwd(row, row.double(), inputs, inputs, form, precision)  # launches all that fwd does

    add("core exact", (128, 3, 64))  # gfx942's 512 threads load 8 bytes each
    add("aligned tf32x3", (128, 3, 64), precision="tf32x3")
    add("bfloat16", (128, 3, 128), "expected", torch.bfloat16)
    add("odd long rows", (70, 2, 131))
    add("odd tf32x3", (128, 3, 37), precision="tf32x3")
    add("8 columns tf32x3", (128, 3, 8), precision="tf32x3")
    add("aligned tf32", (128, 3, 64), precision="tf32")
    from fastkl.kernels._layout import DOT_TAKES_FLOAT64

    if DOT_TAKES_FLOAT64:
        add("float64", (128, 3, 64), dtype=torch.float64)
        add("odd float64", (70, 3, 37), dtype=torch.float64)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_samples_of_full_covariances_are_rounded_once(dtype):
    torch.manual_seed(0)
    means, scale_tril = torch.randn(3, 8), 0.3 * torch.randn(3, 8, 8).tril(-1) + torch.eye(8)
    given = [tensor.to(dtype).to(DEVICE) for tensor in (torch.zeros(3), means, scale_tril)]
    z, component = fastkl.sample_gmm(*given[:2], scale_tril=given[2], num_samples=200, seed=1)
    wide = [tensor.double() for tensor in given]
    eps = fastkl.sample_gmm(wide[0], 0 * wide[1], num_samples=200, seed=1)[0]
    exact = wide[1][component] + (wide[2][component] @ eps.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(z.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=1e-5)
