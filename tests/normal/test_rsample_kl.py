"""rsample_kl and rsample_normal: the noise, both implementations against the float64 definition, and what is kept."""

import math

import pytest
import torch

import fastkl
from fastkl import reference

from helpers import DEVICE, DTYPES, Package, assert_as_good_as_eager, empty_like, implementation, launcher, leaf

stats = Package("scipy.stats")

SEED = 2**62 + 12345
POSTERIOR, PRIOR = reference.Stream.POSTERIOR, reference.Stream.PRIOR
# (shape, event_ndim, num_samples): why
CASES = [
    ((70, 64), 1, None),  # aligned rows; several blocks of them in one partial sum of a shared prior
    ((5, 37), 1, None),  # rows that begin in the middle of a Philox call
    ((2, 3000), 1, 2),  # a long row, several programs share it
    ((130, 1), 1, None),  # one element a row
    ((3, 2, 18), 2, 3),  # tokens and samples
    ((2, 4, 3, 5), 3, None),  # images
    ((7,), 1, 1),  # no batch
    ((0, 4), 1, None),  # empty batch
]
both = pytest.mark.parametrize("backend", ["torch", "native", "triton"])


def draw(shape, dtype=torch.float32, prior=None):
    generator = torch.Generator().manual_seed(3)
    shapes = [shape, shape, *([shape[1:] if prior == "shared" else shape] * 2 if prior else [])]
    return [leaf(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def run(function, tensors, **settings):
    z, kl = function(*tensors, **settings)
    dz = torch.linspace(-1, 1, z.numel(), device=z.device).view(z.shape).to(z.dtype)
    dkl = torch.linspace(0, 2, kl.numel(), device=z.device).view(kl.shape).to(kl.dtype)
    return [z, kl, *torch.autograd.grad([z, kl], tensors, [dz, dkl])]


def check(tensors, **settings):
    """Against the definition in float64 with the same noise, at most as far off as the definition in this dtype."""
    wide = [leaf(t.double()) for t in tensors]
    if settings.get("seed") is not None:
        settings["seed"] = torch.tensor(settings["seed"], device=DEVICE)
    results = [run(f, t, **settings) for f, t in (
        (reference.rsample_kl, wide), (reference.rsample_kl, tensors), (fastkl.rsample_kl, tensors),
    )]  # fmt: skip
    for exact, eager, actual in zip(*results):
        # 16 units: the kernel's Box-Muller is within 1e-6 of torch's.
        scale = exact.abs().max() if exact.numel() else None
        assert_as_good_as_eager(actual, eager, exact, units=16, scale=scale)
    assert [r.dtype for r in results[2]] == [r.dtype for r in results[1]]
    return results[2]


@both
@pytest.mark.parametrize("prior", [None, "full", "shared"])
@pytest.mark.parametrize(("shape", "event_ndim", "num_samples"), CASES, ids=str)
def test_shapes(backend, shape, event_ndim, num_samples, prior):
    prior = "full" if prior and len(shape) <= event_ndim else prior
    tensors = draw(shape, prior=prior)
    with implementation(backend):
        z, *_ = check(tensors, event_ndim=event_ndim, num_samples=num_samples, seed=SEED)
        same = fastkl.rsample_normal(*tensors[:2], num_samples=num_samples, seed=SEED)
        torch.testing.assert_close(same, z)
        eps = torch.randn(z.shape, device=DEVICE)
        check(tensors, event_ndim=event_ndim, num_samples=num_samples, eps=eps)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bounds", [(-1.0, 0.5), fastkl.SoftBounds(-1.0, 0.5)], ids=["hard", "soft"])
def test_scales_and_dtypes(backend, dtype, bounds):
    for scale in reference.SCALES:
        mu, parameter = draw((4, 24), dtype)
        parameter = leaf(parameter.detach().abs() + 0.1) if scale == "std" else parameter
        # The noise is float32: in float64 two implementations of it agree no further than that.
        noise = {"eps": torch.randn(4, 24, dtype=dtype, device=DEVICE)} if dtype == torch.float64 else {"seed": SEED}
        with implementation(backend):
            check([mu, parameter], **noise, scale=scale, bounds=bounds)


@both
def test_strided_and_packed(backend):
    from fastkl.ops.normal.rsample_kl import rsample_kl_packed
    from fastkl.ops.normal.rsample_normal import rsample_normal_packed

    head = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0))
    for dim, event_ndim in ((1, 2), (2, 2), (1, 1)):
        head_dim = head if dim == 1 else head.transpose(1, 2).contiguous()
        packed, plain = leaf(head_dim), leaf(head_dim)
        halves = [half.contiguous() for half in plain.chunk(2, dim)]
        z, kl = reference.rsample_kl(*halves, event_ndim=event_ndim, seed=torch.tensor(7, device=DEVICE))
        (z.sin().sum() + kl.sum()).backward()
        with implementation(backend):
            z2, kl2 = rsample_kl_packed(packed, dim, event_ndim=event_ndim, seed=7)
            (z2.sin().sum() + kl2.sum()).backward()
            torch.testing.assert_close(rsample_normal_packed(packed, dim, seed=7), z2)
            z3, kl3 = fastkl.rsample_kl(*packed.chunk(2, dim), event_ndim=event_ndim, seed=7)
        for actual, expected in ((z2, z), (kl2, kl), (packed.grad, plain.grad), (z3, z), (kl3, kl)):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=2e-6)


