"""total_correlation: both implementations against the float64 definition, torch.distributions, and others' weights."""

import contextlib
import math
from unittest import mock

import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops.pairs import _few_pairs_normal as few_pairs

import helpers
from helpers import DEVICE, DTYPES, assert_as_good_as_eager, launcher, leaf, peak_bytes

# (N, D): why
SHAPES = [
    (2, 1),  # the smallest batch, whose other posterior is also the next; one dimension
    (5, 3),  # less than any tile
    (20, 10),  # several tiles of posteriors, masked dimensions, the last row's next is the first
    (6, 32),  # whole dimensions
    (3, 200),  # many dimensions
]
every = pytest.mark.parametrize("backend", ["all pairs", "blocks", "triton"])


@contextlib.contextmanager
def implementation(backend):
    """The closed form of few pairs, of blocks so small that tests have several each way, or the kernels."""
    with contextlib.ExitStack() as stack:
        if backend == "blocks":
            stack.enter_context(mock.patch("fastkl.ops.pairs._few_pairs_normal.MOST", 0))
            stack.enter_context(mock.patch("fastkl.ops.pairs._pairwise_normal.BLOCK", 480))
            stack.enter_context(mock.patch("fastkl.ops.pairs._pairwise_normal.MOST_COLUMNS", 16))
        stack.enter_context(helpers.implementation("triton" if backend == "triton" else "torch"))
        yield


def draw(n, d, dtype=torch.float32, *, logvar=-2.0, mean=0.0, spread=1.0, seed=0):
    """z is drawn from its own posterior."""
    generator = torch.Generator().manual_seed(seed)
    mu, logvars, eps = (torch.randn(n, d, generator=generator) for _ in range(3))
    mu, logvars = mean + spread * mu, logvar + logvars
    return [leaf(tensor.to(dtype)) for tensor in (mu + (0.5 * logvars).exp() * eps, mu, logvars)]


def run(function, tensors, dataset_size=1000, weights="mss"):
    parts = function(*tensors, dataset_size, weights=weights)
    cotangents = [torch.linspace(a, b, len(tensors[0]), device=DEVICE).to(parts[0].dtype) for a, b in COTANGENTS]
    return [*parts, *torch.autograd.grad(parts, tensors, cotangents)]


COTANGENTS = ((1, 2), (-3, 6), (0.5, -1))


def check(tensors, **settings):
    exact_tensors = [leaf(t.double()) for t in tensors]
    exact = run(reference.total_correlation, exact_tensors, **settings)
    eager = run(reference.total_correlation, tensors, **settings)
    actual = run(fastkl.total_correlation, tensors, **settings)
    # Relative to the gradients of the joint and of the marginals, each by itself: together they may cancel.
    parts = reference.total_correlation(*exact_tensors, 1000, **settings)
    each = [torch.autograd.grad(8 * parts[i].sum(), exact_tensors, retain_graph=True) for i in (0, 2)]
    scales = [sum(part.abs().max() for part in exact[:3])] * 3 + [a.abs().max() + b.abs().max() for a, b in zip(*each)]
    for got, naive, truth, scale in zip(actual, eager, exact, scales):
        assert_as_good_as_eager(got, naive, truth, units=8.0, scale=scale)
    assert [t.dtype for t in actual] == [reference.compute_dtype(*tensors)] * 3 + [t.dtype for t in tensors]


@every
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_shapes(backend, n, d):
    with implementation(backend):
        check(draw(n, d))


@every
@pytest.mark.parametrize(("n", "d"), SHAPES[:2])
def test_uniform_weights(backend, n, d):
    with implementation(backend):
        check(draw(n, d), weights="mws")


@every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(backend, dtype):
    with implementation(backend):
        check(draw(6, 5, dtype))


@every
@pytest.mark.parametrize(
    "case", [{"logvar": -12.0}, {"mean": 100.0}, {"mean": 100.0, "logvar": -12.0}, {"spread": 9.0}]
)
def test_narrow_posteriors_and_far_means(backend, case):
    with implementation(backend):
        check(draw(7, 6, **case))


