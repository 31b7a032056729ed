"""Device functions that two or more kernels share: mathematics, the scale's parametrisation, the KL and its gradient.

All take and return the compute dtype: float64 if an input is, else float32. They do not call `.to` on a scalar
argument, because in the interpreter it may be a Python float.
"""

import torch
import triton
import triton.language as tl

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}  # compute dtypes
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_TAIL = tl.constexpr(1.925963033500702e-08)  # log2(e) - float32(log2(e))
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def exp(x, SCALE: tl.constexpr = 1.0):
    """exp(SCALE x), SCALE a power of 2. tl.exp is 2^(x log2 e), whose rounded product makes it |x| / 2 last places
    wrong; here the product's rounding error corrects the power."""
    if x.dtype == tl.float64:
        return tl.exp(SCALE * x)
    product = x * (SCALE * LOG2E)
    if SCALE == 1.0:
        remainder = tl.fma(x, LOG2E, -product) + x * LOG2E_TAIL
        value = tl.exp2(product)
        return tl.where(tl.abs(remainder) < 1.0, value * (1.0 + remainder * LN2), value)  # no correction at infinity
    # About 1. For huge x it is meaningless, at infinity NaN, which the maximum drops; then the power alone is right.
    correction = tl.maximum(1.0 + SCALE * tl.fma(product, -LN2 / SCALE, x), 0.5)
    return tl.exp2(product) * correction


@triton.jit
def exp_to_half(x, SCALE: tl.constexpr = 1.0):
    """exp(SCALE x) for results that are rounded to 16 bits, which need no correction."""
    if x.dtype == tl.float64:
        return tl.exp(SCALE * x)
    return tl.exp2(x * (SCALE * LOG2E))


@triton.jit
def proportion(x):
    """exp(x) of a log-probability; masked entries are -inf and give 0.

    In float64 a value below -708 sends its whole warp to the slow branch of exp, so values below -700 become 0 here.
    """
    if x.dtype == tl.float64:
        tiny = x < -700.0
        return tl.where(tiny, 0.0, tl.exp(tl.where(tiny, 0.0, x)))
    return tl.exp(x)


@triton.jit
def finite(maximum):
    """The maximum with -inf replaced by 0: exponentials of differences to it are then 0, not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def not_infinite(variance):
    """The variance with NaN for an overflow: its logarithm would be finite, and wrong."""
    return tl.where(variance == float("inf"), float("nan"), variance)


@triton.jit
def two_parts(value, DTYPE: tl.constexpr):
    """A float64 value as a sum of two values in DTYPE."""
    high = value.to(DTYPE)
    return high, (value - high.to(tl.float64)).to(DTYPE)


@triton.jit
def exp_minus_one_minus_series(x):
    """x^2 (1/2 + x/6 + x^2/24 + ...) for |x| < 1/2, exact to rounding: a minimax polynomial in float32."""
    if x.dtype == tl.float64:
        series = x * 0.0 + 1.0
        for i in tl.static_range(15):
            series = 1.0 + x * series * (1.0 / (17 - i))
        return 0.5 * x * x * series
    series = 1.39819974e-3 + x * 1.98756301e-4
    series = 8.33345217e-3 + x * series
    series = 4.16657959e-2 + x * series
    series = 1.66666655e-1 + x * series
    return x * x * (0.5 + x * series)


@triton.jit
def exp_minus_one_minus(x, exp_x):
    """exp(x) - 1 - x without cancellation. The minimum keeps it infinite at x = inf, where inf - inf would be NaN."""
    return tl.where(tl.abs(x) < 0.5, exp_minus_one_minus_series(x), exp_x - 1.0 - tl.minimum(x, 1000.0))


@triton.jit
def expm1(x, exp_x):
    return tl.where(tl.abs(x) < 0.5, x + exp_minus_one_minus_series(x), exp_x - 1.0)


@triton.jit
def log1p(x):
    """ln(1 + x) for 0 <= x <= 1.

    In float32 x + x^2 q(x), q fitted to a relative error of 3e-8: no division. Else 2 artanh(s), s = x / (2 + x).
    """
    if x.dtype == tl.float64:
        s = x / (2.0 + x)
        square = s * s
        series = square * 0.0 + 1.0 / 37
        for i in tl.static_range(18):
            series = 1.0 / (35 - 2 * i) + square * series
        return 2.0 * s * series
    q = -0.030065779 + x * 0.005364821
    q = 0.079204515 + x * q
    q = -0.137538 + x * q
    q = 0.19153655 + x * q
    q = -0.24857163 + x * q
    q = 0.33321324 + x * q
    q = -0.49999648 + x * q
    return x + x * x * q


@triton.jit
def softplus_parts(x):
    """(exp(-|x|), softplus(x)); tl.exp's error of |x| last places is negligible after the logarithm."""
    u = tl.exp(-tl.abs(x))
    return u, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p(u)