@both
def test_noise_is_standard_normal_and_independent(backend):
    with implementation(backend):
        eps = fastkl.rsample_normal(*[torch.zeros(1, 1, device=DEVICE).expand(64, 257)] * 2, num_samples=2, seed=SEED)
        other = fastkl.rsample_normal(*[torch.zeros(64, 257, device=DEVICE)] * 2, seed=SEED + 1)
    values = eps.double().cpu().flatten().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3
    assert stats.kstest(values**2, stats.chi2(1).cdf).pvalue > 1e-3
    correlations = torch.corrcoef(torch.stack([eps[0], eps[1], eps[0].roll(1), eps[0].roll(2), other]).flatten(1))
    assert (correlations - torch.eye(5, device=DEVICE)).abs().max() < 5 / math.sqrt(64 * 257)


@both
def test_manual_seed_reproduces_bit_for_bit(backend):
    mu, logvar = draw((5, 6))
    with implementation(backend):
        draws = []
        for _ in range(2):
            torch.manual_seed(11)
            draws += [fastkl.rsample_kl(mu, logvar)[0], fastkl.rsample_normal(mu, logvar)]
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])


def test_saves_an_8_byte_seed_beyond_its_inputs():
    saved, (mu, logvar) = [], draw((64, 32))
    for draw_one in (fastkl.rsample_kl, lambda *q: (fastkl.rsample_normal(*q), None)):
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            draw_one(mu, logvar)
        inputs = {mu.data_ptr(), logvar.data_ptr()}
        assert sum(t.numel() * t.element_size() for t in saved if t.data_ptr() not in inputs) == 8


@both
def test_one_output_alone_and_gradient_in_eps(backend):
    mu, logvar = draw((3, 8))
    eps = leaf(torch.randn(3, 8))
    with implementation(backend):
        z, kl = fastkl.rsample_kl(mu, logvar, eps=eps)
        dmu, dlogvar = torch.autograd.grad(kl.sum(), (mu, logvar), retain_graph=True)
        torch.testing.assert_close(dmu, mu)
        torch.testing.assert_close(dlogvar, 0.5 * logvar.expm1(), rtol=1e-5, atol=1e-6)
        dmu, deps = torch.autograd.grad(z.sum(), (mu, eps))
    assert (dmu == 1).all()
    torch.testing.assert_close(deps, (0.5 * logvar).exp())


def aot_calls():
    fwd, bwd, seed = launcher("rsample_kl.fwd"), launcher("rsample_kl.bwd"), torch.zeros((), dtype=torch.int64)
    calls = {}

    def add(name, shape, dtype=torch.float32, prior=None, scale="logvar", bounds=(-math.inf, math.inf, False), **more):
        mu = torch.empty(shape, dtype=dtype)
        event_ndim, num_samples = more.get("event_ndim", 1), more.get("num_samples")
        p = torch.empty(shape[1:] if prior == "shared" else shape, dtype=dtype) if prior else None
        z = torch.empty(shape if num_samples is None else (num_samples, *shape), dtype=dtype)
        inputs = (mu, mu, p, p, *((z, None) if more.get("eps") else (None, seed)))
        settings = (event_ndim, scale, *bounds, num_samples, POSTERIOR)
        kl = torch.empty(shape[: len(shape) - event_ndim], dtype=reference.compute_dtype(mu))
        calls[f"{name} fwd"] = lambda: fwd(*inputs, *settings)
        calls[f"{name} bwd"] = lambda: bwd(z, kl, *inputs, *empty_like(*inputs[:4]), *settings)

    add("core aligned float32", (4096, 512))
    add("core aligned bfloat16", (4096, 512), dtype=torch.bfloat16, bounds=(-30.0, 20.0, True))
    add("aligned float64", (4096, 512), dtype=torch.float64)
    add("shared prior softplus", (4096, 512), prior="shared", scale="softplus", bounds=(-30.0, 20.0, False))
    add("own noise, samples", (64, 512), prior="full", eps=True, num_samples=3)
    add("aligned one long row", (1, 1 << 20), scale="std")
    # Without a KL, and from the packed halves of a head.
    draw_one, back = launcher("rsample_normal.fwd"), launcher("rsample_normal.bwd")
    for dtype in (torch.float32, torch.bfloat16):
        half, head, dhead = (torch.empty((64, size), dtype=dtype) for size in (512, 1024, 1024))
        plain = (0, "logvar", -math.inf, math.inf, False, None)
        for name, (q, dq, settings) in {
            "aligned rsample_normal": ((half, half), (half, half), (*plain, POSTERIOR)),
            "aligned rsample_normal of a prior": ((half, half), (half, half), (*plain, PRIOR)),
            "aligned packed rsample_normal": (
                head.chunk(2, 1), dhead.chunk(2, 1), (0, "std", -30.0, math.inf, False, 2, POSTERIOR),
            ),
        }.items():  # fmt: skip
            dz = half if settings[-2] is None else torch.empty((2, 64, 512), dtype=dtype)
            calls[f"{name} {dtype} fwd"] = lambda q=q, s=settings: draw_one(*q, None, seed, *s)
            calls[f"{name} {dtype} bwd"] = lambda q=q, s=settings, dz=dz, dq=dq: back(dz, *q, None, seed, *dq, *s)
    add("odd", (370, 37), dtype=torch.bfloat16, prior="full")
    add("odd shared prior", (370, 37), prior="shared", num_samples=2)
    return calls
