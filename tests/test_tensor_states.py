"""What a tensor may be beside its shape and dtype: laid out anew by a hook, or not what its memory says."""

import contextlib

import pytest
import torch
from test_contract import OPS, SHARED, draw

import fastkl

from helpers import DEVICE, implementation

MORE = {
    "sinkhorn_divergence": (
        lambda x, y, a, b: fastkl.sinkhorn_divergence(x, y, 0.5, weights_x=a.softmax(0), weights_y=b.softmax(0)),
        lambda n: [(n, 4), (2, 4), (n,), (2,)],
    ),
    "gumbel_softmax, hard": (lambda x: fastkl.gumbel_softmax(x, 0.7, True, seed=1), lambda n: [(n, 4)]),
    "kl_gmm, sampled entropy": (
        lambda *t: fastkl.kl_gmm(*t, seed=1, entropy="sampled", gradient="stl"),
        lambda n: [(n, 4), (n, 4), (n, 3), (n, 3, 4), (n, 3, 4)],
    ),
    "gmm_log_prob, tf32x3": (
        lambda *t: fastkl.gmm_log_prob(*t, precision="tf32x3"),
        lambda n: [(n, 16), (16,), (16, 16), (16, 16)],
    ),
    "free_bits": (
        lambda *t: fastkl.remedies.free_bits(fastkl.DiagonalNormal(*t), 0.5, per="dimension"),
        lambda n: [(n, 4), (n, 4)],
    ),
}
ALL = OPS | SHARED | MORE
every = pytest.mark.parametrize("name", ALL)
# One for each kernel, whose interpreter is slow.
KERNELS = (
    "kl_normal", "kl_normal, packed", "rsample_normal, samples", "rsample_kl, prior, own noise", "bernoulli_log_prob",
    "normal_log_prob", "gmm_log_prob", "gmm_log_prob, a mixture for each datum", "gmm_log_prob, scale_tril",
    "gmm_responsibilities", "kl_gmm", "kl_gmm_bounds", "gumbel_softmax", "gumbel_softmax, hard", "wasserstein2_normal",
    "kl_normal_per_dim", "mmd", "mmd_normal", "total_correlation", "gmm_log_prob, tf32x3",
)  # fmt: skip
on_both = pytest.mark.parametrize(
    ("name", "backend"), [*((name, "native") for name in ALL), *((name, "triton") for name in KERNELS)]
)


def get(name):
    """(function, inputs of a batch of 3, whose matrices are halves of wider ones, as a head's are)."""
    function, shapes = ALL[name]
    inputs = draw(*shapes(3), dtype=torch.float32)
    return function, [t if t.dim() != 2 else torch.cat([t, t], 1).chunk(2, 1)[0] for t in inputs]


def spread(tensor):
    """The same values at every other place of a memory with NaN between them."""
    wide = tensor.new_full((*tensor.shape, 2), float("nan") if tensor.is_floating_point() else -1)
    return wide[..., 1].copy_(tensor)


def transposed(tensor):
    return tensor.mT.clone(memory_format=torch.contiguous_format).mT if tensor.dim() > 1 else tensor


def weights_of(value):
    return torch.linspace(1, 2, value.numel(), dtype=value.dtype, device=value.device).view(value.shape)


def gradients(function, inputs, weigh=lambda weights: weights):
    value = function(*inputs)
    return [value, *torch.autograd.grad(value, inputs, weigh(weights_of(value)))]


@on_both
def test_saved_tensors_may_come_back_in_another_layout(name, backend):
    function, inputs = get(name)
    with implementation(backend):
        expected = gradients(function, inputs)
        for unpack in (spread, transposed) if backend == "native" else (spread,):
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack):
                again = gradients(function, inputs)
            torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)  # matrix products round otherwise


def test_offloading_to_the_cpu_after_a_plain_step():
    """Its copies are dense; the halves of a head were not."""
    head = draw((6, 8), dtype=torch.float32)[0]
    for op in (fastkl.kl_normal, fastkl.wasserstein2_normal, lambda m, v: fastkl.rsample_normal(m, v, seed=1).sin()):
        (plain,) = torch.autograd.grad(op(*head.chunk(2, 1)).sum(), head)
        with torch.autograd.graph.save_on_cpu(pin_memory=DEVICE == "cuda"):
            value = op(*head.chunk(2, 1)).sum()
        torch.testing.assert_close(torch.autograd.grad(value, head)[0], plain)


def negated(tensor):
    """The same values with the opposite ones in memory, as torch.conj leaves them in an imaginary part."""
    if not tensor.is_floating_point():
        return torch._neg_view(-tensor)
    lazy = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert lazy.is_neg()
    return lazy


def unwritten(tensor):
    """Zeros without memory, as forward-mode differentiation makes them."""
    return torch._efficientzerotensor(tensor.shape, dtype=tensor.dtype, device=tensor.device)


