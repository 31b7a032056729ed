/* Conversion of bfloat16 and float16 from and to float, rounded to nearest, ties to even. NaN stays NaN. It uses integers
 * only, because not every compiler has these types; the loops vectorise. */

#ifndef FASTKL_HALVES_H
#define FASTKL_HALVES_H

#include <stdint.h>
#include <string.h>

#include "functions.h"

enum { WHOLE, BFLOAT16, FLOAT16 }; /* the kind of a tensor's elements; WHOLE is a REAL */

static inline uint32_t bits_of_float(float x) { uint32_t bits; memcpy(&bits, &x, sizeof x); return bits; }
static inline float float_of(uint32_t bits) { float x; memcpy(&x, &bits, sizeof x); return x; }

static inline float from_bfloat16(uint16_t half) { return float_of((uint32_t)half << 16); }

static inline float from_float16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7FFF;
    uint32_t bits = (rest << 13) + (112u << 23); /* the difference of the biases */
    bits = rest >= 0x7C00 ? bits + (112u << 23) : bits; /* infinity, NaN */
    bits = rest < 0x0400 ? bits_of_float((float)(int32_t)rest * 0x1p-24f) : bits; /* denormal */
    return float_of(sign | bits);
}

static inline uint16_t to_bfloat16(float x) {
    uint32_t bits = bits_of_float(x), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? bits >> 16 | 0x40 : rounded);
}

static inline uint16_t to_float16(float x) {
    uint32_t bits = bits_of_float(x), rest = bits & 0x7FFFFFFF;
    uint32_t rounded = (rest - (112u << 23) + 0xFFF + (rest >> 13 & 1)) >> 13;
    uint32_t denormal = bits_of_float(float_of(rest) + 0.5f) - bits_of_float(0.5f); /* the last place of 0.5f is 2^-24 */
    rounded = rest < 0x38800000 ? denormal : rounded; /* 2^-14 */
    rounded = rest >= 0x47800000 ? 0x7C00 : rounded;  /* 2^16 */
    rounded = rest > 0x7F800000 ? 0x7E00 : rounded;
    return (uint16_t)(rounded | (bits >> 16 & 0x8000));
}

static void load_halves(int kind, const uint16_t *from, int64_t stride, REAL *restrict to, int count) {
    if (kind == BFLOAT16 && stride == 1) for (int i = 0; i < count; i++) to[i] = from_bfloat16(from[i]);
    else if (stride == 1) for (int i = 0; i < count; i++) to[i] = from_float16(from[i]);
    else if (kind == BFLOAT16) for (int i = 0; i < count; i++) to[i] = from_bfloat16(from[i * stride]);
    else for (int i = 0; i < count; i++) to[i] = from_float16(from[i * stride]);
}

static void store_halves(int kind, uint16_t *restrict to, int64_t stride, const REAL *from, int count) {
    if (kind == BFLOAT16 && stride == 1) for (int i = 0; i < count; i++) to[i] = to_bfloat16((float)from[i]);
    else if (stride == 1) for (int i = 0; i < count; i++) to[i] = to_float16((float)from[i]);
    else if (kind == BFLOAT16) for (int i = 0; i < count; i++) to[i * stride] = to_bfloat16((float)from[i]);
    else for (int i = 0; i < count; i++) to[i * stride] = to_float16((float)from[i]);
}
#endif
