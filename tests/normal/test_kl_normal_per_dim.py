"""kl_normal_per_dim: both implementations against the float64 definition, and torch.distributions."""

import pytest
import torch

import fastkl
from fastkl import reference

from helpers import DEVICE, DTYPES, assert_as_good_as_eager, empty_like, implementation, launcher, leaf

# (shape, event_ndim): why
SHAPES = [
    ((8, 64), 1),  # aligned rows
    ((130, 37), 1),  # several groups of rows, odd columns
    ((3, 700), 1),  # several blocks of columns
    ((300, 1), 1),  # one column
    ((5, 3, 20), 1),  # tokens: two batch dimensions
    ((3, 4, 6, 5), 3),  # images
    ((2, 3, 2, 5, 4), 2),  # three batch dimensions, two in the event
    ((7,), 1),  # no batch dimension: a mean over one
]
both = pytest.mark.parametrize("backend", ["torch", "native", "triton"])


def draw(shape, event_ndim, dtype, scale="logvar", prior=None):
    generator = torch.Generator().manual_seed(0)
    small = shape[len(shape) - event_ndim :] if prior == "shared" else shape
    tensors = [torch.randn(s, generator=generator) for s in (shape, shape, *((small, small) if prior else ()))]
    tensors[1] = tensors[1].abs() + 0.1 if scale == "std" else tensors[1]
    return [leaf(tensor.to(dtype)) for tensor in tensors]


def run(function, tensors, **settings):
    value = function(*tensors, **settings)
    weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64, device=DEVICE).view(value.shape)
    return [value, *torch.autograd.grad(value, tensors, weights.to(value.dtype))]


def check(tensors, **settings):
    exact = run(reference.kl_normal_per_dim, [leaf(t.double()) for t in tensors], **settings)
    eager = run(reference.kl_normal_per_dim, tensors, **settings)
    actual = run(fastkl.kl_normal_per_dim, tensors, **settings)
    for got, naive, truth in zip(actual, eager, exact):
        assert_as_good_as_eager(got, naive, truth, units=8.0, scale=truth.abs().max())
    assert [t.dtype for t in actual] == [reference.compute_dtype(*tensors), *(t.dtype for t in tensors)]


@both
@pytest.mark.parametrize("prior", [None, "full", "shared"])
@pytest.mark.parametrize(("shape", "event_ndim"), SHAPES, ids=str)
def test_shapes(backend, shape, event_ndim, prior):
    with implementation(backend):
        check(draw(shape, event_ndim, torch.float32, prior=prior), event_ndim=event_ndim)


@both
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", reference.SCALES)
def test_scales_bounds_and_dtypes(backend, dtype, scale):
    with implementation(backend):
        for bounds in (None, (-1.0, 0.5), fastkl.SoftBounds(-1.0, 0.5)):
            check(draw((6, 24), 1, dtype, scale, prior="shared"), scale=scale, bounds=bounds)


@both
def test_strided_inputs_are_read_where_they_lie(backend):
    head = torch.randn(6, 8, 4, 10, generator=torch.Generator().manual_seed(1))
    views = {
        "chunk": head.chunk(2, 1),
        "transposed": (head[0, 0].t(), head[1, 1].t()),
        "expanded": (head[:, :1].expand(6, 8, 4, 10), head),
        "channels_last": head.to(memory_format=torch.channels_last).chunk(2, 1),
        "every other token": (head[:, 1::2, :, :5], head[:, ::2, :, 5:]),
    }
    with implementation(backend):
        for mu, logvar in views.values():
            for event_ndim in range(1, mu.dim() + 1):
                expected = reference.kl_normal_per_dim(mu.double(), logvar.double(), event_ndim=event_ndim)
                leaves = [x.to(DEVICE).detach().requires_grad_() for x in (mu, logvar)]
                actual = fastkl.kl_normal_per_dim(*leaves, event_ndim=event_ndim)
                torch.testing.assert_close(actual.cpu().double(), expected, rtol=2e-6, atol=1e-6)
                rows = mu.shape[: mu.dim() - event_ndim].numel()
                gradients = [g.cpu() * rows for g in torch.autograd.grad(actual.sum(), leaves)]  # stride 0
                torch.testing.assert_close(gradients, [mu, 0.5 * logvar.expm1()], rtol=4e-6, atol=1e-6)


