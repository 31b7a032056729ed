"""Results that a plain float32 formula loses: infinite log-variances, cancellation, zero times an overflow.

Exact values are computed by mpmath or by hand. Every implementation of an op is tested, and so is the definition.
"""

import math

import mpmath
import pytest
import torch

import fastkl
from fastkl import reference

from helpers import DEVICE, implementation, leaf

every_way = pytest.mark.parametrize("way", ["reference", "torch", "native", "triton"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
INF = math.inf


def run(way, name, tensors, **settings):
    """What op `name` returns, [*batch, 1] in each tensor, and the gradients of its sum."""
    tensors = [tensor.detach().to(DEVICE).requires_grad_() for tensor in tensors]
    weight = settings.pop("weight", 1.0)
    if way == "reference":
        return _value_and_gradients(getattr(reference, name)(*tensors, **settings), tensors, weight)
    with implementation(way):
        return _value_and_gradients(getattr(fastkl, name)(*tensors, **settings), tensors, weight)


def _value_and_gradients(values, tensors, weight):
    values = values[1] if isinstance(values, tuple) else values  # rsample_kl's sample comes first
    values.backward(torch.full_like(values, weight))
    return values.detach().double().cpu(), [tensor.grad.double().cpu() for tensor in tensors]


def column(values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype).unsqueeze(-1)


def assert_close(actual, expected, dtype):
    """Within 8 last places of a dtype, each number relative to itself."""
    expected = torch.tensor([float(number) for number in expected], dtype=torch.float64)
    torch.testing.assert_close(actual.flatten(), expected, rtol=8 * torch.finfo(dtype).eps, atol=0)


def wide(dtype):
    return torch.float32 if dtype == torch.bfloat16 else dtype


def kl_of(way, name, dtype, logvars, **settings):
    """The op's values for these log-variances, one each, with equal means, and its gradients in the log-variance."""
    if name == "rsample_kl":
        settings["seed"] = torch.tensor(1, device=DEVICE)
    inputs = [column([0.5] * len(logvars), dtype), column(logvars, dtype)]
    inputs += [column([0.5] * len(logvars), dtype), column(settings.pop("prior"), dtype)] if "prior" in settings else []
    inputs = [tensor.T for tensor in inputs] if name == "kl_normal_per_dim" else inputs
    value, (_, dlogvar, *_) = run(way, name, inputs, **settings)
    return value, dlogvar.flatten()


@every_way
@every_dtype
@pytest.mark.parametrize("name", ["kl_normal", "kl_normal_per_dim", "rsample_kl"])
def test_an_infinite_variance_is_infinitely_far(way, dtype, name):
    """exp(x) grows faster than the x that is subtracted from it: infinity, and neither NaN nor -infinity."""
    value, dlogvar = kl_of(way, name, dtype, [INF, -INF, 1e38])
    assert value.tolist() == [INF, INF, INF]
    if name != "rsample_kl":  # the gradient of its sample is not a number where sigma is infinite
        assert dlogvar.tolist() == [INF, -0.5, INF]
    assert kl_of(way, name, dtype, [INF], prior=[1.0])[0].item() == INF
    for scale in ("std", "softplus", "log_std"):
        assert kl_of(way, name, dtype, [INF], scale=scale)[0].item() == INF


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["kl_normal", "kl_normal_per_dim", "rsample_kl", "wasserstein2_normal"])
def test_the_gradient_in_an_infinite_scale_is_infinite(way, dtype, name):
    """d KL / d sigma = sigma - 1 / sigma, of which the factor d logvar / d sigma = 2 / sigma alone is 0."""
    for scale in ("std", "softplus", "log_std"):
        value, gradient = kl_of(way, name, dtype, [INF], scale=scale)
        assert (value.item(), gradient.item()) == (INF, INF)
        if not name.startswith("wasserstein"):
            assert kl_of(way, name, dtype, [INF], scale=scale, prior=[1.0])[1].item() == INF
        bounded = kl_of(way, name, dtype, [INF], scale=scale, bounds=fastkl.SoftBounds(-2, 2))[1]
        assert bounded.isfinite().all()


@every_way
@every_dtype
@pytest.mark.parametrize("name", ["kl_normal", "kl_normal_per_dim", "rsample_kl"])
def test_a_small_kl_has_all_its_digits(way, dtype, name):
    logvars = torch.tensor([1e-12, 1e-6, -1e-6, 1e-4, -3e-3, 0.1, 0.45, -0.45, 0.55, -0.55, 1.1, -1.1], dtype=dtype)
    value, dlogvar = kl_of(way, name, dtype, logvars.tolist(), prior=[0.0] * len(logvars))
    with mpmath.workdps(60):
        numbers = [mpmath.mpf(number) for number in logvars.tolist()]
        assert_close(value, [(mpmath.expm1(x) - x) / 2 for x in numbers], wide(dtype))
        if name != "rsample_kl":
            assert_close(dlogvar, [mpmath.expm1(x) / 2 for x in numbers], dtype)


@every_way
@every_dtype
@pytest.mark.parametrize("name", ["kl_normal", "kl_normal_per_dim", "rsample_kl"])
def test_a_small_kl_to_a_standard_normal_has_all_its_digits(way, dtype, name):
    settings = {"seed": torch.tensor(1, device=DEVICE)} if name == "rsample_kl" else {}
    logvar = torch.tensor([[1e-6], [3e-3]], dtype=dtype)
    logvar = logvar.T if name == "kl_normal_per_dim" else logvar
    value, _ = run(way, name, [torch.zeros_like(logvar), logvar], **settings)
    with mpmath.workdps(60):
        numbers = [mpmath.mpf(number) for number in logvar.flatten().tolist()]
        assert_close(value, [(mpmath.expm1(x) - x) / 2 for x in numbers], wide(dtype))


@every_way
@every_dtype
def test_a_right_logit_has_all_its_digits(way, dtype):
    """In float32, x l - softplus(l), which is -exp(-l) at x = 1, is 0 from l = 17 on."""
    logits = [14.0, 17.0, 30.0, 60.0, 0.0, 0.3, -14.0, -60.0, 14.0, 5.0]
    x = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.996, 0.25]
    inputs = [column(x, dtype), column(logits, dtype)]
    value, (dx, dlogits) = run(way, "bernoulli_log_prob", inputs)
    expected, slope = [], []
    with mpmath.workdps(60):
        for pixel, logit in zip(*(tensor.double().flatten().tolist() for tensor in inputs)):
            expected.append(pixel * mpmath.mpf(logit) - mpmath.log1p(mpmath.exp(logit)))
            slope.append(pixel - 1 / (1 + mpmath.exp(-mpmath.mpf(logit))))
    assert_close(value, expected, wide(dtype))
    assert_close(dlogits, slope, dtype)
    assert_close(dx, inputs[1].flatten().tolist(), dtype)


