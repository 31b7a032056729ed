"""Device functions that two or more kernels share: addressing, the scale's parametrisation, the KL and its gradient.

Everything takes and returns the compute dtype: float32, or float64 where an input is. In the interpreter a Python
float argument stays one, so nothing here calls `.to` on a scalar argument.
"""

import torch
import triton
import triton.language as tl

TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}  # what things are computed in
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_TAIL = tl.constexpr(1.925963033500702e-08)  # log2(e) - float32(log2(e))
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def offsets(index, inner, outer_stride, inner_stride, NESTED: tl.constexpr):
    """int64: tensors may pass 2^31 elements. A nested axis is two dimensions in one index."""
    if NESTED:
        outer = index // inner
        return outer.to(tl.int64) * outer_stride + (index - outer * inner).to(tl.int64) * inner_stride
    return index.to(tl.int64) * inner_stride


@triton.jit
def tile(row, column, shape, strides, NESTED: tl.constexpr):
    """Element offsets of a tile of rows by columns.

    shape is (rows, inner rows, columns, inner columns), strides (outer row, inner row, outer column, inner column);
    NESTED says which axes have an outer dimension: 1 the rows, 2 the columns, 3 both.
    """
    return elements(row[:, None], column[None, :], shape, strides, NESTED)


@triton.jit
def elements(row, column, shape, strides, NESTED: tl.constexpr):
    """As `tile`, for indices that already have both dimensions (each row may have columns of its own)."""
    rows = offsets(row, shape[1], strides[0], strides[1], NESTED % 2 == 1)
    return rows + offsets(column, shape[3], strides[2], strides[3], NESTED >= 2)


@triton.jit
def exp(x):
    """tl.exp is 2^(x log2 e) with the product rounded, |x| / 2 last places off; the product's remainder mends that."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    product = x * LOG2E
    remainder = tl.fma(x, LOG2E, -product) + x * LOG2E_TAIL
    value = tl.exp2(product)
    return tl.where(tl.abs(remainder) < 1.0, value * (1.0 + remainder * LN2), value)  # not at infinity


@triton.jit
def proportion(x):
    """exp(x) of a log-probability, -inf for what is not there.

    In float64 that would send these lanes, and with them their warp, down the slow branch that exp has below -708:
    zero in its place.
    """
    if x.dtype == tl.float64:
        tiny = x < -700.0
        return tl.where(tiny, 0.0, tl.exp(tl.where(tiny, 0.0, x)))
    return tl.exp(x)


@triton.jit
def finite(maximum):
    """0 in place of -inf: exponentials of differences to it are 0, not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def two_parts(value, DTYPE: tl.constexpr):
    """A float64 value as a sum of two in DTYPE."""
    high = value.to(DTYPE)
    return high, (value - high.to(tl.float64)).to(DTYPE)


@triton.jit
def exp_minus_one_minus_series(x):
    """x^2 (1/2 + x/6 + x^2/24 + ...), exact to rounding for |x| < 1/2."""
    if x.dtype == tl.float64:
        series = x * 0.0 + 1.0
        for i in tl.static_range(15):
            series = 1.0 + x * series * (1.0 / (17 - i))
        return 0.5 * x * x * series
    series = 1.0 / 5040 + x * (1.0 / 40320)
    series = 1.0 / 720 + x * series
    series = 1.0 / 120 + x * series
    series = 1.0 / 24 + x * series
    series = 1.0 / 6 + x * series
    return x * x * (0.5 + x * series)


@triton.jit
def exp_minus_one_minus(x, exp_x):
    """exp(x) - 1 - x without cancellation."""
    return tl.where(tl.abs(x) < 0.5, exp_minus_one_minus_series(x), exp_x - 1.0 - x)


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
    """(exp(-|x|), softplus(x)); the exponential's |x| units in the last place are rounding to its logarithm."""
    u = tl.exp(-tl.abs(x))
    return u, tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) + log1p(u)


@triton.jit
def to_logvar(parameter, SCALE: tl.constexpr):
    if SCALE == "logvar":
        return parameter
    if SCALE == "log_std":
        return 2.0 * parameter
    if SCALE == "std":
        return 2.0 * tl.log(parameter)
    # Below -15 softplus is u (1 - u / 2), u = exp(p), to rounding; its logarithm does not underflow.
    u, value = softplus_parts(parameter)
    return 2.0 * tl.where(parameter < -15.0, parameter - 0.5 * u, tl.log(value))


