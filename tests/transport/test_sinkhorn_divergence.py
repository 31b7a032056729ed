"""sinkhorn_divergence against GeomLoss, the dense definition in float64, and finite differences."""

import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops.transport import _sinkhorn, sinkhorn_divergence

from helpers import DEVICE, DTYPES, Package, assert_as_good_as_eager, implementation, leaf, peak_bytes

geomloss = Package("geomloss")


def draw(n, m, dimensions=3, dtype=torch.float64, centre=0.0):
    """[x, y, weights of x, weights of y]."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, dimensions, generator=generator, dtype=torch.float64) for rows in (n, m))
    weights = [torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1 for rows in (n, m)]
    tensors = (x + centre, 0.5 * y + 0.7 + centre, *(w / w.sum() for w in weights))
    return [leaf(tensor.to(dtype)) for tensor in tensors]


def run(function, tensors, *arguments, **settings):
    x, y, *weights = tensors
    names = dict(zip(("weights_x", "weights_y"), weights))
    value = function(x, y, *arguments, **names, **settings)
    return [value, *torch.autograd.grad(value, tensors)]


def by_geomloss(x, y, blur=0.05, *, weights_x, weights_y, **settings):
    loss = geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, backend="tensorized", **settings)
    return loss(weights_x, x, weights_y, y)


def without_loops(monkeypatch):
    monkeypatch.setattr(sinkhorn_divergence, "by_loops", lambda *arguments: NotImplemented)


@pytest.fixture
def general(monkeypatch):
    """The path of GPUs, by gmm_log_prob."""
    without_loops(monkeypatch)
    monkeypatch.setattr(sinkhorn_divergence, "Products", lambda x, y, centre: _sinkhorn.Softmin(x, y))


# (n, m, dimensions): why
SHAPES = [(20, 15, 3), (1, 1, 2), (1, 6, 1), (40, 70, 2)]  # the last: several tiles either way, and mirrored


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize("blur", [0.02, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_agree_with_geomloss(monkeypatch, shape, blur, debias, loops):
    if not loops:
        without_loops(monkeypatch)
    monkeypatch.setattr(_sinkhorn, "TILE", (16, 32))
    tensors, settings = draw(*shape), {"blur": blur, "debias": debias}
    expected = run(by_geomloss, tensors, **settings)
    scale = tensors[0].detach().abs().max() ** 2
    for function in (fastkl.sinkhorn_divergence, reference.sinkhorn_divergence):
        for got, truth in zip(run(function, tensors, **settings), expected):
            torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-12 * scale.item())


def test_the_path_of_gpus_agrees(general):
    for shape, scaling in (((20, 15, 3), 0.5), ((9, 9, 2), 0.8)):
        tensors, settings = draw(*shape), {"blur": 0.1, "scaling": scaling}
        torch.testing.assert_close(
            run(fastkl.sinkhorn_divergence, tensors, **settings), run(by_geomloss, tensors, **settings)
        )


def test_kernels(general):
    tensors, settings = draw(5, 4, dtype=torch.float32), {"blur": 1.0, "diameter": 2.0}
    with implementation("triton"):
        actual = run(fastkl.sinkhorn_divergence, tensors, **settings)
    torch.testing.assert_close(actual, run(by_geomloss, tensors, **settings), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loops", [True, False])
@pytest.mark.parametrize("centre", [0.0, 100.0])
@pytest.mark.parametrize("blur", [0.02, 0.3])
def test_float32_is_as_good_as_geomloss_near_and_far_from_the_origin(monkeypatch, blur, centre, loops):
    """GeomLoss expands |x - y|^2 around the origin: at a distance of 100 nothing is left of it at blur = 0.02."""
    if not loops:
        without_loops(monkeypatch)
    tensors = draw(60, 50, dtype=torch.float32, centre=centre)
    exact = run(by_geomloss, [leaf(t.double()) for t in tensors], blur)
    eager = run(by_geomloss, tensors, blur)
    for got, naive, truth in zip(run(fastkl.sinkhorn_divergence, tensors, blur), eager, exact):
        assert_as_good_as_eager(got, naive, truth, units=8.0, scale=exact[0].detach())
    if centre:
        errors = [(run(fastkl.sinkhorn_divergence, tensors, blur)[1] - exact[1]).abs().max(),
                  (eager[1] - exact[1]).abs().max()]  # fmt: skip
        assert 100 * errors[0] < errors[1]


def test_gradient_is_that_of_the_converged_value():
    """By finite differences; GeomLoss's is 0.7 per cent off here, as it is without final updates."""
    x, y, *weights = draw(8, 6)
    settings = {"blur": 1.0, "final_updates": 60}
    value = fastkl.sinkhorn_divergence(x, y, weights_x=weights[0], weights_y=weights[1], **settings)
    gradients = torch.autograd.grad(value, (x, y))
    with torch.no_grad():
        for points, gradient in zip((x, y), gradients):
            step = 1e-4 * torch.linspace(-1, 1, points.numel(), dtype=points.dtype, device=DEVICE).view(points.shape)
            values = []
            for sign in (1, -1):
                points += sign * step
                values.append(fastkl.sinkhorn_divergence(x, y, weights_x=weights[0], weights_y=weights[1], **settings))
                points -= sign * step
            expected = (gradient * step).sum().item()
            assert (values[0] - values[1]).item() / 2 == pytest.approx(expected, rel=1e-4)


