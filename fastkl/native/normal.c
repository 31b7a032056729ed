/* Diagonal Gaussians on a CPU: KL or squared 2-Wasserstein distance, samples, and all gradients, in one pass over memory.
 * fastkl.reference defines each op. The method is that of fastkl.kernels, with tiles that fit the first cache. */

#include "parameters.h"
#include "philox.h"
#include "tiles.h"

enum { KL, WASSERSTEIN2 };

typedef struct {
    int distance, per_column, shared, samples; /* shared: one prior for all rows; samples: may be 0 */
    int64_t threads, eps_step, z_step; /* steps from one sample to the next */
    uint64_t seed;
    uint32_t stream;
    posterior q;
    call shape;
    pieces cut;
    double *partial;
    /* eps, z, dz: the first sample; distance's gradient by rows or, per_column, by columns */
    tensor mu, parameter, prior_mu, prior_logvar, eps, z, value, dvalue, dz, dmu, dparameter, dprior_mu, dprior_logvar;
} problem;

/* numbers: distance, per_column, scale, positive, bounded, live, samples, eps_step, z_step, shared, stream, ndim, event, sizes,
 * strides. addresses: the number of threads, the seed, the tensors. */
static void open_problem(problem *p, const int64_t *numbers, const int64_t *addresses, double low, double high) {
    p->distance = (int)numbers[0], p->per_column = (int)numbers[1], p->shared = (int)numbers[9], p->partial = NULL;
    p->q = (posterior){(int)numbers[2], (int)numbers[4], (int)numbers[5], (int)numbers[3], (REAL)low, (REAL)high};
    p->samples = (int)numbers[6], p->eps_step = numbers[7], p->z_step = numbers[8];
    p->threads = addresses[0], p->seed = addresses[1] ? *(const uint64_t *)(intptr_t)addresses[1] : 0;
    p->stream = (uint32_t)numbers[10], p->shape = open_call(numbers + 11, addresses + 2);
    p->mu = next_tensor(&p->shape), p->parameter = next_tensor(&p->shape);
    p->prior_mu = next_tensor(&p->shape), p->prior_logvar = next_tensor(&p->shape);
    p->eps = next_tensor(&p->shape);
}

static inline REAL square(REAL x) { return x * x; }

/* sigma - prior_sigma without cancellation: if the two are near, sigma times (1 - their ratio). */
static inline REAL sigma_difference(REAL x, REAL sigma, REAL prior, REAL prior_sigma) {
    REAL t = (prior - x) / 2, near = -sigma * (t + exp_rest(t)), far = sigma - prior_sigma;
    return t * t < (REAL)0.12 ? near : far; /* |t| < ln 2 / 2 */
}

/* exp(prior_logvar / 2) of a tile for WASSERSTEIN2, from the tile before, if all rows share the prior; else NULL. */
typedef struct { REAL values[TILE]; int64_t column; int count; } prior_sigmas;

static const REAL *prior_sigma(const problem *p, tile at, const REAL *px, prior_sigmas *known) {
    int n = at.rows * at.columns;
    if (p->distance == KL || !p->shared || !px) return NULL;
    if (known->count >= n && known->column == at.column) return known->values;
    for (int i = 0; i < n; i++) known->values[i] = exponential(px[i] / 2);
    known->column = at.column, known->count = n;
    return known->values;
}

/* One copy of these two with and one without known sigmas of the prior. */
INLINE void wasserstein2(int n, const REAL *m, const REAL *x, const REAL *pm, const REAL *px, const REAL *ps,
                         REAL *restrict out) {
    for (int i = 0; i < n; i++) {
        REAL sigma = exponential(x[i] / 2), prior = ps ? ps[i] : exponential(px[i] / 2);
        out[i] = square(m[i] - pm[i]) + square(sigma_difference(x[i], sigma, px[i], prior));
    }
}