@triton.jit
def above_zero(std):
    """The standard deviation, with 1e-30 for 0 (a point mass), whose logarithm has no gradient."""
    return tl.where(std == 0.0, 1e-30, std)


@triton.jit
def to_logvar(parameter, SCALE: tl.constexpr):
    """The scale is one of reference.SCALES or "std_or_0", a standard deviation that may be 0."""
    if SCALE == "logvar":
        return parameter
    if SCALE == "log_std":
        return 2.0 * parameter
    if SCALE == "std":
        return 2.0 * tl.log(parameter)
    if SCALE == "std_or_0":
        return 2.0 * tl.log(above_zero(parameter))
    # Below -15 softplus is u (1 - u / 2), u = exp(p), up to rounding; its logarithm does not underflow.
    u, value = softplus_parts(parameter)
    return 2.0 * tl.where(parameter < -15.0, parameter - 0.5 * u, tl.log(value))


@triton.jit
def to_parameter_gradient(dlogvar, parameter, SCALE: tl.constexpr):
    """dlogvar d logvar / d parameter, by a division by sigma, because 1 / sigma is subnormal for large sigma. An
    infinite sigma is clamped to the largest number, because dlogvar is infinite there."""
    if SCALE == "logvar":
        return dlogvar
    if SCALE == "log_std":
        return 2.0 * dlogvar
    if SCALE == "std_or_0":
        parameter = above_zero(parameter)
    most = 1.7976931348623157e308 if parameter.dtype == tl.float64 else 3.4028234e38
    if SCALE == "std" or SCALE == "std_or_0":
        nothing = (dlogvar == 0.0) & (parameter == 0.0)
        divisor = tl.where(nothing, 1.0, tl.minimum(parameter, most, tl.PropagateNan.ALL))
        return 2.0 * (dlogvar / divisor)
    u, value = softplus_parts(parameter)
    twice_sigmoid = tl.where(parameter < 0.0, 2.0 * u, 2.0) / (1.0 + u)
    body = dlogvar * twice_sigmoid / tl.minimum(value, most)
    return tl.where(parameter < -15.0, dlogvar * (2.0 - u), body)


@triton.jit
def bound(logvar, low, high, BOUNDED: tl.constexpr):
    """logvar clamped to the bounds. Comparisons with NaN are false, so NaN stays."""
    if BOUNDED:
        return tl.where(logvar < low, low, tl.where(logvar > high, high, logvar))
    return logvar


@triton.jit
def bound_gradient(dlogvar, logvar, low, high, BOUNDED: tl.constexpr, LIVE: tl.constexpr):
    if BOUNDED and not LIVE:
        return tl.where((logvar < low) | (logvar > high), 0.0, dlogvar)
    return dlogvar


@triton.jit
def standardise(difference, logvar):
    """(difference / sigma, the square root of 1 / sigma), sigma = exp(logvar / 2).

    The division by sigma is two multiplications by the root. The root overflows only at twice the log-variance at which
    1 / sigma does, and it is clamped there, so that a difference of 0 gives 0 for any sigma.
    """
    root = tl.minimum(exp(logvar, -0.25), 1e300 if logvar.dtype == tl.float64 else 1e38, tl.PropagateNan.ALL)
    return difference * root * root, root


@triton.jit
def weighted(weight, value):
    """weight * value, but 0 for a weight of 0, even if the value has overflowed."""
    return tl.where(weight == 0.0, 0.0, weight * value)


@triton.jit
def standard_kl_terms(mu, logvar, variance):
    """KL(N(mu, variance) || N(0, 1)), variance = exp(logvar)."""
    return 0.5 * (exp_minus_one_minus(logvar, variance) + mu * mu)


@triton.jit
def standard_kl_terms_gradient(mu, logvar, variance):
    return mu, 0.5 * expm1(logvar, variance)


@triton.jit
def kl_terms(mu, logvar, prior_mu, prior_logvar):
    """KL(N(mu, exp(logvar)) || N(prior_mu, exp(prior_logvar))). A prior of None is N(0, 1)."""
    if prior_mu is None:
        return standard_kl_terms(mu, logvar, exp(logvar))
    else:
        x = logvar - prior_logvar
        standard, _ = standardise(mu - prior_mu, prior_logvar)
        return 0.5 * (exp_minus_one_minus(x, exp(x)) + standard * standard)


@triton.jit
def kl_terms_gradient(mu, logvar, prior_mu, prior_logvar):
    """Gradients in mu, logvar and prior_logvar (0 without a prior). The gradient in prior_mu is minus that in mu."""
    if prior_mu is None:
        gradient_mu, gradient_logvar = standard_kl_terms_gradient(mu, logvar, exp(logvar))
        return gradient_mu, gradient_logvar, 0.0
    else:
        x = logvar - prior_logvar
        standard, root = standardise(mu - prior_mu, prior_logvar)
        dlogvar = 0.5 * expm1(x, exp(x))
        return standard * root * root, dlogvar, -dlogvar - 0.5 * standard * standard