def test_same_sample_has_no_divergence_and_no_gradient():
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 1e-5)):
        x = draw(600, 1, dtype=dtype)[0]
        y = leaf(x)
        value = fastkl.sinkhorn_divergence(x, y, 0.3)
        gradients = torch.autograd.grad(value, (x, y))
        assert abs(value) < tolerance
        assert all((600 * gradient).abs().max() < tolerance for gradient in gradients)


def test_identical_points():
    """GeomLoss takes the logarithm of a diameter of 0."""
    x, y = leaf(torch.ones(3, 2)), leaf(torch.ones(4, 2))
    value = fastkl.sinkhorn_divergence(x, y)
    gradients = torch.autograd.grad(value, (x, y))
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_leaves_the_gradient_mode_alone():
    """GeomLoss turns gradients on for good, also inside torch.no_grad()."""
    x, y, *_ = draw(4, 3)
    with torch.no_grad():
        fastkl.sinkhorn_divergence(x, y)
        assert not torch.is_grad_enabled()
        geomloss.SamplesLoss("sinkhorn")(x, y)
        assert torch.is_grad_enabled()


def test_tends_to_the_squared_wasserstein_distance():
    """Half of it, of a shift and a sample: |shift|^2 / 2."""
    x = draw(200, 1)[0].detach()
    value = fastkl.sinkhorn_divergence(x, x + torch.tensor([3.0, 0.0, 4.0], device=DEVICE), 0.01)
    assert value.item() == pytest.approx(12.5, rel=1e-6)


@pytest.mark.parametrize("scaling", [0.5, 0.01])
def test_potentials_far_from_their_update(scaling):
    """A fast schedule: exponentials leave the range of float32, and those of the last step that of float64."""
    tensors, settings = draw(40, 30, dtype=torch.float32), {"blur": 0.01, "scaling": scaling}
    exact = run(by_geomloss, [leaf(t.double()) for t in tensors], **settings)
    eager = run(by_geomloss, tensors, **settings)
    for got, naive, truth in zip(run(fastkl.sinkhorn_divergence, tensors, **settings), eager, exact):
        assert_as_good_as_eager(got, naive, truth, units=8.0, scale=exact[0].detach())