INLINE void wasserstein2_gradient(int n, const REAL *w, const REAL *m, const REAL *x, const REAL *pm, const REAL *px,
                                  const REAL *ps, REAL *restrict dm, REAL *restrict dx, REAL *restrict dpx) {
    for (int i = 0; i < n; i++) {
        REAL sigma = exponential(x[i] / 2), prior = ps ? ps[i] : exponential(px[i] / 2);
        REAL difference = sigma_difference(x[i], sigma, px[i], prior);
        dm[i] = weighted(w[i], 2 * (m[i] - pm[i])), dx[i] = weighted(w[i], difference * sigma);
        dpx[i] = weighted(w[i], -difference * prior);
    }
}

static void terms(const problem *p, int n, const REAL *m, const REAL *x, const REAL *pm, const REAL *px, const REAL *ps,
                  REAL *restrict out) {
    if (p->distance == KL && !pm)
        for (int i = 0; i < n; i++) out[i] = (REAL)0.5 * (exp_minus_one_minus(x[i]) + m[i] * m[i]);
    else if (p->distance == KL)
        for (int i = 0; i < n; i++) {
            REAL root = precision_root(px[i]), standard = (m[i] - pm[i]) * root * root;
            out[i] = (REAL)0.5 * (exp_minus_one_minus(x[i] - px[i]) + standard * standard);
        }
    else if (!pm)
        for (int i = 0; i < n; i++) out[i] = m[i] * m[i] + square(exp_minus_one(x[i] / 2));
    else if (ps)
        wasserstein2(n, m, x, pm, px, ps, out);
    else
        wasserstein2(n, m, x, pm, px, NULL, out);
}

/* Weighted gradients in mu and the log-variance and, with a prior, in prior_logvar; that in prior_mu is -dm. */
static void terms_gradient(const problem *p, int n, const REAL *w, const REAL *m, const REAL *x, const REAL *pm,
                           const REAL *px, const REAL *ps, REAL *restrict dm, REAL *restrict dx, REAL *restrict dpx) {
    if (p->distance == KL && !pm)
        for (int i = 0; i < n; i++) dm[i] = weighted(w[i], m[i]), dx[i] = weighted(w[i], (REAL)0.5 * exp_minus_one(x[i]));
    else if (p->distance == KL)
        for (int i = 0; i < n; i++) {
            REAL root = precision_root(px[i]), standard = (m[i] - pm[i]) * root * root;
            REAL d = (REAL)0.5 * exp_minus_one(x[i] - px[i]);
            dm[i] = weighted(w[i], standard * root * root), dx[i] = weighted(w[i], d);
            dpx[i] = weighted(w[i], -d - (REAL)0.5 * standard * standard);
        }
    else if (!pm)
        for (int i = 0; i < n; i++)
            dm[i] = weighted(w[i], 2 * m[i]), dx[i] = weighted(w[i], exp_minus_one(x[i] / 2) * exponential(x[i] / 2));
    else if (ps)
        wasserstein2_gradient(n, w, m, x, pm, px, ps, dm, dx, dpx);
    else
        wasserstein2_gradient(n, w, m, x, pm, px, NULL, dm, dx, dpx);
}

/* The noise of a tile: the given eps, or noise of the seed. */
static const REAL *noise(const problem *p, tile at, int sample, REAL *buffer, awaited soon) {
    if (p->eps.data) {
        tensor eps = p->eps;
        eps.data += sample * p->eps_step * bytes(&eps);
        return read_tile(&eps, at, buffer);
    }
    int n = at.rows * at.columns;
    uint64_t first = (uint64_t)(at.row * p->shape.columns + at.column);
#ifdef FLOAT64
    float drawn[NOISE];
    const float *eps = normals(p->seed, first, (uint32_t)sample, p->stream, n, drawn, soon);
    for (int i = 0; i < n; i++) buffer[i] = eps[i];
    return buffer;
#else
    return normals(p->seed, first, (uint32_t)sample, p->stream, n, buffer, soon);
#endif
}

