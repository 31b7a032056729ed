"""The shapes that mixtures have in real code: plates, one mixture per datum, and components along any dimension."""

import pytest
import torch

import fastkl
from fastkl import reference
from fastkl.ops.mixture._canonical import canonical

from gmm_helpers import BACKENDS, MIB, draw, gradients, triangles
from helpers import DEVICE, implementation, leaf, peak_bytes

N, K, D = 11, 5, 3


SHAPES = {  # z, logits, means, logvars or scale_tril
    "samples of a batch": ((4, N, D), (K,), (K, D), (K, D)),
    "weights for each datum": ((4, N, D), (N, K), (K, D), (K, D)),
    "weights for each sample": ((4, N, D), (4, N, K), (K, D), (K, 1)),
    "a mixture for each datum": ((4, N, D), (N, K), (N, K, D), (N, K, D)),
    "components for each datum, shared weights": ((N, D), (K,), (N, K, D), (1, D)),
    "variances for each datum": ((N, D), (K,), (K, D), (N, K, D)),
    "a mixture for each datum, weights for each sample": ((4, N, D), (4, N, K), (N, K, D), (K, D)),
    "one point, many mixtures": ((D,), (N, K), (N, K, D), (N, K, 1)),
    "one point": ((D,), (K,), (K, D), (K, D)),
    "a grid of points and mixtures": ((4, 1, D), (K,), (N, K, D), (K, D)),
    "triangles": ((4, N, D), (N, K), (K, D), "shared"),
    "triangles for each datum": ((4, N, D), (K,), (N, K, D), "each"),
    "samples last": ((N, 4, D), (K,), (N, 1, K, D), (N, 1, K, 1)),
    "samples last, weights for each datum": ((N, 4, D), (N, 1, K), (N, 1, K, D), (K, D)),
    "samples last, weights alone for each datum": ((N, 4, D), (N, 1, K), (K, D), (D,)),
    "weights along one dimension, components along another": ((N, 4, D), (N, 1, K), (4, K, D), (K, D)),
    "means along one dimension, variances along another": ((N, 2, 4, D), (K,), (N, 1, 1, K, D), (4, K, D)),
    "two dimensions of samples last": ((N, 2, 4, D), (K,), (N, 1, 1, K, D), (K, D)),
    "samples first and last": ((2, N, 4, D), (K,), (N, 1, K, D), (1, N, 1, K, D)),
    "samples in the middle": ((2, 4, N, D), (2, 1, N, K), (2, 1, N, K, D), (K, D)),
    "one point for the samples last": ((N, 1, D), (K,), (N, 1, K, D), (4, K, D)),
    "triangles, samples last": ((N, 4, D), (K,), (N, 1, K, D), "outer"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes_that_real_code_has(backend, name):
    *shapes, last = SHAPES[name]
    inputs = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    full = isinstance(last, str)
    if full:
        inputs.append(triangles(*{"each": (N, K), "outer": (N, 1, K), "shared": (K,)}[last], size=D))
    else:
        inputs.append(draw(*last, seed=9))

    def call(function):
        return lambda z, logits, means, spread: function(
            z, logits, means, **({"scale_tril": spread} if full else {"logvars": spread})
        )

    for op in ("gmm_log_prob", "gmm_responsibilities"):
        with implementation(backend):
            actual, dactual = gradients(call(getattr(fastkl, op)), *inputs)
        expected, dexpected = gradients(call(getattr(reference, op)), *inputs)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(dactual, dexpected)


def test_plates_are_collapsed_not_copied():
    """Components expanded over the batch: one mixture, in memory as in gradients."""
    n, k, d = 2000, 64, 32
    means, logvars = leaf(draw(k, d, dtype=torch.float32)), leaf(draw(k, d, seed=1, dtype=torch.float32))
    z, logits = draw(n, d, seed=2, dtype=torch.float32), draw(k, seed=3, dtype=torch.float32)
    results = []

    def run(*plate):
        expanded = (tensor.expand(*plate, k, d) if plate else tensor for tensor in (means, logvars))
        value = fastkl.gmm_log_prob(z, logits.expand(*plate, k) if plate else logits, *expanded)
        results.append((value, *torch.autograd.grad(value.sum(), (means, logvars))))

    run()
    for plate in ((n,), (1, n)):
        if DEVICE == "cpu":
            assert peak_bytes(lambda plate=plate: run(*plate)) < 32 * MIB  # one [n, k, d] is 16 MiB, autograd makes six
        else:
            run(*plate)
        for actual, expected in zip(results[-1], results[0]):
            torch.testing.assert_close(actual, expected.expand_as(actual))
    direct = leaf(means.detach().expand(n, k, d))  # whose own gradient is asked for: one for each datum
    gradient = torch.autograd.grad(fastkl.gmm_log_prob(z, logits, direct, logvars).sum(), direct)[0]
    torch.testing.assert_close(gradient.sum(0), results[0][1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(gradient[0], gradient[1])


@pytest.mark.parametrize("op", [fastkl.gmm_log_prob, fastkl.gmm_responsibilities])
@pytest.mark.parametrize("expanded", [False, True])
def test_components_along_an_outer_dimension_are_not_copied(op, expanded):
    """z [N, S, D] beside means [N, 1, K, D], or expanded from it: z changes its order, which is K times smaller."""
    n, s, k, d = 32, 128, 64, 32
    z, logits, means, logvars = (
        draw(*shape, seed=seed, dtype=torch.float32)
        for seed, shape in enumerate([(n, s, d), (n, 1, k), (n, 1, k, d), (n, 1, k, d)])
    )

    def run(order, *shape):
        leaves = [leaf(tensor) for tensor in (z, logits, means, logvars)]
        mixture = [tensor.expand(*shape, *tensor.shape[2:]) if expanded else tensor for tensor in leaves[1:]]
        value = op(*(tensor.movedim(0, order) for tensor in (leaves[0], *mixture)))
        return value.movedim(order, 0), torch.autograd.grad(value.square().sum(), leaves)

    if DEVICE == "cpu":  # one [N, S, K, D] is 32 MiB, and a gradient of that size belongs to each of the two
        own = 4 * s * n * k if op is fastkl.gmm_responsibilities else 0  # bytes of the result
        assert peak_bytes(lambda: run(0, n, s)) < 20 * MIB + 6 * own
    torch.testing.assert_close(run(0, n, s), run(1, n, s), rtol=1e-4, atol=1e-4)


def test_weights_are_copied_where_rows_are_larger():
    z, means = draw(N, 4, 50), draw(K, 50, seed=1)
    found = canonical({"z": z}, draw(N, 1, K), means, None, None)
    assert found.rows[0].data_ptr() == z.data_ptr()
    assert found.restore(found.rows[0]).shape == z.shape


def test_leaf_expanded_along_an_inner_dimension():
    z, logits, means = draw(N, 4, D), draw(K), draw(N, 1, K, D, seed=1)
    expanded = leaf(means).detach().expand(N, 4, K, D).requires_grad_()
    actual = torch.autograd.grad(fastkl.gmm_log_prob(z, logits, expanded).sum(), expanded)
    own = leaf(means.repeat(1, 4, 1, 1))
    torch.testing.assert_close(actual, torch.autograd.grad(reference.gmm_log_prob(z, logits, own).sum(), own))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_samples_last(dynamic):
    shapes = [(N, 4, D), (N, 1, K), (N, 1, K, D), (K, D)]
    inputs = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]

    def plate(z, logits, means, logvars):
        return fastkl.gmm_log_prob(z, logits, means.expand(N, 4, K, D), logvars)

    torch._dynamo.reset()
    compiled = torch.compile(plate, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(gradients(compiled, *inputs), gradients(reference.gmm_log_prob, *inputs))