def test_weights_of_zero_and_uniform_weights():
    x, y, *_ = draw(8, 6)
    weights = torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1], dtype=torch.float64, device=DEVICE) / 6
    value = fastkl.sinkhorn_divergence(x, y, weights_x=weights, diameter=9.0)
    torch.testing.assert_close(value, fastkl.sinkhorn_divergence(x[2:], y, diameter=9.0))
    assert (torch.autograd.grad(value, x)[0][:2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype):
    tensors = draw(9, 8, dtype=dtype)[:2]
    value, *gradients = run(fastkl.sinkhorn_divergence, tensors, 0.3)
    expected = run(fastkl.sinkhorn_divergence, [leaf(t.double()) for t in tensors], 0.3)
    assert value.dtype == reference.compute_dtype(*tensors)
    assert [g.dtype for g in gradients] == [dtype] * 2
    torch.testing.assert_close([t.double() for t in (value, *gradients)], expected, rtol=1e-2, atol=1e-3)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(run(fastkl.sinkhorn_divergence, tensors, 0.3)[0], value)


@pytest.mark.skipif(DEVICE == "cuda", reason="the profiler's account of CPU memory")
def test_memory():
    tensors = [leaf(torch.randn(1500, 4)) for _ in range(2)]
    peak = peak_bytes(lambda: run(fastkl.sinkhorn_divergence, tensors, 1.0, diameter=2.0))
    assert peak < 6 * 2**20  # N x M in float32 is 9


def test_transforms():
    """vmap, one at a time; torch.func.grad; torch.compile with a diameter; no second derivative."""
    x, y, *_ = draw(5, 4)

    def function(x, y):
        return fastkl.sinkhorn_divergence(x, y, 1.5, diameter=1.0)

    expected = torch.stack([function(x * scale, y) for scale in (1, 2)])
    torch.testing.assert_close(torch.func.vmap(function, (0, None))(torch.stack([x, 2 * x]), y), expected)
    (gradient,) = torch.autograd.grad(function(x, y), x)
    torch.testing.assert_close(torch.func.grad(function)(x.detach(), y.detach()), gradient)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    value = compiled(x, y)
    torch.testing.assert_close(value, function(x, y))
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], gradient)
    (gradient,) = torch.autograd.grad(function(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.sum(), x)


def test_a_second_derivative_in_the_weights_is_refused_and_not_missing():
    x, y, weights_x, weights_y = draw(5, 4)
    value = fastkl.sinkhorn_divergence(x.detach(), y.detach(), 1.0, weights_x=weights_x, weights_y=weights_y.detach())
    (gradient,) = torch.autograd.grad(value, weights_x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gradient.square().sum() + weights_x.sum(), weights_x)


@pytest.mark.parametrize(
    ("shapes", "settings", "error", "match"),
    [
        ([(3, 2), (3,)], {}, ValueError, r"y must be points \[N, D\]"),
        ([(0, 2), (3, 2)], {}, ValueError, "x must have at least one point"),
        ([(3, 2), (3, 4)], {}, ValueError, "as many dimensions"),
        ([(3, 2), (3, 2)], {"blur": 0}, ValueError, "blur must be a finite number above 0"),
        ([(3, 2), (3, 2)], {"scaling": 1.0}, ValueError, "scaling must be below 1"),
        ([(3, 2), (3, 2)], {"diameter": 0.0}, ValueError, "diameter must be a finite number above 0"),
        ([(3, 2), (3, 2)], {"blur": "1"}, TypeError, "blur must be a number"),
        ([(3, 2), (3, 2)], {"weights_x": torch.ones(2) / 2}, ValueError, r"weights_x must have a weight .* \(3,\)"),
        ([(3, 2), (3, 2)], {"weights_x": torch.ones(3)}, ValueError, "same sum above 0, got 3 and 1"),
        ([(3, 2), (3, 2)], {"weights_y": torch.tensor([2.0, -1, 0])}, ValueError, "weights_y must be 0 or more"),
        ([(3, 2), (3, 2)], {"weights_y": 1.0}, TypeError, r"weights_y must be a torch\.Tensor"),
    ],
)
def test_errors_name_the_argument(shapes, settings, error, match):
    with pytest.raises(error, match=match):
        fastkl.sinkhorn_divergence(*(torch.ones(shape) for shape in shapes), **settings)


@pytest.mark.parametrize("blur", [1e-12, 1e-20, 1e-170])
@pytest.mark.parametrize("shift", [0.0, 2.0])
def test_a_blur_of_next_to_nothing_is_the_transport_distance(blur, shift):
    """In one dimension the transport of sorted points; blur^2 is no float32, and for the least no number at all."""
    x = torch.tensor([[0.0], [1.0], [3.0]], requires_grad=True)
    value = fastkl.sinkhorn_divergence(x, x.detach().flip(0) + shift, blur)
    assert value.item() == pytest.approx(0.5 * shift**2, rel=1e-5, abs=1e-6)
    assert torch.autograd.grad(value, x)[0].isfinite().all()
    together = fastkl.sinkhorn_divergence(torch.ones(3, 2), torch.ones(4, 2), blur)
    assert together.item() == pytest.approx(0.0, abs=1e-6)
    assert reference.sinkhorn_divergence(x, x.detach() + shift, blur).item() == pytest.approx(0.5 * shift**2, rel=1e-5)


@pytest.mark.parametrize("name", ["x", "y"])
@pytest.mark.parametrize("diameter", [None, 3.0])
def test_an_infinite_coordinate_is_named(name, diameter):
    points = {"x": torch.zeros(4, 2), "y": torch.ones(3, 2)}
    points[name][1, 1] = float("-inf")
    with pytest.raises(ValueError, match=f"{name} must have finite coordinates"):
        fastkl.sinkhorn_divergence(**points, diameter=diameter)
    far = {"x": torch.full((2, 2), 3e38), "y": torch.full((2, 2), -3e38)}
    with pytest.raises(ValueError, match="x and y must lie in a box of finite size"):
        fastkl.sinkhorn_divergence(**far)
