/* Functions of a REAL (float or double) for loops that the compiler vectorises: no branches, no tables, no calls.
 * Infinities and NaN propagate as in the formulas, so compiler flags must not assume them away. Denormal results are 0:
 * arithmetic with denormals is up to a hundred times slower, and they do not matter in a loss. */

#ifndef FASTKL_FUNCTIONS_H
#define FASTKL_FUNCTIONS_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline)) /* one copy for each constant argument */

#ifdef FLOAT64
typedef double REAL;
typedef int64_t BITS;
typedef uint64_t UNSIGNED;
#define MANTISSA 52
/* 1.5 * 2^52 + bias - 1: a number added to it is rounded to an integer n, and the last bits are the exponent of 2^(n-1) */
#define ROUND (6755399441055744.0 + 1022.0)
#define LN2_HIGH 6.93147180369123816490e-01 /* its product with an exponent is exact */
#define LN2_LOW 1.90821492927058770002e-10
#define LEAST_NORMAL 2.2250738585072014e-308
#define MOST 1.7976931348623157e+308
#else
typedef float REAL;
typedef int32_t BITS;
typedef uint32_t UNSIGNED;
#define MANTISSA 23
#define ROUND (12582912.0f + 126.0f) /* 1.5 * 2^23 + bias - 1 */
#define LN2_HIGH 0.693359375f
#define LN2_LOW -2.12194440e-4f
#define LEAST_NORMAL 1.17549435e-38f
#define MOST 3.40282347e+38f
#endif
#define LOG2E ((REAL)1.4426950408889634)

static inline BITS bits_of(REAL x) { BITS bits; memcpy(&bits, &x, sizeof x); return bits; }
static inline REAL real_of(BITS bits) { REAL x; memcpy(&x, &bits, sizeof x); return x; }

/* exp(r) - 1 - r for |r| <= ln 2 / 2: its series, or in float a minimax polynomial (relative error 3e-9). */
static inline REAL exp_rest(REAL r) {
#ifdef FLOAT64
    REAL s = 1.0 / 6227020800.0 + r * (1.0 / 87178291200.0);
    s = 1.0 / 479001600.0 + r * s;
    s = 1.0 / 39916800.0 + r * s;
    s = 1.0 / 3628800.0 + r * s;
    s = 1.0 / 362880.0 + r * s;
    s = 1.0 / 40320.0 + r * s;
    s = 1.0 / 5040.0 + r * s;
    s = 1.0 / 720.0 + r * s;
    s = 1.0 / 120.0 + r * s;
    s = 1.0 / 24.0 + r * s;
    s = 1.0 / 6.0 + r * s;
    s = 0.5 + r * s;
    return r * r * s;
#else /* in pairs, which halves the chain of dependent steps */
    REAL square = r * r;
    REAL low = 0.5f + r * 1.6666666532e-1f, middle = 4.1666465229e-2f + r * 8.3333607545e-3f;
    REAL high = 1.3933630807e-3f + r * 1.9857812323e-4f;
    return square * (low + square * (middle + square * high));
#endif
}

/* x = n ln 2 + r. half is 2^(n - 1), because 2^n overflows one step before exp(x) does. x is clamped to exp_bounds[1], at
 * which exp(x) is infinite: subtracting an infinite x from that would give NaN, or -inf instead of infinity. */
typedef struct { REAL x, half, r, rest; } split;

/* Clamp for exp's argument. Defined in bounds.c so that the compiler cannot see the values: with constants gcc emits
 * compare + blend instead of one min or max. */
extern const REAL exp_bounds[2] __attribute__((visibility("hidden")));

static inline split split_exp(REAL x) {
    x = x > exp_bounds[1] ? exp_bounds[1] : x; /* comparisons with NaN are false, so NaN stays */
    REAL below = x;
    x = x < exp_bounds[0] ? exp_bounds[0] : x;
    REAL shifted = x * LOG2E + ROUND, n = shifted - ROUND;
    REAL r = (x - n * LN2_HIGH) - n * LN2_LOW;
    split parts = {below, real_of((BITS)((UNSIGNED)bits_of(shifted) << MANTISSA)), r, exp_rest(r)};
    return parts;
}

