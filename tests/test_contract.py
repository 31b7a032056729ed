"""The contract of every op, whatever it computes: one suite for all."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import fastkl
from fastkl.ops import _call

from helpers import DEVICE, implementation, leaf

SEED = 5


def draw(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [leaf(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def sample_and_kl(*tensors):
    z, kl = fastkl.rsample_kl(*tensors, seed=SEED)
    return torch.stack([z.sin().sum(-1), kl], -1)


# name -> (function of tensors with one value or tensor per sample, shapes of the tensors for a batch of n)
OPS = {
    "kl_normal": (fastkl.kl_normal, lambda n: [(n, 4), (n, 4)]),
    "kl_normal, full prior": (fastkl.kl_normal, lambda n: [(n, 4)] * 4),
    "kl_normal, softplus": (lambda *t: fastkl.kl_normal(*t, scale="softplus"), lambda n: [(n, 4), (n, 4)]),
    "kl_normal, packed": (lambda h: fastkl.DiagonalNormal.from_packed(h).kl(), lambda n: [(n, 6, 2)]),
    "rsample_normal": (lambda *t: fastkl.rsample_normal(*t, seed=SEED), lambda n: [(n, 4), (n, 4)]),
    "rsample_normal, samples": (
        lambda *t: fastkl.rsample_normal(*t, seed=SEED, num_samples=3).sum(0),
        lambda n: [(n, 4), (n, 4)],
    ),
    "rsample_kl": (sample_and_kl, lambda n: [(n, 4), (n, 4)]),
    "rsample_kl, prior, own noise": (
        lambda m, v, pm, pv, eps: fastkl.rsample_kl(m, v, pm, pv, eps=eps)[0].sum(1),
        lambda n: [(n, 4)] * 5,
    ),
    "bernoulli_log_prob": (lambda *t: fastkl.bernoulli_log_prob(*t, event_ndim=1), lambda n: [(n, 4), (n, 4)]),
    "normal_log_prob": (lambda *t: fastkl.normal_log_prob(*t, event_ndim=1), lambda n: [(n, 4)] * 3),
    "gmm_log_prob": (fastkl.gmm_log_prob, lambda n: [(n, 4), (3,), (3, 4), (3, 4)]),
    "gmm_log_prob, a mixture for each datum": (
        fastkl.gmm_log_prob,
        lambda n: [(2, n, 4), (n, 3), (n, 3, 4), (n, 3, 1)],
    ),
    "gmm_log_prob, scale_tril": (
        lambda z, logits, means, a: fastkl.gmm_log_prob(
            z, logits, means, scale_tril=a.tril(-1) + torch.eye(3, device=a.device, dtype=a.dtype)
        ),
        lambda n: [(n, 3), (2,), (2, 3), (2, 3, 3)],
    ),
    "gmm_responsibilities": (fastkl.gmm_responsibilities, lambda n: [(n, 4), (n, 3), (3, 4), (1, 4)]),
    "kl_gmm": (
        lambda *t: fastkl.kl_gmm(*t, num_samples=2, seed=SEED),
        lambda n: [(n, 4), (n, 4), (3,), (3, 4), (3, 4)],
    ),
    "kl_gmm_bounds": (
        lambda *t: torch.stack(fastkl.kl_gmm_bounds(*t), -1),
        lambda n: [(n, 4), (n, 4), (3,), (3, 4), (3, 4)],
    ),
    "kl_gmm_bounds, weights for each datum": (
        lambda *t: torch.stack(fastkl.kl_gmm_bounds(*t), -1),
        lambda n: [(n, 4), (n, 4), (n, 3), (3, 4), (3, 1)],
    ),
    "gumbel_softmax": (lambda x: fastkl.gumbel_softmax(x, 0.7, seed=SEED), lambda n: [(n, 4)]),
    "gumbel_softmax, tau": (
        lambda x, tau: fastkl.gumbel_softmax(x, 0.5 + tau.square().mean(), seed=SEED),
        lambda n: [(n, 4), (2,)],
    ),
    "rsample_gmm": (
        lambda *t: fastkl.rsample_gmm(*t, tau=0.7, seed=SEED).square().sum(-1),
        lambda n: [(n, 3), (3, 4), (3, 4)],
    ),
    "iwae": (fastkl.iwae, lambda n: [(3, n)]),
    "effective_sample_size": (fastkl.effective_sample_size, lambda n: [(3, n)]),
    "weight_entropy": (fastkl.weight_entropy, lambda n: [(3, n)]),
    "kl_multivariate_normal": (
        lambda m, a, pm, b: fastkl.kl_multivariate_normal(
            m, a.tril(-1) + torch.eye(3, device=a.device, dtype=a.dtype), pm, b.exp()
        ),
        lambda n: [(n, 3), (n, 3, 3), (n, 3), (n, 3)],
    ),
    "wasserstein2_normal": (fastkl.wasserstein2_normal, lambda n: [(n, 4), (n, 4)]),
    "wasserstein2_normal, full prior": (fastkl.wasserstein2_normal, lambda n: [(n, 4)] * 4),
    "wasserstein2_multivariate_normal": (
        lambda m, a, pm, b: fastkl.wasserstein2_multivariate_normal(
            m, a.tril(-1) + torch.eye(3, device=a.device, dtype=a.dtype), pm, b.exp()
        ),
        lambda n: [(n, 3), (n, 3, 3), (n, 3), (n, 3)],
    ),
}
# Batch statistics and parameters that the batch shares: not one result for each example.
SHARED = {
    "kl_normal, shared prior": (fastkl.kl_normal, lambda n: [(n, 4), (n, 4), (4,), (1, 4)]),
    "kl_normal_per_dim": (fastkl.kl_normal_per_dim, lambda n: [(n, 4), (n, 4), (4,), (1, 4)]),
    "sliced_wasserstein": (lambda *t: fastkl.sliced_wasserstein(*t, 5, seed=SEED), lambda n: [(n, 4), (n, 4)]),
    "sliced_wasserstein, sizes": (
        lambda *t: fastkl.sliced_wasserstein(*t, 5, 3, seed=SEED),
        lambda n: [(n, 4), (3, 4)],
    ),
    "mmd": (fastkl.mmd, lambda n: [(n, 4), (3, 4)]),
    "mmd, rbf": (lambda *t: fastkl.mmd(*t, kernel="rbf", estimator="biased"), lambda n: [(n, 4), (n, 4)]),
    "mmd_normal": (fastkl.mmd_normal, lambda n: [(n, 4), (n, 4)]),
    "wasserstein2_normal, shared prior": (fastkl.wasserstein2_normal, lambda n: [(n, 4), (n, 4), (4,), (1, 4)]),
    "rsample_kl, shared prior": (
        lambda *t: fastkl.rsample_kl(*t, seed=SEED, scale="softplus", bounds=(-9, 9))[1],
        lambda n: [(n, 4), (n, 4), (4,), (1, 4)],
    ),
    "total_correlation": (
        lambda *t: torch.stack(fastkl.total_correlation(*t, 50), -1),
        lambda n: [(n, 4), (n, 4), (n, 4)],
    ),
    "total_correlation, uniform weights": (
        lambda *t: torch.stack(fastkl.total_correlation(*t, 50, weights="mws"), -1),
        lambda n: [(n, 4), (n, 4), (4,)],
    ),
}
every = pytest.mark.parametrize("name", [*OPS, *SHARED])
per_sample = pytest.mark.parametrize("name", OPS)


def get(name):
    return (OPS | SHARED)[name]


@every
def test_first_and_second_derivatives(name):
    function, shapes = get(name)
    inputs = draw(*shapes(3))
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@every
def test_fused_gradient_is_the_differentiable_one(name):
    """backward uses other code under create_graph; both must give the same gradients."""
    function, shapes = get(name)
    inputs = draw(*shapes(3), dtype=torch.float32)
    for backend in ("torch", "native", "triton"):
        with implementation(backend):
            value = function(*inputs)
            weights = torch.linspace(1, 2, value.numel(), device=DEVICE).view(value.shape)
            fused = torch.autograd.grad(value, inputs, weights, retain_graph=True)
            closed = torch.autograd.grad(value, inputs, weights, create_graph=True)
        for a, b in zip(fused, closed):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@every
def test_compiles_without_graph_breaks_or_recompilations(name):
    function, shapes = get(name)
    compilations = []

    def backend(graph, example_inputs):
        compilations.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)  # static at first, then dynamic
    for n in (4, 6, 9, 5):
        inputs = draw(*shapes(n), dtype=torch.float32)
        expected, actual = function(*inputs), compiled(*inputs)
        torch.testing.assert_close(actual, expected)
        gradients = [torch.autograd.grad(value.sum(), inputs) for value in (expected, actual)]
        torch.testing.assert_close(*gradients)
    assert len(compilations) <= 2


@every
def test_compiles_without_gradients(name):
    function, shapes = get(name)
    torch._dynamo.reset()
    inputs = draw(*shapes(3), dtype=torch.float32)
    with torch.no_grad():
        compiled = torch.compile(function, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*inputs), function(*inputs))


@pytest.mark.parametrize(
    "name", [n for n in OPS if n.partition(",")[0] not in ("rsample_gmm", "kl_multivariate_normal")]
)
def test_batched_gradients(name):
    function, shapes = get(name)
    inputs = draw(*shapes(3), dtype=torch.float64)
    value = function(*inputs)
    weights = torch.randn(2, *value.shape, dtype=value.dtype, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    batched = torch.autograd.grad(value, inputs, weights, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(value, inputs, weight, retain_graph=True) for weight in weights]
    torch.testing.assert_close(batched, tuple(torch.stack(pair) for pair in zip(*each)))


@pytest.mark.parametrize("name", ["kl_normal", "rsample_kl", "bernoulli_log_prob"])
def test_compiles_with_inductor(name):
    function, shapes = get(name)
    torch._dynamo.reset()
    inputs = draw(*shapes(4), dtype=torch.float32)
    expected, actual = (f(*inputs) for f in (function, torch.compile(function, fullgraph=True)))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), inputs) for value in (expected, actual)))


@per_sample
def test_vmap_and_grad(name):
    function, shapes = get(name)
    inputs = [t.detach() for t in draw(*([5, *s] for s in shapes(2)))]
    torch.testing.assert_close(
        torch.func.vmap(function)(*inputs), torch.stack([function(*(t[i] for t in inputs)) for i in range(5)])
    )
    mixed = (0, *[None] * (len(inputs) - 1))
    first = [inputs[0], *(t[0] for t in inputs[1:])]
    expected = torch.stack([function(inputs[0][i], *first[1:]) for i in range(5)])
    torch.testing.assert_close(torch.func.vmap(function, in_dims=mixed)(*first), expected)
    gradient = torch.func.grad(lambda *t: function(*t).square().sum())
    per_example = torch.func.vmap(gradient)(*inputs)
    looped = torch.stack([gradient(*(t[i] for t in inputs)) for i in range(5)])
    # Gumbel noise is float32 also in float64: two implementations of it agree to 1e-6.
    close = {"rtol": 1e-6, "atol": 1e-6} if name.startswith(("gumbel_softmax", "rsample_gmm")) else {}
    torch.testing.assert_close(per_example, looped, **close)


@every
def test_activation_checkpointing(name):
    function, shapes = get(name)
    inputs = draw(*shapes(3), dtype=torch.float32)
    plain = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    again = torch.autograd.grad(checkpoint(function, *inputs, use_reentrant=False).square().sum(), inputs)
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


def test_checkpointing_draws_the_same_noise_again():
    mu, logvar = draw((3, 8), (3, 8))

    def step(mu, logvar):
        z, kl = fastkl.rsample_kl(mu, logvar)
        return (z.sin().sum(1) + kl).square().sum()

    torch.manual_seed(1)
    plain = torch.autograd.grad(step(mu, logvar), (mu, logvar))
    torch.manual_seed(1)
    again = torch.autograd.grad(checkpoint(step, mu, logvar, use_reentrant=False), (mu, logvar))
    torch.testing.assert_close(again, plain, rtol=0, atol=0)


@every
@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_empty_batch(name, backend):
    function, shapes = get(name)
    inputs = draw(*shapes(0), dtype=torch.float32)
    if name.startswith(("mmd", "sliced")):  # a mean over pairs, or points
        with pytest.raises(ValueError, match="must have at least"):
            function(*inputs)
        return
    with implementation(backend):
        value = function(*inputs)
        gradients = torch.autograd.grad(value.sum(), inputs)
    assert value.numel() == 0 or "per_dim" in name
    assert [g.shape for g in gradients] == [t.shape for t in inputs]
    assert "per_dim" in name or all((g == 0).all() for g in gradients)


SAMPLES_IN_INPUT_DTYPE = {"kl_multivariate_normal", "rsample_normal", "gumbel_softmax", "rsample_gmm"}


@pytest.mark.parametrize("name", [n for n in [*OPS, *SHARED] if n.partition(",")[0] not in SAMPLES_IN_INPUT_DTYPE])
def test_autocast_gives_float32(name):
    function, shapes = get(name)
    inputs = draw(*shapes(3), dtype=torch.bfloat16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value = function(*inputs)
    assert value.dtype == torch.float32 or "noise" in name or name == "rsample_kl"
    torch.testing.assert_close(value, function(*inputs))
    gradients = torch.autograd.grad(value.sum(), inputs)
    assert {g.dtype for g in gradients} == {torch.bfloat16}


def test_opcheck():
    """torch's own checks of schema, fakes, and tracing, for each registered op as the public functions call it."""
    calls = {}

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "fastkl":
                detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
                calls.setdefault(op.name(), []).append((op, detached))
            return op(*args, **(kwargs or {}))

    with Record():
        for function, shapes in (OPS | SHARED).values():
            inputs = draw(*shapes(3), dtype=torch.float32)
            value = function(*inputs)
            torch.autograd.grad(value.sum(), inputs)
        fastkl.gmm_moments(*draw((3, 4), (2,), (2, 4), dtype=torch.float32))  # has no gradient
        x, y, *logvars = (tensor.detach() for tensor in draw((3, 4), (5, 4), (3, 4), (5, 4), dtype=torch.float32))
        torch.ops.fastkl.mmd_between(x, y, "imq", [1.0, 2.0], True)  # of batches over a group
        torch.ops.fastkl.mmd_posteriors_between(x, logvars[0], y, logvars[1], [1.0, 2.0], True)
        block, settings = (x, x, logvars[0], y, logvars[1]), (-5, 99, True, 5, 20)
        sums = torch.ops.fastkl.total_correlation_block_fwd(*block, *settings)
        outputs = [torch.empty_like(tensor) for tensor in (x, y, y)]
        torch.ops.fastkl.total_correlation_block_bwd(*[sums[0]] * 3, *block, *sums, *outputs, *settings)
    assert {name.split("::")[1].split(".")[0] for name in calls} == set(_call.TRITON)
    for op, args in (call for same in calls.values() for call in same):
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