@every_way
def test_an_infinite_logit_that_is_right_costs_nothing(way):
    value, (_, dlogits) = run(way, "bernoulli_log_prob", [column([1.0, 0.0, 0.5, 1.0]), column([INF, -INF, INF, -INF])])
    assert value.tolist() == [0.0, 0.0, -INF, -INF]
    assert dlogits.flatten().tolist() == [0.0, 0.0, -0.5, 1.0]


@every_way
@every_dtype
def test_wasserstein_beside_a_point(way, dtype):
    """If one standard deviation is negligible, the distance is the other."""
    logvars = [(-22.0, -182.0), (-182.0, -22.0), (-22.0, -INF), (-INF, -22.0), (-INF, -INF)]
    logvars += [(3.0, -500.0), (-50.0, -51.0)]
    inputs = [column([0.0] * 7, dtype), column([q for q, _ in logvars], dtype)]
    inputs += [column([0.0] * 7, dtype), column([p for _, p in logvars], dtype)]
    value, (_, dlogvar, _, dprior_logvar) = run(way, "wasserstein2_normal", inputs)
    with mpmath.workdps(60):
        sigma = [[mpmath.exp(mpmath.mpf(v) / 2) for v in pair] for pair in logvars]
        assert_close(value, [(q - p) ** 2 for q, p in sigma], wide(dtype))
        ones = [index for index, (q, p) in enumerate(logvars) if min(q, p) > -150 or q > p]  # the others' are next to 0
        assert_close(dlogvar[ones], [sigma[i][0] * (sigma[i][0] - sigma[i][1]) for i in ones], dtype)
        ones = [index for index, (q, p) in enumerate(logvars) if min(q, p) > -150 or p > q]
        assert_close(dprior_logvar[ones], [sigma[i][1] * (sigma[i][1] - sigma[i][0]) for i in ones], dtype)


