/* Noise of a seed, equal to fastkl.reference.normal_noise and the kernels for each element. */

#ifndef FASTKL_PHILOX_H
#define FASTKL_PHILOX_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "functions.h"

#define CALLS 264 /* most Philox calls at a time, of four words each; a multiple of 8 */

/* Four calls in parallel, with a 32-bit word in each 64-bit lane; the upper bits are ignored. */
typedef uint64_t lanes __attribute__((vector_size(32)));

static inline lanes product(lanes word, uint64_t factor) {
#ifdef __AVX2__
    return (lanes)_mm256_mul_epu32((__m256i)word, _mm256_set1_epi64x((long long)factor));
#else
    return (word & 0xFFFFFFFF) * factor;
#endif
}

/* Words of the even calls and of the odd ones, in order. */
static inline void store_words(uint32_t *out, lanes even, lanes odd) {
    lanes words = (even & 0xFFFFFFFF) | odd << 32;
    memcpy(out, &words, sizeof words);
}

/* Data that the loops after the noise read and write, a REAL for each number, or null. Prefetched while the noise is
 * computed; otherwise, beyond the cache size, the loops stall, mostly on their stores. */
typedef struct { const REAL *read[3], *written[2]; } awaited;
#define NOTHING (awaited){.written = {NULL}}

/* Prefetch `count` numbers from `first` on. Inlined, because gcc would drop a call without result or side effect. */
__attribute__((always_inline)) static inline void fetch(const awaited *soon, int first, int count) {
    const int line = 64 / (int)sizeof(REAL);
    for (int i = first; i < first + count; i += line) {
        for (int k = 0; k < 3; k++) if (soon->read[k]) __builtin_prefetch(soon->read[k] + i, 0);
        for (int k = 0; k < 2; k++) if (soon->written[k]) __builtin_prefetch(soon->written[k] + i, 1);
    }
}

#define ROUNDS 7 /* as in fastkl.reference.philox */

/* Philox4x32 (Salmon et al. 2011) of the counters (first + i, sample, stream): words[k][i] is word k of call i. Even and
 * odd calls are interleaved, so that one hides the latency of the other's products. */
static inline void philox(uint64_t seed, uint64_t first, uint32_t sample, uint32_t stream, int calls,
                          uint32_t words[4][CALLS], awaited soon) {
    for (int call = 0; call < calls; call += 8) {
        fetch(&soon, 4 * call, 32);
        lanes a[2], b[2], c[2], d[2];
        for (int odd = 0; odd < 2; odd++) {
            a[odd] = (lanes){0, 2, 4, 6} + (first + (uint64_t)(call + odd));
            b[odd] = a[odd] >> 32, c[odd] = (lanes){0} + sample, d[odd] = (lanes){0} + stream;
        }
        uint32_t key_0 = (uint32_t)seed, key_1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 7
        for (int step = 0; step < ROUNDS; step++) {
            for (int odd = 0; odd < 2; odd++) {
                lanes left = product(a[odd], 0xD2511F53), right = product(c[odd], 0xCD9E8D57);
                a[odd] = (b[odd] ^ key_0) ^ (right >> 32), b[odd] = right;
                c[odd] = (d[odd] ^ key_1) ^ (left >> 32), d[odd] = left;
            }
            key_0 += 0x9E3779B9u, key_1 += 0xBB67AE85u;
        }
        store_words(words[0] + call, a[0], a[1]), store_words(words[1] + call, b[0], b[1]);
        store_words(words[2] + call, c[0], c[1]), store_words(words[3] + call, d[0], d[1]);
    }
}

/* ln u for u in (0, 1]. */
static inline float log_unit(float u) {
    int32_t bits;
    memcpy(&bits, &u, sizeof u);
    int32_t exponent = (bits - 0x3F3504F3) >> 23; /* u = 2^exponent m, m in [sqrt 1/2, sqrt 2) */
    bits -= exponent * (1 << 23);
    float m;
    memcpy(&m, &bits, sizeof m);
    float f = m - 1, e = (float)exponent;
    /* ln(1 + f) = f - f^2/2 + f^3 p(f); coefficients of Cephes' logf */
    float square = f * f, fourth = square * square; /* in pairs, which halves the chain of dependent steps */
    float high = (1.1676998740e-1f - 1.1514610310e-1f * f) + square * 7.0376836292e-2f;
    float middle = (1.4249322787e-1f - 1.2420140846e-1f * f);
    float low = (3.3333331174e-1f - 2.4999993993e-1f * f) + square * (2.0000714765e-1f - 1.6668057665e-1f * f);
    float p = low + fourth * (middle + square * high);
    return f + (f * square * p + (e * -2.12194440e-4f - 0.5f * square)) + e * 0.693359375f;
}

typedef struct { float first, second; } pair;

/* Two standard normals from two words (Box and Muller 1958), as in fastkl.kernels._device. */
static inline pair box_muller(uint32_t word_0, uint32_t word_1) {
    /* float of an unsigned word, rounded once: both halves are exact */
    float word = (float)(int32_t)(word_0 >> 16) * 65536.0f + (float)(int32_t)(word_0 & 0xFFFF);
    float radius = sqrtf(-2.0f * log_unit(word * 0x1p-32f + 0x1p-33f));
    float half = (float)(int32_t)word_1 * (float)(3.141592653589793 * 0x1p-32);
    float square = half * half;
    float sine = -1.9800888666e-4f + square * 2.5904717206e-6f;
    sine = -1.6666647618e-1f + square * (8.3328996434e-3f + square * sine);
    sine = half + half * square * sine;
    float cosine = -1.3853704210e-3f + square * 2.3153935887e-5f;
    cosine = 0.99999995348f + square * (-0.49999905343f + square * (4.1663584638e-2f + square * cosine));
    float doubled = radius * sine * 2;
    return (pair){radius - doubled * sine, doubled * cosine};
}

/* Normals `first` to `first + count` of a sample and stream, in `out` with room for NOISE; returns a pointer to the first. */
#define NOISE (4 * CALLS)
static const float *normals(uint64_t seed, uint64_t first, uint32_t sample, uint32_t stream, int count,
                            float *restrict out, awaited soon) {
    uint32_t words[4][CALLS];
    int shift = (int)(first % 4), calls = (shift + count + 3) / 4;
    philox(seed, first / 4, sample, stream, calls, words, soon);
    for (int i = 0; i < calls; i++) {
        pair a = box_muller(words[0][i], words[1][i]), b = box_muller(words[2][i], words[3][i]);
        out[4 * i] = a.first, out[4 * i + 1] = a.second, out[4 * i + 2] = b.first, out[4 * i + 3] = b.second;
    }
    return out + shift;
}
#endif
