"""kl_normal: both implementations against the float64 definition, torch.distributions and scipy."""

import math

import pytest
import torch

import fastkl
from fastkl import reference

from helpers import DEVICE, DTYPES, Package, assert_as_good_as_eager, empty_like, implementation, launcher, leaf

integrate = Package("scipy.integrate")
stats = Package("scipy.stats")

# (shape, event_ndim): why
SHAPES = [
    ((8, 64), 1),  # aligned rows
    ((130, 300), 1),  # several blocks of rows in one partial sum of a shared prior
    ((3, 37), 1),  # odd columns: masked tail, unaligned rows
    ((2, 5000), 1),  # a long row, several programs share it
    ((300, 1), 1),  # many rows of one element
    ((5, 3, 20), 1),  # tokens: two batch dimensions
    ((2, 4, 6, 5), 3),  # images
    ((1, 2, 3, 4, 5), 4),  # video
    ((7,), 1),  # one sample, no batch dimension
    ((0, 4), 1),  # empty batch
    ((3, 0), 1),  # empty event: KL 0
]
both = pytest.mark.parametrize("backend", ["torch", "native", "triton"])


def draw(shape, dtype, scale="logvar", prior=None, seed=0, spread=1.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(shape):
        return (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    event = shape[1:] if prior == "shared" else shape
    second = normal(shape).abs() + 0.1 if scale == "std" else normal(shape)
    return [leaf(x) for x in (normal(shape), second, *((normal(event), normal(event)) if prior else ()))]


def run(function, tensors, weights, **settings):
    """Value and gradients of sum(weights * KL)."""
    value = function(*tensors, **settings)
    return [value, *torch.autograd.grad(value, tensors, weights.to(value.dtype))]


def check(tensors, event_ndim, units=8.0, **settings):
    settings["event_ndim"] = event_ndim
    exact_tensors = [leaf(t.double()) for t in tensors]
    exact = reference.kl_normal(*exact_tensors, **settings)
    weights = torch.linspace(-1, 2, exact.numel(), dtype=torch.float64, device=exact.device).view(exact.shape)
    exact = run(reference.kl_normal, exact_tensors, weights, **settings)
    eager = run(reference.kl_normal, tensors, weights, **settings)
    actual = run(fastkl.kl_normal, tensors, weights, **settings)
    for got, naive, truth in zip(actual, eager, exact):
        # Terms of a sum cancel: rounding is relative to the largest term, not to the result.
        scale = truth.abs().max() if truth.numel() else None
        assert_as_good_as_eager(got, naive, truth, units=units, scale=scale)
        assert got.is_contiguous()
    assert actual[0].dtype == (torch.float64 if tensors[0].dtype == torch.float64 else torch.float32)
    assert [g.dtype for g in actual[1:]] == [t.dtype for t in tensors]


@both
@pytest.mark.parametrize("prior", [None, "full", "shared"])
@pytest.mark.parametrize(("shape", "event_ndim"), SHAPES, ids=str)
def test_shapes(backend, shape, event_ndim, prior):
    with implementation(backend):
        check(draw(shape, torch.float32, prior=prior if len(shape) > event_ndim else prior and "full"), event_ndim)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", reference.SCALES)
@pytest.mark.parametrize("bounds", [None, (-1.0, 0.5), fastkl.SoftBounds(-1.0, 0.5)], ids=["free", "hard", "soft"])
def test_scales_bounds_and_dtypes(backend, dtype, scale, bounds):
    with implementation(backend):
        check(draw((4, 24), dtype, scale, prior="shared"), 1, scale=scale, bounds=bounds)


@both
@pytest.mark.parametrize("view", ["chunk", "transposed", "every other", "expanded", "channels_last", "tokens"])
def test_strided_inputs_are_read_where_they_lie(backend, view):
    head = torch.randn(6, 8, 4, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).float()
    mu, logvar = {
        "chunk": lambda: head.chunk(2, 1),
        "transposed": lambda: (head[0, 0].t(), head[1, 1].t()),
        "every other": lambda: (head[..., ::2], head[..., 1::2]),
        "expanded": lambda: (head[:, :1].expand(6, 8, 4, 10), head),
        "channels_last": lambda: head.to(memory_format=torch.channels_last).chunk(2, 1),
        "tokens": lambda: (head[:, 1:, :, :5], head[:, :-1, :, 5:]),
    }[view]()
    with implementation(backend):
        for event_ndim in range(1, mu.dim() + 1):
            expected = reference.kl_normal(mu.double(), logvar.double(), event_ndim=event_ndim)
            leaves = [x.to(DEVICE).detach().requires_grad_() for x in (mu, logvar)]
            actual = fastkl.kl_normal(*leaves, event_ndim=event_ndim)
            torch.testing.assert_close(actual.cpu().double(), expected, rtol=2e-6, atol=1e-5)
            gradients = torch.autograd.grad(actual.sum(), leaves)  # stride 0
            torch.testing.assert_close(gradients[0].cpu(), mu.contiguous(), rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(gradients[1].cpu(), 0.5 * logvar.expm1(), rtol=4e-6, atol=1e-6)


@both
def test_packed_head_gets_one_packed_gradient(backend):
    from fastkl.ops.normal.kl_normal import kl_normal_packed

    for shape, dim, event_ndim in (((4, 6, 5), 1, 2), ((4, 5, 6), 2, 2), ((4, 5, 6), -1, 1), ((2, 4, 3, 3), 1, 3)):
        head, plain = leaf(torch.randn(shape)), None
        plain = leaf(head)
        with implementation(backend):
            value = kl_normal_packed(head, dim, event_ndim=event_ndim)
            value.sum().backward()
        expected = reference.kl_normal(*plain.chunk(2, dim), event_ndim=event_ndim)
        expected.sum().backward()
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(head.grad, plain.grad)


@both
def test_agrees_with_torch_distributions_and_scipy(backend):
    mu, std, prior_mu, prior_std = 0.7, 0.4, -0.2, 1.5
    tensors = [torch.full((1, 1), x, dtype=torch.float64, device=DEVICE) for x in (mu, std, prior_mu)]
    prior_logvar = torch.full((1, 1), 2 * math.log(prior_std), dtype=torch.float64, device=DEVICE)
    with implementation(backend):
        actual = fastkl.kl_normal(*tensors, prior_logvar, scale="std").item()
    q, p = torch.distributions.Normal(mu, std), torch.distributions.Normal(prior_mu, prior_std)
    assert actual == pytest.approx(torch.distributions.kl_divergence(q, p).item(), rel=1e-6)
    density, other = stats.norm(mu, std), stats.norm(prior_mu, prior_std)
    integral, _ = integrate.quad(lambda z: density.pdf(z) * (density.logpdf(z) - other.logpdf(z)), -4, 6)
    assert actual == pytest.approx(integral, rel=1e-9)


@both
def test_extreme_values(backend):
    """Large, tiny and non-finite entries: exact where finite, and non-finite in their own row only."""
    logvar = torch.tensor([-80.0, -30.0, -1e-7, 0.0, 1e-4, 0.49, 0.51, 20.0, 80.0])
    with implementation(backend):
        check([leaf(torch.zeros(9, 1)), leaf(logvar[:, None])], 1)
        softplus = torch.tensor([-150.0, -15.1, -14.9, 0.0, 15.0, 150.0])
        check([leaf(torch.zeros(6, 1)), leaf(softplus[:, None])], 1, scale="softplus")
        bad = [(math.nan, 0.0), (math.inf, 0.0), (0.0, math.nan), (0.0, math.inf), (0.0, -math.inf)]
        mu, logvar = (torch.zeros(11, 3) for _ in range(2))
        for i, (m, v) in enumerate(bad):
            mu[2 * i + 1, 1], logvar[2 * i + 1, 2] = m, v
        mu, logvar = leaf(mu), leaf(logvar)
        value = fastkl.kl_normal(mu, logvar)
        value.sum().backward()
        assert value.cpu().isfinite().tolist() == [i % 2 == 0 for i in range(11)]
        assert (value[::2] == 0).all()
        assert (mu.grad[::2] == 0).all()
        assert (logvar.grad[::2] == 0).all()
        assert not logvar.grad[5].isfinite().all()


def test_offsets_beyond_2_to_the_31_elements():
    """Two rows 2^31 elements apart; of the 4 GiB between them no page is ever touched."""
    base = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    mu = base.as_strided((2, 64), (2**31, 1))
    mu.copy_(torch.linspace(-1, 1, 128).view(2, 64))
    with implementation("triton"):
        check([mu.requires_grad_(), leaf(torch.zeros(2, 64, dtype=torch.bfloat16))], 1)
        z = fastkl.rsample_normal(mu, torch.full_like(mu, -40.0))
    torch.testing.assert_close(z, mu)


def test_results_are_bitwise_the_same_run_to_run():
    tensors = draw((70, 300), torch.float32, prior="shared")
    with implementation("triton"):
        first, second = (run(fastkl.kl_normal, tensors, torch.ones(70, device=DEVICE)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def aot_calls():
    fwd, bwd = launcher("kl_normal.fwd"), launcher("kl_normal.bwd")
    free = (float("-inf"), float("inf"), False)
    calls = {}

    def add(name, shape, event_ndim=1, dtype=torch.float32, prior=None, scale="logvar", bounds=free, packed_dim=-1):
        q = [torch.empty(shape, dtype=dtype)] * 2
        q = q[0].chunk(2, packed_dim) if packed_dim >= 0 else q
        event = shape[-event_ndim:] if prior == "shared" else shape
        inputs = (*q, *([torch.empty(event, dtype=dtype)] * 2 if prior else [None] * 2))
        settings = (event_ndim, scale, *bounds)
        dkl = torch.empty(shape[: len(shape) - event_ndim], dtype=reference.compute_dtype(*q))
        dq = torch.empty(shape, dtype=dtype).chunk(2, packed_dim) if packed_dim >= 0 else empty_like(*q)
        calls[f"{name} fwd"] = lambda: fwd(*inputs, *settings)
        calls[f"{name} bwd"] = lambda: bwd(dkl, *inputs, *dq, *empty_like(*inputs[2:]), *settings)

    add("core aligned float32", (4096, 512))
    add("core aligned bfloat16 shared prior", (4096, 512), dtype=torch.bfloat16, prior="shared")
    add("aligned float32 prior", (4096, 512), prior="full")
    add("aligned float16 prior", (4096, 512), dtype=torch.float16, prior="full")
    add("float64 prior", (4096, 512), dtype=torch.float64, prior="full")  # 8 bytes a lane on gfx942, all coalesced
    for scale in reference.SCALES:
        add(f"aligned {scale} bounds prior", (64, 512), scale=scale, bounds=(-30.0, 20.0, False), prior="shared")
    add("aligned packed", (64, 1024), packed_dim=1)
    add("aligned nested columns", (64, 16, 1024), event_ndim=2, packed_dim=2)
    add("aligned short rows", (4096, 16), bounds=(-30.0, 20.0, True))
    add("aligned one long row", (1, 1 << 20))
    add("one column", (1 << 20, 1))
    add("odd", (37, 37), dtype=torch.bfloat16, prior="full")
    add("odd shared prior softplus", (370, 37), prior="shared", scale="softplus", bounds=(-30.0, 20.0, False))
    bounds = (-30.0, 20.0, False)
    add("odd float64 shared prior", (37, 37), dtype=torch.float64, prior="shared", scale="softplus", bounds=bounds)
    add("odd long", (3, 5001))
    # bfloat16 beside a float64 prior; rows and columns that are two dimensions each.
    mixed = [torch.empty((64, 512), dtype=dtype) for dtype in (torch.bfloat16, torch.float64)]
    view = torch.empty((64, 33, 12, 129))[:, 1:, :, 1:65:2]
    for name, q, p, dkl, settings in (
        (
            "float64 prior of bfloat16",
            *mixed,
            torch.empty(64, dtype=torch.float64),
            (1, "logvar", -30.0, math.inf, False),
        ),
        ("nested", view, view[0, 0], torch.empty(64, 32), (2, "logvar", -math.inf, math.inf, False)),
    ):
        inputs = (q, q, p, p)
        calls[f"{name} fwd"] = lambda inputs=inputs, s=settings: fwd(*inputs, *s)
        calls[f"{name} bwd"] = lambda inputs=inputs, s=settings, d=dkl: bwd(d, *inputs, *empty_like(*inputs), *s)
    return calls
