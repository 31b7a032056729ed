"""Noise from Philox in registers: standard normals and Gumbel variates, as in fastkl.reference."""

import triton
import triton.language as tl

from fastkl.kernels._device import LN2

PHILOX_ROUNDS = tl.constexpr(7)  # as in reference.philox
POSTERIOR = tl.constexpr(1)  # reference.Stream.POSTERIOR


@triton.jit
def _wide_product(word, FACTOR: tl.constexpr):
    """The (high, low) 32 bits of a product, by one multiplication."""
    product = word.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(seed, group, index, sample, stream):
    """The four words (uint32) of reference.philox for the counters `group + index`, sample and stream.

    group is int64; index, sample and stream are int32, not negative, and broadcast.
    """
    index = index.to(tl.uint32)
    # 32-bit words with a carry: the compiler would multiply both halves of 64-bit words.
    word_0 = group.to(tl.uint32) + index
    word_1 = (group >> 32).to(tl.uint32) + (word_0 < index).to(tl.uint32)
    zero = tl.zeros_like(word_0)
    word_2, word_3 = zero + sample, zero + stream
    key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        high_0, low_0 = _wide_product(word_0, 0xD2511F53)
        high_2, low_2 = _wide_product(word_2, 0xCD9E8D57)
        word_0, word_1, word_2, word_3 = high_2 ^ word_1 ^ key_0, low_2, high_0 ^ word_3 ^ key_1, low_0
        key_0 = tl.add(key_0, 0x9E3779B9, sanitize_overflow=False)  # scalars: computed once per thread
        key_1 = tl.add(key_1, 0xBB67AE85, sanitize_overflow=False)
    return word_0, word_1, word_2, word_3


@triton.jit
def _radius(word, HALF: tl.constexpr):
    """sqrt(-2 ln u), u = (word + 1/2) / 2^32, within 3e-7, with HALF within 1.4e-5.

    u = 2^n (1 + f), 1 + f from sqrt(1/2) to sqrt(2). -2 ln u is -2 n ln 2 + f q(f), with a polynomial q that minimises
    the error of the root. It takes half the instructions of tl.log.
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
    """Two standard normals from two 32-bit words: radius sqrt(-2 ln u), angle 2 pi word_1 / 2^32.

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
    """Four standard normals in float32 from one Philox call; HALF is for 16-bit results, whose rounding hides an error
    of 6e-5. As in reference.normal_noise, element i of a sample takes normal i % 4 of the counter (i // 4, sample,
    stream).
    """
    word_0, word_1, word_2, word_3 = philox(seed, group, index, sample, stream)
    normal_0, normal_1 = _box_muller(word_0, word_1, HALF)
    normal_2, normal_3 = _box_muller(word_2, word_3, HALF)
    return normal_0, normal_1, normal_2, normal_3


@triton.jit
def log(x):
    """ln x of a positive normal float32, within a relative error of 1e-7, in half the instructions of tl.log. With
    x = 2^n (1 + f), 1 + f from sqrt(1/2) to sqrt(2), it is n ln 2 + f + f^2 q(f), q a minimax polynomial."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -8388608  # n 2^23
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    q = -0.14307516813 + f * 0.08734829724
    q = -0.16570508480 + f * (0.14917975664 + f * q)
    q = -0.25001755357 + f * (0.19962072372 + f * q)
    q = -0.49999991059 + f * (0.33333951235 + f * q)
    return exponent.to(tl.float32) * (LN2 * 2.0**-23) + (f + f * f * q)


@triton.jit
def gumbel(word):
    """-ln(-ln u), u = (word + 1/2) / 2^32, in float32; near 1 from 1 - u, so that both tails are accurate."""
    signed = word.to(tl.int32, bitcast=True)
    low = signed >= 0
    tail = (signed ^ (signed >> 31)).to(tl.float32) * 2.0**-32 + 2.0**-33  # u or 1 - u, at most 1/2
    u = tl.where(low, tail, 1.0 - tail)
    rounding = tl.where(low, 0.0, (u - 1.0) + tail)  # the rounding error of 1 - tail, which dominates ln u near 1
    return -log(rounding - log(u))


@triton.jit
def four_gumbels(seed, group, index, sample, stream, HALF: tl.constexpr):
    """Four standard Gumbel variates in float32 from one Philox call, for any dtype of the result."""
    word_0, word_1, word_2, word_3 = philox(seed, group, index, sample, stream)
    return gumbel(word_0), gumbel(word_1), gumbel(word_2), gumbel(word_3)


@triton.jit
def neighbours(
    four: tl.constexpr, seed, group, sample, stream, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Noise [ROWS, COLUMNS] of which `four` draws four neighbours by a Philox call; each row starts at call `group`,
    int64 [ROWS, 1] or one number.

    join adds a last dimension, so values joined last are neighbours. Four of them, with WIDE eight, stay in one thread,
    which matches the layout of 16-byte loads.
    """
    if WIDE and COLUMNS >= 8:
        even = 2 * tl.arange(0, COLUMNS // 8)[None, :]
        noise_0, noise_1, noise_2, noise_3 = four(seed, group, even, sample, stream, HALF)
        noise_4, noise_5, noise_6, noise_7 = four(seed, group, even + 1, sample, stream, HALF)
        noise_0, noise_1 = tl.join(noise_0, noise_4), tl.join(noise_1, noise_5)
        noise_2, noise_3 = tl.join(noise_2, noise_6), tl.join(noise_3, noise_7)
    else:
        index = tl.arange(0, COLUMNS // 4)[None, :]
        noise_0, noise_1, noise_2, noise_3 = four(seed, group, index, sample, stream, HALF)
    return tl.join(tl.join(noise_0, noise_2), tl.join(noise_1, noise_3)).reshape(ROWS, COLUMNS)


@triton.jit
def normals(
    seed, group, sample, stream, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Standard normals [ROWS, COLUMNS]."""
    return neighbours(four_normals, seed, group, sample, stream, ROWS, COLUMNS, HALF, WIDE)


@triton.jit
def shifted_columns(row, start, columns, SHIFT: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns [ROWS or 1, COLUMNS] from `start`, shifted left so that each row begins at the start of a Philox call.

    A row of D elements begins at element row * D of the noise, in the middle of a call unless 4 divides D.
    """
    column = start + tl.arange(0, COLUMNS)[None, :]
    if SHIFT:
        column -= ((row.to(tl.int64) * columns) & 3).to(tl.int32)[:, None]
    return column


@triton.jit
def row_noise(
    seed, row, start, sample, stream, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HALF: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """The noise of the elements that `shifted_columns` gives; `start` is a multiple of 4."""
    first = row.to(tl.int64)[:, None] * columns + start
    WIDE: tl.constexpr = HALF and not SHIFT  # shifted rows are stored element by element
    return normals(seed, first >> 2, sample, stream, ROWS, COLUMNS, HALF, WIDE)