@both
def test_empty_batch_is_nan_like_a_mean_and_an_empty_event_is_empty(backend):
    with implementation(backend):
        mu, logvar, prior = leaf(torch.zeros(0, 3)), leaf(torch.zeros(0, 3)), leaf(torch.zeros(3))
        value = fastkl.kl_normal_per_dim(mu, logvar, prior)
        value.sum().backward()
        assert value.isnan().tolist() == [True] * 3
        assert [mu.grad.numel(), prior.grad.tolist()] == [0, [0, 0, 0]]
        assert fastkl.kl_normal_per_dim(torch.zeros(3, 0), torch.zeros(3, 0)).shape == (0,)


@both
def test_non_finite_input_stays_in_its_column(backend):
    mu, logvar = torch.zeros(5, 4, device=DEVICE), torch.zeros(5, 4, device=DEVICE)
    mu[1, 1], logvar[2, 3] = float("nan"), float("inf")
    with implementation(backend):
        assert fastkl.kl_normal_per_dim(mu, logvar).isfinite().tolist() == [True, False, True, False]


@both
def test_agrees_with_torch_distributions(backend):
    mu, std, prior_mu, prior_std = (torch.rand(9, 5, dtype=torch.float64, device=DEVICE) + 0.2 for _ in range(4))
    q, p = torch.distributions.Normal(mu, std), torch.distributions.Normal(prior_mu, prior_std)
    with implementation(backend):
        actual = fastkl.kl_normal_per_dim(mu, std, prior_mu, 2 * prior_std.log(), scale="std")
    torch.testing.assert_close(actual, torch.distributions.kl_divergence(q, p).mean(0))


def test_vmap_keeps_its_dimension_out_of_the_mean():
    """Derivatives, torch.compile and opcheck are in test_contract.py; this is the only op that sums over the batch."""
    mu, logvar, prior_mu, prior_logvar = draw((4, 2, 3), 1, torch.float64, prior="shared")
    shared_prior = (mu, logvar, prior_mu, prior_logvar), (0, 0, None, None)
    for arguments, dims in (shared_prior, ((mu, logvar[:, 0], prior_mu, mu[0]), (1, None, None, 0))):
        mapped = [torch.func.vmap(f, dims)(*arguments) for f in (fastkl.kl_normal_per_dim, reference.kl_normal_per_dim)]
        torch.testing.assert_close(*mapped)
        torch.testing.assert_close(*[torch.autograd.grad(value.square().sum(), (mu, logvar)) for value in mapped])


def test_saves_nothing_beyond_its_inputs_and_repeats_bit_for_bit():
    tensors, saved = draw((200, 16), 1, torch.float32), []
    with implementation("triton"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
            fastkl.kl_normal_per_dim(*tensors)
        first, second = run(fastkl.kl_normal_per_dim, tensors), run(fastkl.kl_normal_per_dim, tensors)
    assert set(saved) <= {tensor.data_ptr() for tensor in tensors}
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def aot_calls():
    fwd, bwd = launcher("kl_normal_per_dim.fwd"), launcher("kl_normal_per_dim.bwd")
    calls = {}

    def add(name, shape, event_ndim=1, dtype=torch.float32, prior=None, scale="logvar", bounds=(-30.0, 20.0, False)):
        event = shape[-event_ndim:]
        mu = torch.empty(shape, dtype=dtype)
        p = torch.empty(event if prior == "shared" else shape, dtype=dtype) if prior else None
        inputs, settings = (mu, mu, p, p), (event_ndim, scale, *bounds)
        dkl = torch.empty(event, dtype=reference.compute_dtype(mu))
        calls[f"{name} fwd"] = lambda: fwd(*inputs, *settings)
        calls[f"{name} bwd"] = lambda: bwd(dkl, *inputs, *empty_like(*inputs), *settings)

    add("core aligned float32", (4096, 512), bounds=(float("-inf"), float("inf"), False))
    add("bfloat16 shared prior", (4096, 512), dtype=torch.bfloat16, prior="shared")
    add("float64 prior softplus", (4096, 64), dtype=torch.float64, prior="full", scale="softplus")
    add("odd nested", (37, 5, 37), event_ndim=1, dtype=torch.float16, prior="shared", scale="std")
    return calls