/* A tile's samples and, in `out`, its terms. */
static void forward_tile(const problem *p, tile at, prior_sigmas *known, REAL *restrict out) {
    REAL m_own[TILE], v_own[TILE], raw_own[TILE], x_own[TILE], pm_own[TILE], px_own[TILE], sigma[TILE];
    int n = at.rows * at.columns, prior = p->prior_mu.data != NULL;
    const REAL *m = read_tile(&p->mu, at, m_own), *v = read_tile(&p->parameter, at, v_own);
    const REAL *x = bound(&p->q, to_logvar(&p->q, v, n, raw_own), n, x_own);
    const REAL *pm = prior ? read_tile(&p->prior_mu, at, pm_own) : NULL;
    const REAL *px = prior ? read_tile(&p->prior_logvar, at, px_own) : NULL;
    if (p->samples && out && p->distance == KL && !prior) { /* the common case: one exponential serves both */
        for (int i = 0; i < n; i++) {
            spread s = spread_of(x[i]);
            sigma[i] = s.sigma, out[i] = (REAL)0.5 * (s.rest + m[i] * m[i]);
        }
    } else {
        if (p->samples) for (int i = 0; i < n; i++) sigma[i] = exponential(x[i] / 2);
        if (out) terms(p, n, m, x, pm, px, prior_sigma(p, at, px, known), out);
    }
    for (int sample = 0; sample < p->samples; sample++) {
        REAL eps_own[NOISE], z_own[TILE];
        tensor z = p->z;
        z.data += sample * p->z_step * bytes(&z);
        REAL *to = target_tile(&z, at, z_own);
        const REAL *eps = noise(p, at, sample, eps_own, (awaited){.written = {to}});
        for (int i = 0; i < n; i++) to[i] = m[i] + sigma[i] * eps[i];
        write_tile(&z, at, to, z_own);
    }
}

/* KL to N(0, 1) of one row, summed directly without a buffer; at most 256 terms are added in a REAL. */
static double kl_sum(const REAL *m, const REAL *x, int n) {
    double total = 0;
    for (int first = 0; first < n; first += 256) {
        int end = n - first < 256 ? n : first + 256;
        REAL part = 0;
#pragma omp simd reduction(+ : part)
        for (int i = first; i < end; i++) part += exp_minus_one_minus(x[i]) + m[i] * m[i];
        total += part;
    }
    return 0.5 * total;
}

/* kl_sum of each row of a tile, for long rows, log-variances and no prior. */
static void usual_rows(const problem *p, tile at, REAL *restrict parts) {
    REAL m_own[TILE], x_own[TILE];
    const REAL *m = read_tile(&p->mu, at, m_own), *x = read_tile(&p->parameter, at, x_own);
    for (int row = 0; row < at.rows; row++)
        parts[row] = (REAL)kl_sum(m + row * at.columns, x + row * at.columns, at.columns);
}

static void forward_rows(void *context, int64_t job) {
    const problem *p = context;
    region r = piece(&p->cut, job);
    int plain = p->q.scale == LOGVAR && !p->q.bounded && !p->samples && p->distance == KL && !p->prior_mu.data;
    plain = plain && p->shape.columns >= 256;
    REAL out[TILE], *value = (REAL *)p->value.data;
    prior_sigmas known;
    known.count = 0;
    double total = 0;
    for (tile at; next_tile(&r, &at);) {
        if (plain) usual_rows(p, at, out);
        else forward_tile(p, at, &known, value ? out : NULL);
        if (!value) continue;
        if (p->cut.chunks > 1 || at.columns < p->shape.columns) {
            total += plain ? *out : sum(out, at.columns);
            if (p->cut.chunks == 1 && at.column + at.columns == p->shape.columns)
                value[at.row] = (REAL)total, total = 0;
        } else if (plain)
            memcpy(value + at.row, out, (size_t)at.rows * sizeof *out);
        else
            sum_each(out, at.rows, at.columns, value + at.row);
    }
    if (p->partial) p->partial[job] = total;
}

static void forward_columns(void *context, int64_t job) {
    const problem *p = context;
    region r = piece(&p->cut, job);
    REAL out[TILE];
    column_sums total = {.most = 0};
    prior_sigmas known;
    known.count = 0;
    int64_t first = r.column;
    int columns = (int)(r.column_end - first);
    for (tile at; next_tile(&r, &at);) forward_tile(p, at, &known, out), add_tile(&total, out, at.rows * columns);
    fold_rows(&total, columns, p->partial + job / p->cut.chunks * p->shape.columns + first);
}