@every
def test_samples_far_from_their_own_posterior(backend):
    """Exponentials relative to their own overflow there; the other rows go on as before."""
    z, mu, logvar = draw(8, 4)
    z = leaf(
        z.detach()
        .clone()
        .index_add_(0, torch.tensor([3, 6], device=DEVICE), z.new_tensor([[90.0], [-300.0]]).expand(2, 4))
    )
    with implementation(backend):
        check([z, mu, logvar])
        check([z, mu, logvar], weights="mws")


@every
def test_a_part_of_the_batch_has_its_rows_of_the_whole(backend):
    """As processes of a group have, whose posteriors are everybody's."""
    z, mu, logvar = (tensor.detach() for tensor in draw(7, 3))
    forward, backward = torch.ops.fastkl.total_correlation_fwd, torch.ops.fastkl.total_correlation_bwd
    cotangents = [torch.linspace(a, b, 7, device=DEVICE) for a, b in COTANGENTS]
    with implementation(backend):
        whole = forward(z, mu, logvar, 0, 50, True)
        gradients = [torch.empty_like(tensor) for tensor in (z, mu, logvar)]
        backward(*cotangents, z, mu, logvar, *whole[3:], *gradients, 0, 50, True)
        of_posteriors = []
        for first, last in ((0, 3), (3, 7)):
            part = forward(z[first:last], mu, logvar, first, 50, True)
            for actual, full in zip(part, whole):
                torch.testing.assert_close(actual, full[first:last])
            given, rows = [cotangent[first:last] for cotangent in cotangents], z[first:last]
            dz, *others = [torch.empty_like(tensor) for tensor in (rows, mu, logvar)]
            backward(*given, rows, mu, logvar, *part[3:], dz, *others, first, 50, True)
            torch.testing.assert_close(dz, gradients[0][first:last])
            of_posteriors.append(others)
        for *parts, full in zip(*of_posteriors, gradients[1:]):
            torch.testing.assert_close(sum(parts), full)


@every
def test_strided_inputs_are_read_where_they_lie(backend):
    z, mu, logvar = (tensor.detach() for tensor in draw(6, 4))
    head = torch.cat([mu, logvar], 1)
    views = ((z.t().contiguous().t(), *head.chunk(2, 1)), (z, head[:, :4], logvar[:1].expand(6, 4)))
    with implementation(backend):
        for tensors in views:
            plain = run(fastkl.total_correlation, [leaf(t.clone()) for t in tensors])
            torch.testing.assert_close(run(fastkl.total_correlation, [t.requires_grad_() for t in tensors]), plain)
            [t.requires_grad_(False) for t in tensors]


@every
def test_gradients_of_one_part_alone(backend):
    tensors = draw(4, 3, torch.float64)
    with implementation(backend):
        for index in range(3):
            actual, exact = (
                torch.autograd.grad(f(*tensors, 99)[index].sum(), tensors)
                for f in (fastkl.total_correlation, reference.total_correlation)
            )
            torch.testing.assert_close(actual, exact)


@every
def test_parts_add_up_to_the_sampled_kl(backend):
    z, mu, logvar = draw(7, 4, torch.float64)
    with implementation(backend):
        total = sum(fastkl.total_correlation(z, mu, logvar, 600))
    q, p = torch.distributions.Normal(mu, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(total, (q.log_prob(z) - p.log_prob(z)).sum(1))


@every
def test_agrees_with_torch_distributions(backend):
    """Row 2 of 4 of a data set of 10: the weights written out by hand."""
    z, mu, logvar = (tensor.detach() for tensor in draw(4, 3, torch.float64))
    normal = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    weights = torch.tensor([1 / 3, 1 / 3, 1 / 10, 7 / 30], dtype=torch.float64, device=DEVICE)
    choice = torch.distributions.Categorical(weights)
    q = torch.distributions.MixtureSameFamily(choice, torch.distributions.Independent(normal, 1)).log_prob(z[2])
    marginals = sum(
        torch.distributions.MixtureSameFamily(choice, torch.distributions.Normal(normal.loc[:, d], normal.scale[:, d]))
        .log_prob(z[2, d])
        for d in range(3)
    )  # fmt: skip
    own = normal.log_prob(z)[2].sum()
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z[2]).sum()
    with implementation(backend):
        found = torch.stack(fastkl.total_correlation(z, mu, logvar, 10))[:, 2]
    torch.testing.assert_close(found, torch.stack([own - q, q - marginals, marginals - prior]))


