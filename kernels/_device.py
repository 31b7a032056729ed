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
PHILOX_ROUNDS = tl.constexpr(7)  # those of reference.philox
POSTERIOR = tl.constexpr(1)  # reference.Stream.POSTERIOR


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
def exp(x, SCALE: tl.constexpr = 1.0):
    """exp(SCALE x), SCALE a power of 2. tl.exp is 2^(x log2 e) with the product rounded, |x| / 2 last places off; what
    the rounding left out of x mends that."""
    if x.dtype == tl.float64:
        return tl.exp(SCALE * x)
    product = x * (SCALE * LOG2E)
    if SCALE == 1.0:
        remainder = tl.fma(x, LOG2E, -product) + x * LOG2E_TAIL
        value = tl.exp2(product)
        return tl.where(tl.abs(remainder) < 1.0, value * (1.0 + remainder * LN2), value)  # not at infinity
    # About 1. Where x is huge it is anything, and NaN at infinity, which the maximum drops: there the power is all.
    mend = tl.maximum(1.0 + SCALE * tl.fma(product, -LN2 / SCALE, x), 0.5)
    return tl.exp2(product) * mend


@triton.jit
def exp_to_half(x, SCALE: tl.constexpr = 1.0):
    """exp(SCALE x) for results that are rounded to 16 bits: as good without the mending."""
    if x.dtype == tl.float64:
        return tl.exp(SCALE * x)
    return tl.exp2(x * (SCALE * LOG2E))


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
def not_infinite(variance):
    """NaN where a variance has overflowed: a logarithm of it would be finite, and wrong."""
    return tl.where(variance == float("inf"), float("nan"), variance)


@triton.jit
def two_parts(value, DTYPE: tl.constexpr):
    """A float64 value as a sum of two in DTYPE."""
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
    """exp(x) - 1 - x without cancellation; infinity where exp(x) is: an x without end is not subtracted from that."""
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
def to_parameter_gradient(dlogvar, parameter, SCALE: tl.constexpr):
    """dlogvar d logvar / d parameter: divided by sigma, for 1 / sigma is no normal number where sigma is large. An
    infinite sigma counts as the largest number: dlogvar is infinite there, too."""
    if SCALE == "logvar":
        return dlogvar
    if SCALE == "log_std":
        return 2.0 * dlogvar
    most = 1.7976931348623157e308 if parameter.dtype == tl.float64 else 3.4028234e38
    if SCALE == "std":
        nothing = (dlogvar == 0.0) & (parameter == 0.0)
        divisor = tl.where(nothing, 1.0, tl.minimum(parameter, most, tl.PropagateNan.ALL))
        return 2.0 * (dlogvar / divisor)
    u, value = softplus_parts(parameter)
    twice_sigmoid = tl.where(parameter < 0.0, 2.0 * u, 2.0) / (1.0 + u)
    body = dlogvar * twice_sigmoid / tl.minimum(value, most)
    return tl.where(parameter < -15.0, dlogvar * (2.0 - u), body)


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
def standardise(difference, logvar):
    """(difference / sigma, the square root of 1 / sigma), sigma = exp(logvar / 2).

    What is divided by sigma is multiplied by that root twice: it overflows at twice the log-variance where 1 / sigma
    does, and beyond that it stays finite, so that a difference of 0 is 0 however small sigma is.
    """
    root = tl.minimum(exp(logvar, -0.25), 1e300 if logvar.dtype == tl.float64 else 1e38, tl.PropagateNan.ALL)
    return difference * root * root, root


@triton.jit
def weighted(weight, value):
    """weight * value, 0 where the weight is 0: there the value may have overflowed."""
    return tl.where(weight == 0.0, 0.0, weight * value)


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
    standard, _ = standardise(mu - prior_mu, prior_logvar)
    return 0.5 * (exp_minus_one_minus(x, exp(x)) + standard * standard)


@triton.jit
def kl_terms_prior_gradient(mu, logvar, prior_mu, prior_logvar):
    """In mu, logvar and prior_logvar; in prior_mu it is that in mu with the sign turned."""
    x = logvar - prior_logvar
    standard, root = standardise(mu - prior_mu, prior_logvar)
    dlogvar = 0.5 * expm1(x, exp(x))
    return standard * root * root, dlogvar, -dlogvar - 0.5 * standard * standard


@triton.jit
def _wide_product(word, FACTOR: tl.constexpr):
    """(high, low) 32 bits of a product, from one multiplication."""
    product = word.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(seed, group, index, sample, stream):
    """The four words of reference.philox, uint32, of the counters `group + index` and of the numbers of a sample and a
    stream: int64, and int32 from 0 on, which broadcast."""
    index = index.to(tl.uint32)
    # In 32 bits with a carry: of 64-bit words the compiler would multiply both halves.
    word_0 = group.to(tl.uint32) + index
    word_1 = (group >> 32).to(tl.uint32) + (word_0 < index).to(tl.uint32)
    zero = tl.zeros_like(word_0)
    word_2, word_3 = zero + sample, zero + stream
    key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        high_0, low_0 = _wide_product(word_0, 0xD2511F53)
        high_2, low_2 = _wide_product(word_2, 0xCD9E8D57)
        word_0, word_1, word_2, word_3 = high_2 ^ word_1 ^ key_0, low_2, high_0 ^ word_3 ^ key_1, low_0
        key_0 = tl.add(key_0, 0x9E3779B9, sanitize_overflow=False)  # the same for all: computed once for each thread
        key_1 = tl.add(key_1, 0xBB67AE85, sanitize_overflow=False)
    return word_0, word_1, word_2, word_3


