/* The parametrisations of a log-variance, and its bounds: fastkl.reference's to_logvar and bound. */

#ifndef FASTKL_PARAMETERS_H
#define FASTKL_PARAMETERS_H

#include "functions.h"

enum { LOGVAR, LOG_STD, STD, SOFTPLUS };
typedef struct { int scale, bounded, live, positive; REAL low, high; } posterior; /* positive: a std of 0 is 1e-30 */

static inline REAL softplus(REAL x, REAL u) { return (x > 0 ? x : 0) + log_one_plus(u); } /* u = exp(-|x|) */

static inline REAL magnitude(REAL x) { return x < 0 ? -x : x; }

/* The value of a std of 0; taken out of the loops, which would not vectorise with this condition. */
static inline REAL least_std(const posterior *q) { return q->positive ? (REAL)1e-30 : 0; }

/* The log-variance before the bounds. Below -15 softplus is u (1 - u / 2) to rounding; its logarithm does not underflow. */
static const REAL *to_logvar(const posterior *q, const REAL *v, int n, REAL *restrict out) {
    if (q->scale == LOGVAR) return v;
    if (q->scale == LOG_STD) for (int i = 0; i < n; i++) out[i] = 2 * v[i];
    REAL least = least_std(q);
    if (q->scale == STD) for (int i = 0; i < n; i++) out[i] = 2 * logarithm(v[i] == 0 ? least : v[i]);
    if (q->scale == SOFTPLUS)
        for (int i = 0; i < n; i++) {
            REAL u = exponential(-magnitude(v[i])), value = logarithm(softplus(v[i], u));
            out[i] = 2 * (v[i] < -15 ? v[i] - u / 2 : value);
        }
    return out;
}

static const REAL *bound(const posterior *q, const REAL *raw, int n, REAL *restrict out) {
    if (!q->bounded) return raw;
    REAL low = q->low, high = q->high;
    for (int i = 0; i < n; i++) out[i] = raw[i] < low ? low : raw[i] > high ? high : raw[i];
    return out;
}

/* The gradient in the parameter from that in the bounded log-variance, in place. */
static void to_parameter_gradient(const posterior *q, const REAL *v, const REAL *raw, int n, REAL *restrict gradient) {
    if (q->scale == LOG_STD) for (int i = 0; i < n; i++) gradient[i] *= 2;
    /* By divisions: 1 / sigma is denormal for large sigma. Clamped to MOST, because at infinite sigma the gradient is infinite. */
    REAL least = least_std(q), most = MOST;
    if (q->scale == STD)
        for (int i = 0; i < n; i++) {
            REAL std = v[i] == 0 ? least : v[i];
            /* 0 / 0 is 0 here. With the 1 as a third case of the divisor, gcc also divides by `most`: denormals are slow. */
            std += (gradient[i] == 0) & (std == 0) ? (REAL)1 : 0;
            gradient[i] = 2 * (gradient[i] / (std > most ? most : std));
        }
    if (q->scale == SOFTPLUS)
        for (int i = 0; i < n; i++) {
            REAL u = exponential(-magnitude(v[i])), sigmoid = (v[i] < 0 ? u : 1) / (1 + u);
            REAL std = softplus(v[i], u);
            REAL body = 2 * (gradient[i] * sigmoid / (std > most ? most : std));
            gradient[i] = v[i] < -15 ? gradient[i] * (2 - u) : body;
        }
    REAL low = q->low, high = q->high;
    if (q->bounded && !q->live) /* last, because outside the bounds 0 * inf must be 0 */
        for (int i = 0; i < n; i++) gradient[i] = ((raw[i] < low) | (raw[i] > high)) ? 0 : gradient[i];
}
#endif
