"""kl_gmm_bounds: both bounds from one pass, against the float64 definition and against one call for each."""

import importlib
import math

import pytest
import torch

import fastkl
from fastkl import reference

from gmm_helpers import outputs
from helpers import DEVICE, assert_as_good_as_eager, implementation, launcher, leaf

# (rows, components, columns): why
SHAPES = [
    (5, 3, 8),  # less than a tile of everything
    (70, 20, 5),  # odd columns; rows and components that fill no tile
    (9, 1, 1),  # one component, one column
    (3, 300, 2),  # few rows, components split over programs, the last tile mostly padding
    (300, 3, 4),  # many rows, split over programs for the parameters
    (5, 3, 35),  # many columns: two blocks of prepared parameters
]
SPREADS = {
    "diagonal": lambda k, d: (k, d),
    "spherical": lambda k, d: (k, 1),
    "tied": lambda k, d: (1, d),
    "none": lambda k, d: None,
}


def draw(rows=6, components=4, columns=3, *, spread="diagonal", dtype=torch.float32, offset=0.0):
    generator = torch.Generator().manual_seed(rows + components + columns)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    shape = SPREADS[spread](components, columns)
    tensors = [
        normal(rows, columns) + offset, 0.5 * normal(rows, columns) - 1, normal(components),
        normal(components, columns) + offset, None if shape is None else 0.5 * normal(*shape),
    ]  # fmt: skip
    return [None if t is None else t.to(DEVICE, dtype) for t in tensors]


def evaluate(function, tensors, dtype=None, wanted=(True, True), among=range(5)):
    """[lower, upper, the gradients of a weighted sum of the wanted ones in the tensors named by `among`]."""
    leaves = [None if t is None else leaf(t if dtype is None else t.to(dtype)) for t in tensors]
    for index, tensor in enumerate(leaves):
        if tensor is not None:
            tensor.requires_grad_(index in among)
    bounds = function(*leaves)
    weights = (
        torch.linspace(-1, 2, len(tensors[0]), device=DEVICE),
        torch.linspace(1.5, -1, len(tensors[0]), device=DEVICE),
    )
    total = sum((weight.to(b) * b).sum() for b, weight, want in zip(bounds, weights, wanted) if want)
    inputs = [t for t in leaves if t is not None and t.requires_grad]
    return [*(b.detach() for b in bounds), *torch.autograd.grad(total, inputs)]


def fused(*tensors):
    with implementation("triton"):
        return fastkl.kl_gmm_bounds(*tensors)


def fused_results(tensors, **options):
    """Backward through the kernels as well."""
    with implementation("triton"):
        return evaluate(fastkl.kl_gmm_bounds, tensors, **options)


def check(tensors, units=8.0, **options):
    """The error against the float64 definition is at most that of the definition in the compute dtype, plus rounding.

    A last place of the log-densities is a relative error of every weight.
    """
    dtype = reference.compute_dtype(*tensors)
    actual = fused_results(tensors, **options)
    exact = evaluate(reference.kl_gmm_bounds, tensors, torch.float64, **options)
    eager = evaluate(reference.kl_gmm_bounds, tensors, dtype, **options)
    size = torch.finfo(dtype).eps * (2 + max(bound.abs().max().item() for bound in exact[:2]))
    for got, naive, truth in zip(actual, eager, exact, strict=True):
        scale = max(1.0, truth.abs().max().item())  # terms of a sum cancel: its rounding is relative to the largest
        assert_as_good_as_eager(got, naive, truth, units=units + size / torch.finfo(got.dtype).eps, scale=scale)
    return actual


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape):
    check(draw(*shape))


@pytest.mark.parametrize("spread", SPREADS)
def test_covariances_that_broadcast(spread):
    check(draw(6, 18, 6, spread=spread))


def test_one_program_adds_up_many_tiles(monkeypatch):
    """As with millions of rows, where one program handles many tiles and accumulates in the outputs."""
    for module in ("_mixture_tiles", "_bounds"):
        monkeypatch.setattr(importlib.import_module(f"fastkl.kernels.mixture.{module}"), "PROGRAMS", 1)
    check(draw(70, 20, 2))
    check(draw(33, 60, 2, dtype=torch.bfloat16), units=2.0)  # sums are not rounded to 16 bits on the way


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    tensors = draw(12, 35, 3, dtype=dtype)
    lower, upper, *gradients = check(tensors, units=2.0 if dtype.itemsize == 2 else 8.0)
    assert lower.dtype == upper.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert {gradient.dtype for gradient in gradients} == {dtype}