@triton.jit
def _radius(word, HALF: tl.constexpr):
    """sqrt(-2 ln u), u = (word + 1/2) / 2^32, within 3e-7, with HALF within 1.4e-5.

    u = 2^n (1 + f), 1 + f from sqrt(1/2) to sqrt(2): -2 ln u is -2 n ln 2 + f q(f), q a polynomial for the least error
    of the root. Half the instructions of tl.log.
    """
    bits = (word.to(tl.float32) * 2.0**-32 + 2.0**-33).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -8388608  # n 2^23
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    if HALF:
        q = -0.672765210 + f * (0.547707824 + f * -0.359184458)
        q = -1.999931563 + f * (0.998391439 + f * q)
    else:
        q = -0.410318429 + f * (0.378639194 + f * -0.242403426)
        q = -0.666220569 + f * (0.497483662 + f * q)
        q = -2.000002709 + f * (1.000045881 + f * q)
    return tl.sqrt(exponent.to(tl.float32) * (LN2 * -(2.0**-22)) + f * q)


@triton.jit
def _box_muller(word_0, word_1, HALF: tl.constexpr):
    """Two 32-bit words -> two standard normals: radius sqrt(-2 ln u), angle 2 pi word_1 / 2^32.

    Half the angle h lies in [-pi/2, pi/2), where minimax polynomials of s = sqrt(2) sin h and c = sqrt(2) cos h
    (within 6e-8, with HALF 9e-6) replace the range reduction of tl.cos; cos 2h = 1 - s^2, sin 2h = s c.
    """
    radius = _radius(word_0, HALF)
    half = word_1.to(tl.int32, bitcast=True).to(tl.float32) * (3.141592653589793 * 2.0**-32)
    square = half * half
    if HALF:
        sine = 1.41420878 + square * (-2.35676281e-1 + square * (1.17469302e-2 + square * -2.59703880e-4))
        cosine = 1.41417782 + square * (-7.06898630e-1 + square * (5.86046338e-2 + square * -1.78211e-3))
    else:
        sine = 1.17845003e-2 + square * (-2.80027172e-4 + square * 3.66353597e-6)
        sine = 1.41421353 + square * (-2.35701992e-1 + square * sine)
        cosine = 5.89193826e-2 + square * (-1.95822883e-3 + square * 3.25686055e-5)
        cosine = 1.41421326 + square * (-7.07104184e-1 + square * cosine)
    leg = radius * (half * sine)
    return radius - leg * (half * sine), leg * cosine


@triton.jit
def four_normals(seed, group, index, sample, stream, HALF: tl.constexpr = False):
    """Standard normals in float32 of one Philox call; with HALF for results of 16 bits, whose rounding hides an error
    of 6e-5. Element i of a sample takes normal i % 4 of the counter (i // 4, sample, stream), as reference.normal_noise
    says.
    """
    word_0, word_1, word_2, word_3 = philox(seed, group, index, sample, stream)
    normal_0, normal_1 = _box_muller(word_0, word_1, HALF)
    normal_2, normal_3 = _box_muller(word_2, word_3, HALF)
    return normal_0, normal_1, normal_2, normal_3


@triton.jit
def normals(
    seed, group, sample, stream, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Standard normals [ROWS, COLUMNS]; each row's first is that of Philox call `group`, int64 [ROWS, 1] or one number.

    join adds a last dimension: what is joined last are neighbours, and four of them, with WIDE eight, stay in the
    thread that has as many of the tensors that are read 16 bytes at a time.
    """
    if WIDE and COLUMNS >= 8:
        even = 2 * tl.arange(0, COLUMNS // 8)[None, :]
        normal_0, normal_1, normal_2, normal_3 = four_normals(seed, group, even, sample, stream, HALF)
        normal_4, normal_5, normal_6, normal_7 = four_normals(seed, group, even + 1, sample, stream, HALF)
        normal_0, normal_1 = tl.join(normal_0, normal_4), tl.join(normal_1, normal_5)
        normal_2, normal_3 = tl.join(normal_2, normal_6), tl.join(normal_3, normal_7)
    else:
        index = tl.arange(0, COLUMNS // 4)[None, :]
        normal_0, normal_1, normal_2, normal_3 = four_normals(seed, group, index, sample, stream, HALF)
    return tl.join(tl.join(normal_0, normal_2), tl.join(normal_1, normal_3)).reshape(ROWS, COLUMNS)