/* Returns 0, or 1 if out of memory. Tensors after eps: z, value (contiguous REALs, one for each row or, per_column,
 * column). */
int forward(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    problem p;
    open_problem(&p, numbers, addresses, low, high);
    p.z = next_result(&p.shape), p.value = next_tensor(&p.shape);
    p.cut = p.per_column ? cut_columns(&p.shape) : cut_rows(&p.shape);
    REAL *value = (REAL *)p.value.data;
    int64_t rows = p.shape.rows, columns = p.shape.columns, groups = p.cut.jobs / p.cut.chunks;
    int split = value && (p.per_column || p.cut.chunks > 1);
    if (split && !(p.partial = malloc((size_t)(p.per_column ? groups * columns : p.cut.jobs) * sizeof *p.partial))) return 1;
    run(p.cut.jobs, rows * columns, p.threads, p.per_column ? forward_columns : forward_rows, &p);
    if (split && p.per_column)
        for (int64_t column = 0; column < columns; column++) {
            double total = 0;
            for (int64_t group = 0; group < groups; group++) total += p.partial[group * columns + column];
            value[column] = (REAL)(total / (double)rows);
        }
    else if (split)
        for (int64_t row = 0; row < rows; row++) {
            double total = 0;
            for (int64_t chunk = 0; chunk < p.cut.chunks; chunk++) total += p.partial[row * p.cut.chunks + chunk];
            value[row] = (REAL)total;
        }
    free(p.partial);
    return 0;
}

/* Gradients through the samples: the sums of dz and of dz eps. `soon`: other data to prefetch. */
static void sum_samples(const problem *p, tile at, REAL *restrict dmean, REAL *restrict dsigma, awaited soon) {
    REAL eps_own[NOISE], dz_own[TILE];
    int n = at.rows * at.columns;
    for (int sample = 0; sample < p->samples; sample++) {
        tensor dz = p->dz;
        dz.data += sample * p->z_step * bytes(&dz);
        const REAL *d = soon.read[0] = read_tile(&dz, at, dz_own);
        const REAL *eps = noise(p, at, sample, eps_own, soon);
        soon = NOTHING;
        if (sample == 0) for (int i = 0; i < n; i++) dmean[i] = d[i], dsigma[i] = d[i] * eps[i];
        else for (int i = 0; i < n; i++) dmean[i] += d[i], dsigma[i] += d[i] * eps[i];
    }
}

