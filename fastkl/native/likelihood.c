/* Log-likelihoods on a CPU, normal and Bernoulli, and their gradients, in one pass over memory.
 * fastkl.reference.likelihood defines each op. The method is that of fastkl.kernels, with tiles that fit the cache. */

#include "functions.h"
#include "tiles.h"

enum { NORMAL, BERNOULLI };
enum { FULL, ROW, SHARED }; /* a log-variance per element, per row, or per column, shared by all rows */
#define LONG 64 /* columns from which a row pays for a loop of its own */
#define LN_2PI ((REAL)1.8378770664093453)

typedef struct {
    int density, spread;
    int64_t threads;
    call shape;
    pieces cut;
    double *partial;
    /* x and mean, or logits and x; the log-variance, for a normal density only; then their gradients */
    tensor first, second, logvar, value, dvalue, dfirst, dsecond, dlogvar;
} problem;

/* numbers: density, spread, ndim, event, sizes, strides. addresses: the number of threads, the tensors. */
static problem open_problem(const int64_t *numbers, const int64_t *addresses) {
    problem p = {.density = (int)numbers[0], .spread = (int)numbers[1], .threads = addresses[0]};
    p.shape = open_call(numbers + 2, addresses + 1);
    p.first = next_tensor(&p.shape), p.second = next_tensor(&p.shape), p.logvar = next_tensor(&p.shape);
    return p;
}

/* Broadcast one value per row of the tile to all of its columns. */
static void widen(const REAL *values, tile at, REAL *restrict out) {
    for (int row = 0; row < at.rows; row++)
        for (int i = 0; i < at.columns; i++) out[row * at.columns + i] = values[row];
}

static const REAL *read_rows(const tensor *t, tile at, REAL *buffer) {
    REAL own[TILE];
    const REAL *values = read_tile(t, (tile){at.row, 0, at.rows, 1}, own);
    if (at.columns == 1) return memcpy(buffer, values, (size_t)at.rows * sizeof *buffer);
    widen(values, at, buffer);
    return buffer;
}

/* The log-variances of a tile, and their precision_root if several elements share one; else NULL: a loop that computes an
 * exponential for each element while it waits for memory is faster than two loops. step: 0 if all share one, else 1. */
typedef struct { const REAL *values, *roots; int step; } logvars;

static logvars read_logvar(const problem *p, tile at, REAL *buffer, REAL *restrict root) {
    REAL own[TILE], few[TILE];
    tile read = at;
    const axis *columns = &p->logvar.columns;
    int one = p->spread == SHARED && columns->dims == 1 && columns->stride[0] == 0;
    if (p->spread == ROW || one) read.column = 0, read.columns = 1;
    if (p->spread == SHARED) read.rows = 1;
    int n = at.rows * at.columns, count = read.rows * read.columns;
    const REAL *values = read_tile(&p->logvar, read, count == n ? buffer : own);
    if (count == n && !one) return (logvars){values, NULL, 1};
    for (int i = 0; i < count; i++) few[i] = precision_root(values[i]);
    if (one) {
        *buffer = *values, *root = *few;
        return (logvars){buffer, root, 0};
    }
    if (p->spread == ROW)
        widen(values, at, buffer), widen(few, at, root);
    else
        for (int row = 0; row < at.rows; row++) {
            memcpy(buffer + row * count, values, (size_t)count * sizeof *buffer);
            memcpy(root + row * count, few, (size_t)count * sizeof *root);
        }
    return (logvars){buffer, root, 1};
}

/* Write the value of a row to a tensor with one value per row. */
static void put(const tensor *t, int64_t row, double value) {
    REAL own = (REAL)value;
    copy_row(t, &(tile){row, 0, 1, 1}, 0, &own, 1);
}

/* Whether each row has a log-variance of its own, or shares one with others, and is summed without a buffer. */
static int by_rows(const problem *p, tile at) {
    return p->density == NORMAL && p->spread == ROW && at.columns >= LONG;
}