@on_both
def test_lazily_negated_tensors(name, backend):
    function, inputs = get(name)
    with implementation(backend):
        expected = gradients(function, inputs)
        lazy = gradients(lambda *t: function(*map(negated, t)), inputs, weigh=negated)
        torch.testing.assert_close(lazy, expected)


@every
def test_zeros_without_memory(name):
    function, inputs = get(name)
    for index in range(len(inputs)):
        lazy, zeros = list(inputs), list(inputs)
        lazy[index], zeros[index] = unwritten(inputs[index]), torch.zeros_like(inputs[index])
        torch.testing.assert_close(function(*lazy), function(*zeros), equal_nan=True)
    _, *found = gradients(function, inputs, weigh=unwritten)
    torch.testing.assert_close(found, [torch.zeros_like(t) for t in inputs])


RANDOM = {
    "rsample_normal": lambda x, seed: fastkl.rsample_normal(x, x, seed=seed),
    "rsample_kl": lambda x, seed: fastkl.rsample_kl(x, x, seed=seed)[0],
    "rsample_kl, samples": lambda x, seed: fastkl.rsample_kl(x, x, x[0], x[0], seed=seed, num_samples=2)[0],
    "gumbel_softmax": lambda x, seed: fastkl.gumbel_softmax(x, 0.7, seed=seed),
    "rsample_gmm": lambda x, seed: fastkl.rsample_gmm(x, x, seed=seed),
    "sample_gmm": lambda x, seed: fastkl.sample_gmm(x, x, num_samples=2, seed=seed)[0],
    "kl_gmm": lambda x, seed: fastkl.kl_gmm(x, x, x[:, 0], x, seed=seed),
    "sliced_wasserstein": lambda x, seed: fastkl.sliced_wasserstein(x, x.exp(), 5, seed=seed),
}


@pytest.mark.parametrize("name", RANDOM)
def test_lazy_seeds(name):
    (x,), seed = draw((4, 4), dtype=torch.float32), torch.tensor(3, device=DEVICE)
    function = RANDOM[name]
    torch.testing.assert_close(function(x, negated(seed)), function(x, seed), rtol=0, atol=0)
    torch.testing.assert_close(function(x, unwritten(seed)), function(x, torch.zeros_like(seed)), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_lazy_temperatures_and_thresholds(backend):
    x, tau = draw((4, 4), (), dtype=torch.float32)
    tau = tau.detach().exp()
    with implementation(backend):
        for hard in (False, True):
            plain, lazy = (fastkl.gumbel_softmax(x, t, hard, seed=1) for t in (tau, negated(tau)))
            torch.testing.assert_close(lazy, plain)
        plain, lazy = (fastkl.remedies.free_bits(fastkl.kl_normal(x, x), t) for t in (tau, negated(tau)))
        torch.testing.assert_close(lazy, plain)


@contextlib.contextmanager
def defaults(dtype, device):
    """Another default dtype, and a default device without memory: what is allocated there has no values."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        torch.set_default_device(None)


def results(function, inputs, twice=True):
    """The value, the gradients by the fused and by the differentiable way, and second derivatives where there are."""
    value, *first = gradients(function, inputs)
    again = torch.autograd.grad(function(*inputs), inputs, weights_of(value), create_graph=True)
    found = [value, *first, *again]
    if twice:
        total = sum(g.sin().sum() for g in again)
        found += torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
    return [*found, function(*(t.detach() for t in inputs))]


@on_both
def test_nothing_depends_on_default_dtype_or_device(name, backend):
    function, inputs = get(name)
    for dtype, default in ((torch.float32, torch.bfloat16), (torch.float16, torch.float64)):
        tensors = [t.detach().to(dtype).requires_grad_() for t in inputs]
        with implementation(backend):
            expected = results(function, tensors, name != "sinkhorn_divergence")
            with defaults(default, "meta"):
                found = results(function, tensors, name != "sinkhorn_divergence")
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
        if backend == "triton":  # one default shows it, and the interpreter is slow
            break


def test_float64_noise_under_a_16_bit_default():
    zero = torch.zeros((), dtype=torch.float64, device=DEVICE)
    with defaults(torch.bfloat16, "meta"):
        z = fastkl.rsample_normal(zero.expand(20_000), zero, seed=1)
    assert z.unique().numel() > 19_900


def test_objectives_under_another_default():
    mu, logvar = (t.detach() for t in draw((3, 4), (3, 4), dtype=torch.float32))

    def compute():
        q = fastkl.DiagonalNormal(mu, logvar)
        losses = [
            fastkl.objectives.iwae(q, None, lambda z: z.sum(-1), num_samples=2, eps=eps).loss,
            fastkl.objectives.wae_mmd(q, None, lambda z: z.sum(-1), eps=eps[:1]).loss,
        ]
        return [*losses, fastkl.remedies.balance(mu.square(), beta=0.999)]

    eps = draw((2, 3, 4), dtype=torch.float32)[0].detach()
    torch.manual_seed(0)
    expected = compute()
    torch.manual_seed(0)
    with defaults(torch.bfloat16, "meta"):
        found = compute()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
