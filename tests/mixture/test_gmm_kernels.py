"""The mixture launchers for one shared mixture, called directly, against the float64 definition and its gradients."""

import importlib
import math

import pytest
import torch

from fastkl import reference

from gmm_helpers import outputs
from helpers import DEVICE, launcher
from shared_mixture import FORMS, check_log_prob, draw, joint

# (rows, components, columns): why
SHAPES = [
    (5, 3, 8),  # less than a tile of everything
    (70, 20, 5),  # odd columns; rows and components that fill no tile
    (9, 1, 1),  # one component, one column
    (3, 70, 2),  # few rows, components split over programs, the last tile mostly padding
    (520, 9, 3),  # many rows, split over programs for the parameters, each with its own block of components
    (5, 3, 35),  # many columns: two blocks of prepared parameters
    (4, 3, 0),  # no columns: the normaliser and the gradient of logits still have to cancel
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, form):
    check_log_prob(draw(*shape, form=form), form)


@pytest.mark.parametrize("form", FORMS)
def test_one_program_adds_up_many_tiles(form, monkeypatch):
    """As with millions of rows, where one program handles many tiles and accumulates in the outputs."""
    kernels = importlib.import_module("fastkl.kernels.mixture._mixture_tiles")
    monkeypatch.setattr(kernels, "PROGRAMS", 1)
    monkeypatch.setitem(importlib.import_module("fastkl.kernels.mixture._mixture_prepare").PREPARE, "LOGITS", 16)
    check_log_prob(draw(520, 3, 2, form=form), form)
    check_log_prob(draw(3, 20, 2, form=form), form)
    monkeypatch.setattr(kernels, "PROGRAMS", 2)  # two programs share the components, one of them has two tiles
    check_log_prob(draw(3, 40, 2, form=form), form)


def test_more_components_for_each_program(monkeypatch):
    """As on a full GPU: 16 lanes instead of 4 in the kernel by components."""
    kernels = importlib.import_module("fastkl.kernels.mixture._mixture_tiles")
    monkeypatch.setattr(kernels, "ENOUGH", 1)
    settings = {"own": False, "scattered": "tail"}
    assert kernels.blocks(torch.float32, "point", "components", 210, 40, **settings)["LANES"] == 16
    check_log_prob(draw(210, 40, 2))