@every_way
@every_dtype
@pytest.mark.parametrize("logvar", [-180.0, -400.0, -3000.0])
def test_equal_means_are_equal_however_narrow(way, dtype, logvar):
    """1 / sigma overflows float32 at a log-variance of -177: zero times that is zero."""
    mean, narrow = column([0.5], dtype), column([logvar], dtype)
    number = narrow.double().item()
    for name, settings in (("kl_normal", {}), ("kl_normal_per_dim", {}), ("rsample_kl", {"eps": torch.zeros(1, 1)})):
        value, gradients = run(way, name, [mean, narrow, mean, narrow], **settings)
        assert value.item() == 0
        assert all(gradient.item() == 0 for gradient in gradients)
    value, gradients = run(way, "normal_log_prob", [mean, mean, narrow])
    assert_close(value, [-0.5 * (number + math.log(2 * math.pi))], wide(dtype))
    assert [gradient.item() for gradient in gradients] == [0, 0, -0.5]


@every_way
def test_tiny_difference_with_tiny_stds(way):
    """1 / sigma overflows, and (x - mean) / sigma does not."""
    inputs = [column([1e-30]), column([-190.0]), column([0.0]), column([-190.0])]
    with mpmath.workdps(60):
        square = mpmath.mpf(inputs[0].item()) ** 2 * mpmath.exp(190)
    value, gradients = run(way, "kl_normal", inputs)
    assert_close(value, [square / 2], torch.float32)
    assert_close(gradients[3], [-square / 2], torch.float32)
    value, gradients = run(way, "normal_log_prob", [inputs[0], inputs[2], inputs[1]])
    assert_close(value, [-(square - 190 + mpmath.log(2 * mpmath.pi)) / 2], torch.float32)


@pytest.mark.parametrize("way", ["torch", "native", "triton"])
@pytest.mark.parametrize(
    "name", ["kl_normal", "kl_normal_per_dim", "rsample_kl", "rsample_normal", "wasserstein2_normal"]
)
@pytest.mark.parametrize("with_prior", [False, True])
def test_a_weight_of_zero_leaves_no_gradient_of_what_overflows(way, name, with_prior):
    """The gradient in the log-variance is about 1e87 here; a row that a loss leaves out has weight 0."""
    inputs = [column([1e30]), column([200.0])]
    if with_prior and name != "rsample_normal":
        inputs += [column([0.0]), column([-100.0])]
    settings = {"eps": torch.ones(1, 1, device=DEVICE)} if name.startswith("rsample") else {}
    _, gradients = run(way, name, inputs, weight=0.0, **settings)
    assert all(gradient.item() == 0 for gradient in gradients)


@pytest.mark.parametrize("way", ["torch", "native", "triton"])
@pytest.mark.parametrize("shape", [(1, 2), (1, 1), (2,)])
def test_a_weight_of_zero_leaves_no_gradient_of_a_likelihood(way, shape):
    inputs = [torch.full((1, 2), 1e30), torch.zeros(1, 2), torch.full(shape, -100.0)]
    _, gradients = run(way, "normal_log_prob", inputs, weight=0.0)
    _, more = run(way, "bernoulli_log_prob", [column([0.5]), column([INF])], weight=0.0)
    assert all((gradient == 0).all() for gradient in (*gradients, *more))


def test_a_weight_of_zero_can_be_differentiated():
    """What a jvp by two vjps asks: the derivative in a cotangent that is 0."""
    mu, logvar = (torch.full((1, 1), value, requires_grad=True) for value in (0.5, 0.3))
    weight = torch.zeros(1, requires_grad=True)
    gradients = torch.autograd.grad(fastkl.kl_normal(mu, logvar), [mu, logvar], weight, create_graph=True)
    tangent = [torch.autograd.grad(gradient.sum(), weight, retain_graph=True)[0].item() for gradient in gradients]
    assert tangent == pytest.approx([0.5, 0.5 * math.expm1(0.3)], rel=1e-6)


@pytest.mark.parametrize("way", ["torch", "native", "triton"])
@pytest.mark.parametrize(("std", "scale"), [(1.0e38, "std"), (3.4e38, "std"), (1e38, "softplus"), (3.4e38, "softplus")])
def test_sample_gradient_equals_noise_up_to_the_largest_std(way, std, scale):
    """1 / sigma is subnormal there."""
    noise = torch.full((1, 1), 0.25, device=DEVICE)
    for name in ("rsample_normal", "rsample_kl"):
        tensors = [leaf(column([0.0])), leaf(column([std]))]
        with implementation(way):
            found = getattr(fastkl, name)(*tensors, eps=noise, scale=scale)
            z = found[0] if name == "rsample_kl" else found
            (gradient,) = torch.autograd.grad(z, tensors[1], torch.ones_like(z))
        assert gradient.item() == pytest.approx(0.25, rel=2e-5)  # ln sigma is 88.7 in float32