/* Sum a tile's rows: complete rows into `out`, a part of a row longer than a tile into `total`. The values are those of
 * elements, or `by_rows` their sums. */
static void sum_rows(const problem *p, tile at, const REAL *values, const tensor *out, double *total) {
    if (at.columns == p->shape.columns) {
        REAL own[TILE];
        tile rows = {at.row, 0, at.rows, 1};
        REAL *sums = target_tile(out, rows, own);
        if (by_rows(p, at)) memcpy(sums, values, (size_t)at.rows * sizeof *sums);
        else sum_each(values, at.rows, at.columns, sums);
        write_tile(out, rows, sums, own);
        return;
    }
    *total += by_rows(p, at) ? *values : sum(values, at.columns);
    if (p->cut.chunks == 1 && at.column + at.columns == p->shape.columns)
        put(out, at.row, *total), *total = 0;
}

static void sum_chunks(const problem *p, const tensor *out) {
    for (int64_t row = 0; row < p->shape.rows; row++) {
        double total = 0;
        for (int64_t chunk = 0; chunk < p->cut.chunks; chunk++) total += p->partial[row * p->cut.chunks + chunk];
        put(out, row, total);
    }
}

/* One copy for each constant step, with and without roots. */
INLINE void densities(int n, const REAL *x, const REAL *m, const REAL *v, const REAL *roots, int step, REAL *restrict out) {
    for (int i = 0; i < n; i++) {
        REAL root = roots ? roots[i * step] : precision_root(v[i]), z = (x[i] - m[i]) * root * root;
        out[i] = (REAL)-0.5 * (LN_2PI + v[i * step] + z * z);
    }
}

/* `densities`, summed over each row. At most 256 terms are added in a REAL. */
static void row_densities(tile at, const REAL *x, const REAL *m, const REAL *v, REAL *restrict out) {
    for (int row = 0; row < at.rows; row++, x += at.columns, m += at.columns) {
        REAL root = precision_root(v[row]);
        double total = 0;
        for (int first = 0; first < at.columns; first += 256) {
            int end = at.columns - first < 256 ? at.columns : first + 256;
            REAL part = 0;
#pragma omp simd reduction(+ : part)
            for (int i = first; i < end; i++) {
                REAL z = (x[i] - m[i]) * root * root;
                part += z * z;
            }
            total += part;
        }
        out[row] = (REAL)(-0.5 * (at.columns * ((double)LN_2PI + v[row]) + total));
    }
}

static void forward_piece(void *context, int64_t job) {
    const problem *p = context;
    region r = piece(&p->cut, job);
    REAL a_own[TILE], b_own[TILE], v_own[TILE], root[TILE], out[TILE];
    double total = 0;
    for (tile at; next_tile(&r, &at);) {
        int n = at.rows * at.columns;
        const REAL *a = read_tile(&p->first, at, a_own), *b = read_tile(&p->second, at, b_own);
        if (by_rows(p, at))
            row_densities(at, a, b, read_tile(&p->logvar, (tile){at.row, 0, at.rows, 1}, v_own), out);
        else if (p->density == NORMAL) {
            logvars v = read_logvar(p, at, v_own, root);
            if (!v.roots) densities(n, a, b, v.values, NULL, 1, out);
            else if (v.step) densities(n, a, b, v.values, v.roots, 1, out);
            else densities(n, a, b, v.values, v.roots, 0, out);
        } else
            for (int i = 0; i < n; i++) {
                REAL l = a[i], u = exponential(l > 0 ? -l : l);
                out[i] = weighted(l > 0 ? b[i] - 1 : b[i], l) - log_one_plus(u);
            }
        sum_rows(p, at, out, &p->value, &total);
    }
    if (p->partial) p->partial[job] = total;
}