@pytest.mark.parametrize("wanted", [(True, False), (False, True)], ids=["lower", "upper"])
def test_gradient_of_one_bound_alone(wanted):
    check(draw(20, 6, 3), wanted=wanted)


@pytest.mark.parametrize("wanted", [(True, True), (True, False)], ids=["both", "lower"])
def test_gradients_in_16_bits_are_rounded_once(wanted):
    """Also where each bound has an op of its own, as in torch ops."""
    tensors = draw(dtype=torch.bfloat16)
    narrow, wide = (evaluate(fastkl.kl_gmm_bounds, tensors, t, wanted) for t in (torch.bfloat16, torch.float32))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(narrow, wide, strict=True))


def test_gradients_of_data_and_of_parameters_alone_are_the_same_bits():
    tensors = draw(20, 6, 3)
    everything = fused_results(tensors)
    data, parameters = (fused_results(tensors, among=among) for among in ((0, 1), (2, 3, 4)))
    assert all(torch.equal(a, b) for a, b in zip(everything, [*data, *parameters[2:]], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(everything, fused_results(tensors), strict=True))


def test_strided_inputs_are_read_where_they_lie():
    mu, logvar, logits, means, logvars = draw(12, 5, 4)
    wide = torch.cat([mu, logvar], 1)
    head = wide[:, :4], wide[:, 4:]
    transposed = means.t().contiguous().t()
    for view in (head, (wide[:, ::2], logvar), (mu[:1].expand(12, 4), logvar[:1].expand(12, 4))):
        check([*view, logits, transposed, logvars])
    check([mu.t().contiguous().t(), logvar, logits.repeat_interleave(2)[::2], means, logvars[:1].expand(5, 4)])


def total(bounds):
    """A loss whose gradient has a stride of 0 in one bound and not in the other."""
    return bounds[0].sum() + (bounds[1] * torch.linspace(-1, 1, len(bounds[1]), device=DEVICE)).sum()


def test_gradient_of_a_sum():
    tensors = [leaf(tensor) for tensor in draw(20, 5, 4)]
    with implementation("triton"):
        actual = torch.autograd.grad(total(fastkl.kl_gmm_bounds(*tensors)), tensors)
    exact = torch.autograd.grad(total(reference.kl_gmm_bounds(*tensors)), tensors)
    torch.testing.assert_close(actual, exact, rtol=1e-4, atol=1e-4)


def test_components_of_no_weight():
    """A whole tile of them, and a single one: exact value, no NaN, no gradient."""
    tensors = draw(8, 80, 3)
    tensors[2][:70] = -math.inf
    tensors[2][72] = -math.inf
    for gradient in check(tensors)[4:]:
        assert (gradient[:70] == 0).all()
        assert (gradient[72] == 0).all()


def test_narrow_components_far_from_zero():
    """sigma = 0.1, means around 10 and of size 10: within 1e-4 nats of float64."""
    for scale, offset in ((1.0, 10.0), (10.0, 0.0)):
        mu, logvar, logits, means, logvars = draw(40, 20, 8, offset=offset)
        means = scale * (means - offset) + offset
        mu = means[torch.arange(40, device=DEVICE) % 20] + 0.1 * (mu - offset)
        tensors = mu, torch.full_like(logvar, -6.0), logits, means, torch.full_like(logvars, 2 * math.log(0.1))
        exact = reference.kl_gmm_bounds(*(tensor.double() for tensor in tensors))
        for bound, truth in zip(fused(*tensors), exact):
            assert (bound - truth).abs().max() < 1e-4


def test_rows_far_from_equal_components():
    """Where a last place of the log-density is larger than ln K, the weights still add up to one."""
    mu, logvar, logits, means, logvars = draw(6, 4, 3)
    tensors = mu + 1e4, logvar, torch.zeros_like(logits), means[:1].expand(4, 3), logvars[:1].expand(4, 3) - 6
    actual = fused_results(tensors, among=(0, 1))
    exact = evaluate(reference.kl_gmm_bounds, tensors, torch.float64, among=(0, 1))
    assert exact[1].abs().min() > 1e9
    for got, truth in zip(actual, exact, strict=True):
        torch.testing.assert_close(got.double(), truth, rtol=1e-5, atol=1e-5 * truth.abs().max().item())


@pytest.mark.parametrize("far", [1.0, 1e4])
@pytest.mark.parametrize("difference", [-60.0, -20.0, 20.0, 50.0])
def test_scales_far_apart(difference, far):
    """exp(difference) is the variance of q in units of the component's; at 50 a product of a few exceeds float32."""
    mu, logvar, logits, means, logvars = draw(10, 9, 12)
    tensors = [mu * far, logvar + difference / 2, logits, means, logvars - difference / 2]
    exact = reference.kl_gmm_bounds(*(tensor.double() for tensor in tensors))
    for bound, truth in zip(fused(*tensors), exact):
        torch.testing.assert_close(bound.double(), truth, rtol=2e-6, atol=1e-6 * abs(difference))  # of logarithms
    assert all(gradient.isfinite().all() for gradient in fused_results(tensors))


def by_two_calls(*tensors, **options):
    return tuple(fastkl.kl_gmm(*tensors, method=method, **options) for method in ("lower", "upper"))


OTHERS = {
    "weights of each row": lambda t: ([*t[:2], t[2].expand(6, 4) + t[0][:, :1], *t[3:]], {}),
    "a mixture for each datum": lambda t: ([*t[:3], t[3] + t[0][:, None], t[4]], {}),
    "full covariance": lambda t: ([*t[:4], None], {"scale_tril": torch.eye(3, device=DEVICE).expand(4, 3, 3) * 1.5}),
    "tensor cores": lambda t: (t, {"precision": "tf32x3"}),
    "one point": lambda t: ([t[0][0], t[1][0], *t[2:]], {}),
    "samples of a batch": lambda t: ([t[0].view(2, 3, 3), t[1][:3], *t[2:]], {}),
}


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_mixtures_and_shapes(name, backend):
    tensors, options = OTHERS[name](draw())
    results = []
    for function in (fastkl.kl_gmm_bounds, by_two_calls):
        leaves = [None if t is None else leaf(t) for t in tensors]
        with implementation(backend):
            bounds = function(*leaves, **options)
            inputs = [t for t in leaves if t is not None]
            results.append([*bounds, *torch.autograd.grad((bounds[0] - 2 * bounds[1]).square().sum(), inputs)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_shared_mixture_takes_one_pass_and_saves_two_numbers_a_row():
    mu, logvar, logits, means, logvars = draw()
    fwd = launcher("kl_gmm_bounds.fwd")
    inputs = (mu, logvar, logits[None], means[None], logvars[None], None)
    lower, upper, *kept = fwd(*inputs, "exact", 1)
    assert [tensor.shape for tensor in (lower, upper, *kept)] == [(6,)] * 4
    assert {tensor.dtype for tensor in kept} == {torch.float64}
    assert fwd(*inputs, "tf32x3", 1) is NotImplemented  # the mixture's own kernels do that, bound by bound


def aot_calls():
    fwd, bwd = launcher("kl_gmm_bounds.fwd"), launcher("kl_gmm_bounds.bwd")
    calls = {}

    def add(name, rows, components, columns, dtype=torch.float32, spread=True):
        mu, means = torch.empty(rows, columns, dtype=dtype), torch.empty(1, components, columns, dtype=dtype)
        inputs = (mu, mu, torch.empty(1, components, dtype=dtype), means, means if spread else None, None)
        gradient, lp = torch.empty(rows, dtype=reference.compute_dtype(mu)), torch.empty(rows, dtype=torch.float64)
        few = "few rows" in name  # where only the kernel by rows is another
        if not few:
            calls[f"{name} fwd"] = lambda: fwd(*inputs, "exact", 1)
        own = outputs(inputs, {0, 1} if few else None)
        # Sums over rows read mu by fewer bytes: a whole tile of four columns has less than 16 bytes for each thread.
        calls[f"{name.replace('aligned', 'whole rows')} bwd"] = lambda: bwd(
            gradient, gradient, lp, None, lp, None, *inputs, *own, "exact"
        )

    many, few = 70000, 4096  # rows; fewer than 32768 choose the tiles in which warps share sums
    add("core aligned for 32 lanes", many, 512, 64)
    add("core few rows", few, 512, 64)
    add("core float64", many, 512, 64, torch.float64)
    add("core odd", many, 512, 63)
    add("core odd few rows, bfloat16", few, 512, 63, torch.bfloat16)
    add("few rows float64, odd", few, 512, 63, torch.float64)
    add("float64, odd", many, 512, 63, torch.float64)
    add("few rows float64", few, 512, 64, torch.float64)
    add("bfloat16", many, 512, 64, torch.bfloat16)
    add("unit variance", many, 37, 37, torch.float16, spread=False)
    add("small", 33, 20, 7)
    add("few rows and components", few, 20, 64)
    add("small, float64", 20, 20, 8, torch.float64)
    add("few components and columns, bfloat16", 33, 3, 8, torch.bfloat16)
    add("rows of 40", many, 512, 40)
    return calls