@triton.jit
def to_logvar_gradient(parameter, SCALE: tl.constexpr):
    """d logvar / d parameter."""
    if SCALE == "logvar":
        return tl.zeros_like(parameter) + 1.0  # parameter * 0 would be NaN at infinity
    if SCALE == "log_std":
        return tl.zeros_like(parameter) + 2.0
    if SCALE == "std":
        return 2.0 / parameter
    u, value = softplus_parts(parameter)
    sigmoid = tl.where(parameter < 0.0, u, 1.0) / (1.0 + u)
    return 2.0 * tl.where(parameter < -15.0, 1.0 - 0.5 * u, sigmoid / value)


@triton.jit
def bound(logvar, low, high, BOUNDED: tl.constexpr):
    """The clamp; comparisons with NaN are false, so NaN stays."""
    if BOUNDED:
        return tl.where(logvar < low, low, tl.where(logvar > high, high, logvar))
    return logvar


@triton.jit
def bound_gradient(dlogvar, logvar, low, high, BOUNDED: tl.constexpr, LIVE: tl.constexpr):
    if BOUNDED and not LIVE:
        return tl.where((logvar < low) | (logvar > high), 0.0, dlogvar)
    return dlogvar


@triton.jit
def kl_terms(mu, logvar, variance):
    """KL(N(mu, variance) || N(0, 1)), variance = exp(logvar)."""
    return 0.5 * (exp_minus_one_minus(logvar, variance) + mu * mu)


@triton.jit
def kl_terms_gradient(mu, logvar, variance):
    return mu, 0.5 * expm1(logvar, variance)


@triton.jit
def kl_terms_prior(mu, logvar, prior_mu, prior_logvar):
    x = logvar - prior_logvar
    # Halves of the exponent, so that a difference of 0 is 0 also where 1 / prior_var overflows.
    standard = (mu - prior_mu) * exp(-0.5 * prior_logvar)
    return 0.5 * (exp_minus_one_minus(x, exp(x)) + standard * standard)


@triton.jit
def kl_terms_prior_gradient(mu, logvar, prior_mu, prior_logvar):
    """In mu, logvar and prior_logvar; in prior_mu it is that in mu with the sign turned."""
    x, root = logvar - prior_logvar, exp(-0.5 * prior_logvar)
    standard = (mu - prior_mu) * root
    dlogvar = 0.5 * expm1(x, exp(x))
    return standard * root, dlogvar, -dlogvar - 0.5 * standard * standard


@triton.jit
def _box_muller(word_0, word_1):
    """Two 32-bit words -> two standard normals: radius sqrt(-2 ln u), u = (word_0 + 1/2) / 2^32, angle 2 pi w_1 / 2^32.

    Half the angle lies in [-pi/2, pi/2), where minimax polynomials (|error| < 5e-8) replace the range reduction of
    tl.cos; cos 2h = 1 - 2 sin^2 h, sin 2h = 2 sin h cos h.
    """
    radius = tl.sqrt(-2.0 * tl.log(word_0.to(tl.float32) * 2.0**-32 + 2.0**-33))
    half = word_1.to(tl.int32, bitcast=True).to(tl.float32) * (3.141592653589793 * 2.0**-32)
    square = half * half
    sine = -1.9800888666e-4 + square * 2.5904717206e-6
    sine = -1.6666647618e-1 + square * (8.3328996434e-3 + square * sine)
    sine = half + half * square * sine
    cosine = -1.3853704210e-3 + square * 2.3153935887e-5
    cosine = 0.99999995348 + square * (-0.49999905343 + square * (4.1663584638e-2 + square * cosine))
    doubled = radius * sine * 2.0
    return radius - doubled * sine, doubled * cosine


@triton.jit
def normals(seed, group, sample, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Standard normals [ROWS, COLUMNS] in float32, four for each Philox call.

    group is [ROWS, COLUMNS / 4], int64: element i of a sample takes normal i % 4 of the counter (i // 4, sample), as
    fastkl.reference.normal_noise says.
    """
    zero = (group * 0).to(tl.uint32)
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    word_0, word_1, word_2, word_3 = tl.philox(seed, low, high, zero + sample, zero)
    normal_0, normal_1 = _box_muller(word_0, word_1)
    normal_2, normal_3 = _box_muller(word_2, word_3)
    # join adds a last dimension: [..., i, j] is normal 2 i + j, and four neighbours stay in one thread.
    return tl.join(tl.join(normal_0, normal_2), tl.join(normal_1, normal_3)).reshape(ROWS, COLUMNS)