static void backward_piece(void *context, int64_t job) {
    const problem *p = context;
    region r = piece(&p->cut, job);
    REAL w_own[TILE], m_own[TILE], v_own[TILE], raw_own[TILE], x_own[TILE], pm_own[TILE], px_own[TILE];
    REAL dm_own[TILE], dv_own[TILE], dpm_own[TILE], dpx_own[TILE], dmean[TILE], dsigma[TILE];
    column_sums dprior[2];
    prior_sigmas known;
    dprior[0].most = dprior[1].most = known.count = 0;
    int prior = p->prior_mu.data != NULL, own_prior = p->dprior_mu.data && !p->partial;
    int64_t first = r.column;
    for (tile at; next_tile(&r, &at);) {
        int n = at.rows * at.columns;
        const REAL *v = read_tile(&p->parameter, at, v_own), *raw = to_logvar(&p->q, v, n, raw_own);
        const REAL *x = bound(&p->q, raw, n, x_own);
        REAL *dm = target_tile(&p->dmu, at, dm_own), *dv = target_tile(&p->dparameter, at, dv_own);
        REAL *dpx = own_prior ? target_tile(&p->dprior_logvar, at, dpx_own) : dpx_own;
        const REAL *m = p->dvalue.data ? read_tile(&p->mu, at, m_own) : NULL;
        const REAL *w = p->dvalue.data ? read_tile(&p->dvalue, at, w_own) : NULL;
        if (p->samples) sum_samples(p, at, dmean, dsigma, (awaited){.read = {NULL, m, v}, .written = {dm, dv}});
        if (p->samples && w && p->distance == KL && !prior) { /* the common case: one exponential serves both */
            for (int i = 0; i < n; i++) {
                spread s = spread_of(x[i]);
                dm[i] = weighted(w[i], m[i]) + dmean[i];
                dv[i] = (REAL)0.5 * (weighted(w[i], s.variance_minus_one) + weighted(dsigma[i], s.sigma));
            }
        } else if (w) {
            const REAL *pm = prior ? read_tile(&p->prior_mu, at, pm_own) : NULL;
            const REAL *px = prior ? read_tile(&p->prior_logvar, at, px_own) : NULL;
            terms_gradient(p, n, w, m, x, pm, px, prior_sigma(p, at, px, &known), dm, dv, dpx);
            if (own_prior) {
                REAL *dpm = target_tile(&p->dprior_mu, at, dpm_own);
                for (int i = 0; i < n; i++) dpm[i] = -dm[i];
                write_tile(&p->dprior_mu, at, dpm, dpm_own), write_tile(&p->dprior_logvar, at, dpx, dpx_own);
            } else if (p->partial)
                add_tile(&dprior[0], dm, n), add_tile(&dprior[1], dpx, n);
            if (p->samples)
                for (int i = 0; i < n; i++)
                    dm[i] += dmean[i], dv[i] += weighted(dsigma[i], (REAL)0.5 * exponential(x[i] / 2));
        } else
            for (int i = 0; i < n; i++) dm[i] = dmean[i], dv[i] = weighted(dsigma[i], (REAL)0.5 * exponential(x[i] / 2));
        to_parameter_gradient(&p->q, v, raw, n, dv);
        write_tile(&p->dmu, at, dm, dm_own), write_tile(&p->dparameter, at, dv, dv_own);
    }
    for (int k = 0; p->partial && k < 2; k++)
        fold_rows(&dprior[k], (int)(r.column_end - first),
                  p->partial + (job / p->cut.chunks * 2 + k) * p->shape.columns + first);
}

/* Returns 0, or 1 if out of memory. Tensors after eps: dvalue, dz, dmu, dparameter, dprior_mu, dprior_logvar; the last two
 * have a stride of 0 over rows if the batch shares the prior. */
int backward(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    problem p;
    open_problem(&p, numbers, addresses, low, high);
    p.dvalue = next_tensor(&p.shape), p.dz = next_tensor(&p.shape);
    p.dmu = next_result(&p.shape), p.dparameter = next_result(&p.shape);
    p.dprior_mu = next_result(&p.shape), p.dprior_logvar = next_result(&p.shape);
    int shared = p.shared && p.dprior_mu.data;
    p.cut = shared ? cut_columns(&p.shape) : cut_rows(&p.shape);
    int64_t columns = p.shape.columns, groups = p.cut.jobs / p.cut.chunks;
    if (shared && !(p.partial = malloc((size_t)(2 * groups * columns) * sizeof *p.partial))) return 1;
    run(p.cut.jobs, p.shape.rows * columns, p.threads, backward_piece, &p);
    if (shared) {
        REAL own[TILE];
        const tensor *outputs[2] = {&p.dprior_mu, &p.dprior_logvar};
        for (int k = 0; k < 2; k++)
            for (tile at = {0, 0, 1, 0}; at.column < columns; at.column += at.columns) {
                at.columns = (int)(columns - at.column < TILE ? columns - at.column : TILE);
                for (int i = 0; i < at.columns; i++) {
                    double total = 0;
                    for (int64_t group = 0; group < groups; group++)
                        total += p.partial[(group * 2 + k) * columns + at.column + i];
                    own[i] = (REAL)(k == 0 ? -total : total); /* the gradient in prior_mu is that in mu, negated */
                }
                copy_row(outputs[k], &at, 0, own, 1);
            }
    }
    free(p.partial);
    return 0;
}