/* exp(x), exp(x) - 1 and exp(x) - 1 - x from the split of x. The last is 2^n rest + (2^n - 1) (1 + r) + (r - x); near 0,
 * with n = 0 and r = x, only the series remains. */
static inline REAL whole(split p) { return 2 * (p.half + p.half * (p.r + p.rest)); }
static inline REAL minus_one(split p) { return 2 * (p.half * (p.r + p.rest) + (p.half - (REAL)0.5)); }
static inline REAL minus_one_minus(split p) {
    return 2 * (p.half * p.rest + (p.half - (REAL)0.5) * (1 + p.r)) + (p.r - p.x);
}

static inline REAL exponential(REAL x) { return whole(split_exp(x)); }
static inline REAL exp_minus_one(REAL x) { return minus_one(split_exp(x)); }
static inline REAL exp_minus_one_minus(REAL x) { return minus_one_minus(split_exp(x)); }

/* The square root of 1 / sigma, sigma = exp(x / 2). A division by sigma is two multiplications by it. It overflows only at
 * twice the x at which 1 / sigma does, and is clamped there, so that 0 stays 0 for any sigma. */
static inline REAL precision_root(REAL x) {
    REAL root = exponential(x * (REAL)-0.25);
    return root > MOST ? MOST : root;
}

/* weight * value, but 0 for a weight of 0, even if the value has overflowed. */
static inline REAL weighted(REAL weight, REAL value) { return weight == 0 ? 0 : weight * value; }

/* sigma = exp(x / 2), exp(x) - 1 and exp(x) - 1 - x from one exponential, without cancellation. */
typedef struct { REAL sigma, variance_minus_one, rest; } spread;

static inline spread spread_of(REAL x) {
    REAL h = (REAL)0.5 * x;
    split p = split_exp(h);
    REAL e = minus_one(p);
    return (spread){whole(p), e * (e + 2), e * e + 2 * minus_one_minus(p)};
}

/* 2 artanh(s) by its series, for |s| <= 1/3. */
static inline REAL twice_artanh(REAL s) {
#ifdef FLOAT64
    const int terms = 17;
#else
    const int terms = 7;
#endif
    REAL square = s * s, series = (REAL)1 / (2 * terms + 1);
#pragma GCC unroll 20
    for (int term = terms - 1; term >= 0; term--) series = (REAL)1 / (2 * term + 1) + square * series;
    return 2 * s * series;
}

/* ln(1 + x) for 0 <= x <= 1 */
static inline REAL log_one_plus(REAL x) { return twice_artanh(x / (2 + x)); }

/* ln(1 + f) for 1 + f from sqrt 1/2 to sqrt 2: f - f^2/2 plus a rest from the series of 2 artanh s. f is added last,
 * because it is exact. */
static inline REAL log_of_one_and(REAL f) {
#ifdef FLOAT64
    const int terms = 10;
#else
    const int terms = 4;
#endif
    REAL s = f / (2 + f), square = s * s, half = (REAL)0.5 * f * f, rest = 0;
#pragma GCC unroll 20
    for (int term = terms; term > 0; term--) rest = square * ((REAL)2 / (2 * term + 1) + rest);
    return f - (half - s * (half + rest));
}

/* ln x; -inf for 0 and denormals, NaN for negative x */
static inline REAL logarithm(REAL x) {
    BITS bits = bits_of(x);
    BITS exponent = (bits - bits_of((REAL)0.70710678118654752)) >> MANTISSA; /* x = 2^exponent m, m next to 1 */
    REAL m = real_of(bits - (BITS)((UNSIGNED)exponent << MANTISSA)), n = (REAL)exponent;
    REAL value = n * LN2_HIGH + (n * LN2_LOW + log_of_one_and(m - 1));
    value = x < (REAL)LEAST_NORMAL ? -(REAL)INFINITY : value; /* separate selections: gcc turns nested ones into jumps */
    value = x < 0 ? (REAL)NAN : value;
    return x <= MOST ? value : x; /* infinity, NaN */
}
#endif