/* Returns 0, or 1 if out of memory. Tensor after the log-variance: value, one for each row. */
int forward(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    problem p = open_problem(numbers, addresses);
    (void)low, (void)high;
    p.value = next_tensor(&p.shape);
    p.cut = cut_rows(&p.shape);
    int split = p.cut.chunks > 1;
    if (split && !(p.partial = malloc((size_t)p.cut.jobs * sizeof *p.partial))) return 1;
    run(p.cut.jobs, p.shape.rows * p.shape.columns, p.threads, forward_piece, &p);
    if (split) sum_chunks(&p, &p.value);
    free(p.partial);
    return 0;
}

/* Gradients in the mean and the log-variance. */
INLINE void slopes(int n, const REAL *x, const REAL *m, const REAL *v, const REAL *roots, int step, const REAL *w,
                   REAL *restrict dm, REAL *restrict dv) {
    for (int i = 0; i < n; i++) {
        REAL root = roots ? roots[i * step] : precision_root(v[i]);
        /* The weight multiplies first, because z^2 may overflow when w z^2 does not. */
        REAL z = w[i] == 0 ? 0 : (x[i] - m[i]) * root * root, weighed = w[i] * z;
        dm[i] = weighed * root * root;
        dv[i] = (REAL)0.5 * (weighed * z - w[i]);
    }
}

/* `slopes` with one weight for each row; dv: the sums over rows. */
static void row_slopes(tile at, const REAL *x, const REAL *m, const REAL *v, const REAL *w, REAL *restrict dm,
                       REAL *restrict dv) {
    for (int row = 0; row < at.rows; row++, x += at.columns, m += at.columns, dm += at.columns) {
        REAL root = precision_root(v[row]), weight = w[row];
        double total = 0;
        for (int first = 0; first < at.columns; first += 256) {
            int end = at.columns - first < 256 ? at.columns : first + 256;
            REAL part = 0;
#pragma omp simd reduction(+ : part)
            for (int i = first; i < end; i++) {
                REAL z = weight == 0 ? 0 : (x[i] - m[i]) * root * root, weighed = weight * z;
                dm[i] = weighed * root * root;
                part += weighed * z;
            }
            total += part;
        }
        dv[row] = (REAL)(0.5 * (total - at.columns * (double)weight));
    }
}

/* w: one weight for each element, or `by_rows` for each row. */
static void normal_gradient(const problem *p, tile at, const REAL *w, REAL *restrict dv) {
    REAL x_own[TILE], m_own[TILE], v_own[TILE], root[TILE], dx_own[TILE], dm_own[TILE];
    int n = at.rows * at.columns;
    const REAL *x = read_tile(&p->first, at, x_own), *m = read_tile(&p->second, at, m_own);
    int rows = by_rows(p, at);
    logvars v = rows ? (logvars){0} : read_logvar(p, at, v_own, root);
    REAL *dm = p->dsecond.data ? target_tile(&p->dsecond, at, dm_own) : dm_own;
    if (rows) row_slopes(at, x, m, read_tile(&p->logvar, (tile){at.row, 0, at.rows, 1}, v_own), w, dm, dv);
    else if (!v.roots) slopes(n, x, m, v.values, NULL, 1, w, dm, dv);
    else if (v.step) slopes(n, x, m, v.values, v.roots, 1, w, dm, dv);
    else slopes(n, x, m, v.values, v.roots, 0, w, dm, dv);
    if (p->dsecond.data) write_tile(&p->dsecond, at, dm, dm_own);
    if (p->dfirst.data) {
        REAL *dx = target_tile(&p->dfirst, at, dx_own);
        for (int i = 0; i < n; i++) dx[i] = -dm[i];
        write_tile(&p->dfirst, at, dx, dx_own);
    }
}