def test_a_gaussian_whose_parts_are_known():
    """x ~ N(0, S) and z = x + noise: q(z) is N(0, S + I s^2), and all three parts have a closed form."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    n, rho, variance = 1000, 0.8, 0.3
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64, device=DEVICE)
    x = torch.stack([x[:, 0], rho * x[:, 0] + math.sqrt(1 - rho**2) * x[:, 1]], 1) * 0.7
    z = x + math.sqrt(variance) * torch.randn(n, 2, generator=generator, dtype=torch.float64, device=DEVICE)
    found = fastkl.total_correlation(z, x, torch.full_like(x, math.log(variance)), n)
    of_z = torch.tensor([[1, rho], [rho, 1]], dtype=torch.float64) * 0.49 + torch.eye(2, dtype=torch.float64) * variance
    mutual = 0.5 * (torch.logdet(of_z) - 2 * math.log(variance))
    total = 0.5 * (of_z.diagonal().log().sum() - torch.logdet(of_z))
    dimension_wise = 0.5 * (of_z.diagonal() - 1 - of_z.diagonal().log()).sum()
    assert [part.mean().item() for part in found] == pytest.approx(
        [float(part) for part in (mutual, total, dimension_wise)], abs=0.06
    )


def published_weights(batch, dataset_size):
    """The matrix of rtqichen/beta-tcvae, which disentangling-vae, Pythae and AntixK's PyTorch-VAE share: every
    (M + 1)-th element of a matrix of M + 1 columns is its first column, not its diagonal."""
    others = batch - 1
    weights = torch.full((batch, batch), 1 / others, dtype=torch.float64)
    weights.view(-1)[:: others + 1] = 1 / dataset_size
    weights.view(-1)[1 :: others + 1] = (dataset_size - others) / (dataset_size * others)
    weights[others - 1, 0] = (dataset_size - others) / (dataset_size * others)
    return weights


def test_stratified_weights_lie_on_the_diagonal():
    ours = reference.sample_weights(5, 5, 100, "mss", dtype=torch.float64)
    torch.testing.assert_close(ours.sum(1), torch.ones(5, dtype=torch.float64))
    assert ours.diagonal().tolist() == [1 / 100] * 5
    assert ours.roll(-1, 1).diagonal().tolist() == [(100 - 4) / (100 * 4)] * 5
    published = published_weights(5, 100)
    assert published[[0, 1, 2, 4], 0].tolist() == [1 / 100] * 4  # row 3's was overwritten last
    assert published.diagonal().tolist()[2:] == [1 / 4] * 3
    assert (published.sum(1) - 1).abs().max() > 0.1


def test_the_weight_counts_once_not_for_every_dimension():
    """Pythae and AntixK add its logarithm to the densities of all dimensions, and sum over these for the joint."""
    z, mu, logvar = (tensor.detach().cpu() for tensor in draw(6, 4, torch.float64))
    log_weights = reference.sample_weights(6, 6, 100, "mss", dtype=torch.float64).log()
    terms = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z[:, None])
    own = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(1)
    once = own - torch.logsumexp(log_weights + terms.sum(2), 1)
    for_every = own - torch.logsumexp((log_weights[:, :, None] + terms).sum(2), 1)
    actual = fastkl.total_correlation(*(t.to(DEVICE) for t in (z, mu, logvar)), 100).mutual_information.cpu()
    torch.testing.assert_close(actual, once)
    assert ((for_every - once) > 3.0).all()


def test_one_batch_data_set_is_its_aggregate_posterior():
    z, mu, logvar = draw(8, 3, torch.float64)
    weights = reference.sample_weights(8, 8, 8, "mss", dtype=torch.float64)
    torch.testing.assert_close(weights.sum(1), torch.ones(8, dtype=torch.float64))
    uniform = fastkl.total_correlation(z, mu, logvar, 8, weights="mws")  # 1 / 64 in place of 1 / 8
    terms = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z[:, None])
    joint = torch.logsumexp(terms.sum(2), 1) - math.log(64)
    own = torch.distributions.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(1)
    torch.testing.assert_close(uniform.mutual_information, own - joint)


def test_few_pairs_leave_rows_far_from_their_own_to_the_blocks():
    """Forward by the sums' overflow, backward by the sign that the joint's then has."""
    z, mu, logvar = (tensor.detach() for tensor in draw(8, 4))
    z[3] += 90.0
    pairs = few_pairs.Pairs(z, mu, logvar, 0, 100, True)
    assert few_pairs.forward(pairs) is None
    z[3] -= 90.0
    assert few_pairs.forward(few_pairs.Pairs(z, mu, logvar, 0, 100, True)) is not None


@pytest.mark.skipif(DEVICE == "cuda", reason="the allocator of the CPU")
def test_memory_stays_small():
    """All pairs of 128 rows in 64 dimensions would take 4 MiB for each of a dozen temporaries."""
    tensors = draw(128, 64)
    assert peak_bytes(lambda: run(fastkl.total_correlation, tensors)) < 2**21


def test_saves_two_sums_beyond_its_inputs_and_repeats_bit_for_bit():
    tensors, saved = draw(6, 3), []
    with implementation("triton"):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            fastkl.total_correlation(*tensors, 99)
        first, second = run(fastkl.total_correlation, tensors), run(fastkl.total_correlation, tensors)
    inputs = {tensor.data_ptr() for tensor in tensors}
    assert sum(t.numel() for t in saved if t.data_ptr() not in inputs) == 6 * 3 + 6
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_errors_name_the_argument():
    z = torch.zeros(4, 2)
    for arguments, error in (
        ((z[:1], z[:1], z[:1], 9), r"a batch of 1"),
        ((z, z, z, 3), r"dataset_size must be at least the batch's 4, got 3"),
        ((z[0], z[0], z[0], 9), r"z must be \[N, D\]"),
        ((z, z[:3], z, 9), r"mu \(3, 2\) does not broadcast to z's shape \(4, 2\)"),
    ):
        with pytest.raises(ValueError, match=error):
            fastkl.total_correlation(*arguments)
    with pytest.raises(ValueError, match=r"weights must be one of 'mss', 'mws', got 'all'"):
        fastkl.total_correlation(z, z, z, 9, weights="all")
    with pytest.raises(TypeError, match="dataset_size must be an int"):
        fastkl.total_correlation(z, z, z, 9.5)
    with pytest.raises(TypeError, match="group must be"):
        fastkl.total_correlation(z, z, z, 9, group="world")


def aot_calls():
    fwd, bwd = launcher("total_correlation.fwd"), launcher("total_correlation.bwd")
    calls = {}

    def add(name, n, d, dtype=torch.float32, stratified=True):
        z = torch.empty(n, d, dtype=dtype)
        inputs, settings = (z, z, z), (0, 60000, stratified)
        result = torch.float64 if dtype == torch.float64 else torch.float32
        row, sums = torch.empty(n, dtype=result), torch.ones(n, d, dtype=result)
        calls[f"{name} fwd"] = lambda: fwd(*inputs, *settings)
        calls[f"{name} bwd"] = lambda: bwd(row, row, row, *inputs, row, sums, *inputs, *settings)

    add("core aligned float32", 256, 32)
    add("many rows", 16384, 32)
    add("bfloat16 few dimensions, uniform weights", 256, 10, torch.bfloat16, False)
    add("float64", 256, 32, torch.float64)
    add("many dimensions", 256, 512)
    add("float64 many dimensions", 256, 512, torch.float64)
    add("one dimension", 256, 1)
    return calls