@pytest.mark.parametrize("form", FORMS[1:])
def test_parts_are_added_up_in_several_blocks(form, monkeypatch):
    kernels = importlib.import_module("fastkl.kernels.mixture._mixture_components")
    monkeypatch.setitem(kernels.FINISH, "COMPONENTS", 2)
    monkeypatch.setitem(kernels.FINISH, "COLUMNS", 2)
    check_log_prob(draw(520, 3, 3, form=form), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("spread", ["spherical", "tied", None])
def test_covariances_that_broadcast(spread, form):
    check_log_prob(draw(6, 18, 6, form=form, spread=spread), form)


@pytest.mark.parametrize("logit_rows", [1, 20])
def test_gradients_of_data_and_of_parameters_alone(logit_rows):
    check_log_prob(draw(40, 10, 3, form="expected", logit_rows=logit_rows), "expected", separately=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, form, monkeypatch):
    """Sums over several tiles, which one program adds up, are not rounded to 16 bits on the way."""
    check_log_prob(draw(12, 35, 3, form=form, dtype=dtype), form, units=2.0 if dtype.itemsize == 2 else 8.0)
    if dtype.itemsize == 2:
        monkeypatch.setattr(importlib.import_module("fastkl.kernels.mixture._mixture_tiles"), "PROGRAMS", 1)
        check_log_prob(draw(520, 3, 2, form=form, dtype=dtype), form, units=2.0)
        check_log_prob(draw(3, 20, 2, form=form, dtype=dtype), form, units=2.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("logit_rows", [12, 6, 4])
def test_logits_per_row(logit_rows, form):
    dtype = torch.bfloat16 if logit_rows == 6 else torch.float32
    tensors = draw(12, 10, 3, form=form, logit_rows=logit_rows, dtype=dtype)
    check_log_prob(tensors, form, units=2.0 if dtype.itemsize == 2 else 8.0)


def test_sums_of_many_terms_are_rounded_once(monkeypatch):
    """Roundings to 16 bits after each row that shares logits, or after each tile of components, would add up."""
    check_log_prob(draw(96, 10, 3, logit_rows=3, dtype=torch.bfloat16), units=1.0)
    monkeypatch.setattr(importlib.import_module("fastkl.kernels.mixture._mixture_tiles"), "PROGRAMS", 1)
    check_log_prob(draw(3, 130, 2, dtype=torch.bfloat16), units=1.0)


def test_strided_inputs_are_read_where_they_lie():
    z, _, logits, means, logvars = draw(36, 5, 8)
    wide = torch.cat([z, z], 1)
    transposed = means.mT.contiguous().mT
    for view in (wide[:, ::2], wide[:, 4:12], wide[:1].expand(36, 16)[:, 1:9], z.t().contiguous().t(), z[::2]):
        check_log_prob([view, None, logits, transposed, logvars.expand(1, 5, 8)])
    logvar = wide[:, :8] - 2
    check_log_prob([z, logvar.t().contiguous().t(), logits.repeat(1, 2)[:, ::2], means, logvars], "expected")


def test_gradient_of_a_sum_and_empty_batches():
    tensors = draw(40, 5, 4)
    check_log_prob(tensors, dlp=torch.ones((), device=DEVICE).expand(40))  # stride 0
    lp, gradients = check_log_prob([tensors[0][:0], None, *tensors[2:]])
    assert lp.shape == (0,)
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("form", FORMS)
def test_components_of_no_weight(form, monkeypatch):
    """A whole tile of them, and a single one: exact value, no NaN, no gradient."""
    monkeypatch.setitem(importlib.import_module("fastkl.kernels.mixture._mixture_prepare").PREPARE, "LOGITS", 16)
    z, logvar, logits, means, logvars = draw(8, 40, 3, form=form)
    logits[:, :34] = -math.inf
    logits[:, 36] = -math.inf
    _, gradients = check_log_prob([z, logvar, logits, means, logvars], form)
    for gradient in gradients[-3:]:
        assert (gradient[0, :34] == 0).all()
    own = logits.repeat(4, 1)
    own[3, 38:] = -math.inf
    check_log_prob([z, logvar, own, means, logvars], form)


def test_rows_far_from_every_component():
    z, _, logits, means, _ = draw(6, 20, 4)
    means *= 100
    z[1:4] += 1e4
    logvars = torch.full((1, 1, 4), 2 * math.log(0.01), device=DEVICE)
    lp, gradients = check_log_prob([z, None, logits, means, logvars])
    assert lp[1] < -1e8
    assert all(g.isfinite().all() for g in gradients)


def test_narrow_components_far_from_zero():
    """sigma = 0.1, means around 10 and of size 10: within 1e-4 nats of float64; a shift changes only rounding."""
    for scale, offset in ((1.0, 10.0), (10.0, 0.0)):
        z, _, logits, means, logvars = draw(100, 20, 16, offset=offset)
        means = scale * (means - offset) + offset
        z = means[0, torch.arange(100, device=DEVICE) % 20] + 0.1 * (z - offset)
        logvars = torch.full_like(logvars, 2 * math.log(0.1))
        fwd = launcher("gmm_log_prob.fwd")
        lp = fwd(z, None, logits, means, logvars, None, "point", "exact", 0)[0]
        exact = joint([z, None, logits, means, logvars], "point")[1].logsumexp(-1)
        assert (lp - exact).abs().max() < 1e-4


def test_a_common_shift_changes_next_to_nothing():
    z, _, logits, means, _ = draw(20, 5, 8)
    z, means = (t.mul(256).round() / 256 for t in (z, means))  # so that the shift itself is exact
    logvars = torch.full_like(means, 2 * math.log(0.3))
    at_rest, shifted = (
        launcher("gmm_log_prob.fwd")(z + shift, None, logits, means + shift, logvars, None, "point", "exact", 0)[0]
        for shift in (0, 1024)
    )
    torch.testing.assert_close(at_rest, shifted, rtol=1e-6, atol=1e-5)


def aot_calls():
    log_prob, responsibilities = launcher("gmm_log_prob.fwd"), launcher("gmm_responsibilities.fwd")
    moments, dlog_prob = launcher("gmm_moments.fwd"), launcher("gmm_log_prob.bwd")
    dresponsibilities = launcher("gmm_responsibilities.bwd")
    calls = {}

    def add(name, rows, components, columns, form="point", dtype=torch.float32, logit_rows=1, wanted=None):
        z, means = torch.empty(rows, columns, dtype=dtype), torch.empty(1, components, columns, dtype=dtype)
        logits, logvar = torch.empty(logit_rows, components, dtype=dtype), None if form == "point" else z
        inputs = (z, logvar, logits, means, means, None)
        dlp, lp = torch.empty(rows, dtype=reference.compute_dtype(z)), torch.empty(rows, dtype=torch.float64)
        few = "few rows" in name  # where only the kernel by rows is another
        if not few and wanted is None:
            calls[f"{name} {form} fwd"] = lambda: log_prob(*inputs, form, "exact", 1)
        # Sums over rows read z by fewer bytes: a whole tile of four columns has less than 16 bytes for each thread.
        own = outputs(inputs, {0, 1} if few else wanted)
        calls[f"{name.replace('aligned', 'whole rows')} {form} bwd"] = lambda: dlog_prob(
            dlp, lp, None, *inputs, *own, form, "exact"
        )

    many, few = 70000, 4096  # rows; fewer than 32768 choose the tiles in which warps share sums
    add("core aligned", many, 512, 64)
    add("core few rows", few, 512, 64)
    for form in FORMS[1:]:
        add("aligned" if form == "expected" else "", many, 512, 64, form)
        add("few rows", few, 512, 64, form)
        add("few rows float64", few, 512, 64, form, torch.float64)
        add("few rows, logits per row, bfloat16", few, 512, 63, form, torch.bfloat16, few // 4)
    add("float64", many, 512, 64, "expected", torch.float64)
    add("logits per row", many, 512, 64, logit_rows=many)
    add("float64, logits per row", many, 512, 64, "convolved", torch.float64, many)
    add("bfloat16", many, 512, 64, dtype=torch.bfloat16)
    for form in FORMS:
        add("aligned, means alone", many, 512, 64, form, wanted={3})
    add("logits of each row alone", many, 512, 64, "expected", logit_rows=many, wanted={2})
    add("odd", many, 37, 37, "expected", torch.float16)
    add("small", 33, 20, 7)
    add("aligned, many components", few, 65536, 8)
    add("aligned, few rows, long", few, 3, 4096)
    # Rows of no multiple of 16 elements: a pointer to each, the more in a thread, the fewer the components.
    for form, dtype in (("point", torch.float32), ("expected", torch.float64), ("convolved", torch.float32)):
        add("few components and columns", 33, 3, 8, form, dtype)
    add("core rows of 40", many, 512, 40)
    add("rows of 40", many, 512, 40, "convolved")

    z, logits, means = torch.empty(few, 64), torch.empty(1, 512), torch.empty(1, 512, 64)
    for name, own in (("", logits), (", logits per row", torch.empty(few, 512))):
        inputs, log_r = (z, own, means, means, None), torch.empty(few, 512)
        calls[f"responsibilities{name} fwd"] = lambda inputs=inputs: responsibilities(*inputs, "exact")
        calls[f"responsibilities{name} bwd"] = lambda inputs=inputs, log_r=log_r: dresponsibilities(
            log_r, log_r, *inputs, *inputs, "exact"
        )
    calls["moments"] = lambda: moments(z, logits, means, means, None)
    return calls