static void bernoulli_gradient(const problem *p, tile at, const REAL *w) {
    REAL l_own[TILE], x_own[TILE], dl_own[TILE], dx_own[TILE];
    int n = at.rows * at.columns;
    const REAL *l = read_tile(&p->first, at, l_own);
    if (p->dfirst.data) {
        const REAL *x = read_tile(&p->second, at, x_own);
        REAL *dl = target_tile(&p->dfirst, at, dl_own);
        for (int i = 0; i < n; i++) {
            /* opposite: the probability of the less likely outcome */
            REAL u = exponential(l[i] > 0 ? -l[i] : l[i]), opposite = u / (1 + u);
            dl[i] = w[i] * (l[i] > 0 ? x[i] - 1 + opposite : x[i] - opposite);
        }
        write_tile(&p->dfirst, at, dl, dl_own);
    }
    if (p->dsecond.data) {
        REAL *dx = target_tile(&p->dsecond, at, dx_own);
        for (int i = 0; i < n; i++) dx[i] = weighted(w[i], l[i]);
        write_tile(&p->dsecond, at, dx, dx_own);
    }
}

static void backward_piece(void *context, int64_t job) {
    const problem *p = context;
    region r = piece(&p->cut, job);
    REAL w_own[TILE], dv_own[TILE];
    double total = 0;
    column_sums totals;
    totals.most = 0;
    int64_t first = r.column;
    int shared = p->dlogvar.data && p->spread == SHARED;
    for (tile at; next_tile(&r, &at);) {
        int n = at.rows * at.columns;
        const REAL *w = by_rows(p, at) ? read_tile(&p->dvalue, (tile){at.row, 0, at.rows, 1}, w_own)
                                       : read_rows(&p->dvalue, at, w_own);
        if (p->density == BERNOULLI) {
            bernoulli_gradient(p, at, w);
            continue;
        }
        int direct = p->dlogvar.data && p->spread == FULL;
        REAL *dv = direct ? target_tile(&p->dlogvar, at, dv_own) : dv_own;
        normal_gradient(p, at, w, dv);
        if (direct) write_tile(&p->dlogvar, at, dv, dv_own);
        if (p->dlogvar.data && p->spread == ROW) sum_rows(p, at, dv, &p->dlogvar, &total);
        if (shared) add_tile(&totals, dv, n);
    }
    if (shared)
        fold_rows(&totals, (int)(r.column_end - first), p->partial + job / p->cut.chunks * p->shape.columns + first);
    else if (p->partial)
        p->partial[job] = total;
}

static void sum_groups(const problem *p, const tensor *out) {
    REAL own[TILE];
    int64_t columns = p->shape.columns, groups = p->cut.jobs / p->cut.chunks;
    for (tile at = {0, 0, 1, 0}; at.column < columns; at.column += at.columns) {
        at.columns = (int)(columns - at.column < TILE ? columns - at.column : TILE);
        double total[TILE] = {0};
        for (int64_t group = 0; group < groups; group++)
            for (int i = 0; i < at.columns; i++) total[i] += p->partial[group * columns + at.column + i];
        for (int i = 0; i < at.columns; i++) own[i] = (REAL)total[i];
        copy_row(out, &at, 0, own, 1);
    }
}

/* Returns 0, or 1 if out of memory. Tensors after the log-variance: dvalue, dfirst, dsecond, dlogvar; those not requested
 * are absent. */
int backward(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    problem p = open_problem(numbers, addresses);
    (void)low, (void)high;
    p.dvalue = next_tensor(&p.shape);
    p.dfirst = next_result(&p.shape), p.dsecond = next_result(&p.shape), p.dlogvar = next_result(&p.shape);
    int shared = p.dlogvar.data && p.spread == SHARED;
    p.cut = shared ? cut_columns(&p.shape) : cut_rows(&p.shape);
    int split = p.dlogvar.data && p.spread == ROW && p.cut.chunks > 1;
    int64_t count = shared ? p.cut.jobs / p.cut.chunks * p.shape.columns : p.cut.jobs;
    if ((shared || split) && !(p.partial = malloc((size_t)count * sizeof *p.partial))) return 1;
    run(p.cut.jobs, p.shape.rows * p.shape.columns, p.threads, backward_piece, &p);
    if (shared) sum_groups(&p, &p.dlogvar);
    if (split) sum_chunks(&p, &p.dlogvar);
    free(p.partial);
    return 0;
}
