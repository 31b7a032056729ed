/* Gaussian mixtures with diagonal covariances on a CPU: the log-density, log-responsibilities, their gradients, and moments.
 * fastkl.reference defines the op, fastkl.ops.mixture._mixture the three forms of a component's term. The lanes of a
 * vector are components, and four rows share each load of a component. A difference z - mean is taken before it is
 * scaled, so narrow and distant components lose no digits. */

#include "mixture.h"

/* ---- forward */

/* exp(values - high - low), in place */
static void exponentials(REAL *restrict values, int count, REAL high, REAL low) {
    for (int k = 0; k < count; k++) {
        REAL e = exponential((values[k] - high) - low);
        values[k] = e < NEGLIGIBLE ? 0 : e;
    }
}

/* values - log_density, in place, with ln p as the sum of two REALs */
static void subtract(REAL *restrict values, int64_t count, double log_density) {
    REAL high = (REAL)log_density, low = (REAL)(log_density - (double)high);
    for (int64_t k = 0; k < count; k++) values[k] = (values[k] - high) - low;
}

static void finish_row(const problem *p, const slice *t, const block *b, int r) {
    REAL *restrict joint = b->joint + r * t->width, most = -(REAL)INFINITY;
    int64_t row = b->row[r];
    most = highest(joint, t->count);
    int several = t->count < p->count;
    REAL *restrict kept = p->kept ? p->kept + row * p->count + t->first : b->product;
    if ((several || p->logs) && p->kept) memcpy(kept, joint, (size_t)t->count * sizeof *kept);
    REAL origin = most > -(REAL)INFINITY ? most : 0;
    exponentials(joint, t->count, origin, 0);
    REAL all = sum(joint, t->count), share = 1 / all; /* NaN in a row of density 0, whose gradient is not defined */
    if (!several && p->kept && !p->logs) for (int k = 0; k < t->count; k++) kept[k] = joint[k] * share;
    double found = (double)origin + logarithm(all);
    if (t->first) {
        double before = p->log_density[row], larger = before > found ? before : found;
        double difference = before > found ? found - before : before - found;
        found = larger == -INFINITY && found == before ? larger : larger + log1p(exp(difference));
    }
    if (!several && p->logs) subtract(kept, t->count, found);
    p->log_density[row] = found, p->lp[row] = (REAL)found;
}

static void forward_job(void *context, int64_t job) {
    problem *p = context;
    slice own = {.mean = NULL}, *t = p->sets > 1 ? &own : &p->shared;
    block b;
    int64_t end = (job + 1) * p->each < p->data ? (job + 1) * p->each : p->data;
    if (open_block(&b, p, 0)) { p->failed = 1; return; }
    if (is_single(p)) own = every(p);
    else if (p->sets > 1 && open_slice(&own, p)) { p->failed = 1; free(b.joint); return; }
    int64_t groups = p->sets > 1 ? (p->samples + ROWS - 1) / ROWS : p->samples;
    for (int64_t datum = job * p->each; datum < end; datum += p->sets > 1 ? 1 : ROWS) {
        if (is_single(p)) {
            b.row[0] = datum;
            fill_single(p, t, datum, b.joint);
            finish_row(p, t, &b, 0);
            continue;
        }
        if (p->sets > 1) fill_slice(t, p, datum, 0);
        for (int64_t group = 0; group < groups; group++) {
            place_rows(p, &b, datum, end, group);
            read_block(p, &b);
            fill_joint(p, t, &b);
            for (int r = 0; r < b.count; r++) finish_row(p, t, &b, r);
        }
    }
    free(own.mean), free(b.joint);
}

/* ln p as the sum of two REALs: one rounding of it would scale all responsibilities by a wrong factor. */
static void responsibilities(REAL *restrict joint, int count, double log_density) {
    REAL high = (REAL)log_density, low = (REAL)(log_density - (double)high);
    exponentials(joint, count, high, low);
}

static void settle_job(void *context, int64_t job) {
    problem *p = context;
    int64_t each = (p->rows + p->jobs - 1) / p->jobs, end = (job + 1) * each < p->rows ? (job + 1) * each : p->rows;
    for (int64_t row = job * each; row < end; row++) {
        REAL *values = p->kept + row * p->count;
        if (p->logs) subtract(values, p->count, p->log_density[row]);
        else responsibilities(values, (int)p->count, p->log_density[row]);
    }
}

static int densities(const int64_t *numbers, const int64_t *addresses, int logs) {
    problem p = open_problem(numbers, addresses);
    p.logs = logs;
    cut_data(&p, 1);
    p.failed = normalise_all(&p) || (p.sets == 1 && open_slice(&p.shared, &p));
    for (int64_t first = 0; first < p.count && !p.failed; first += p.step) {
        if (p.sets == 1) fill_slice(&p.shared, &p, 0, first);
        for_jobs(&p, forward_job);
    }
    if (!p.failed && p.kept && p.step < p.count) for_jobs(&p, settle_job);
    free(p.normaliser), free(p.shared.mean);
    return p.failed;
}

/* Returns 0, or 1 if out of memory. Writes ln p, also as double, and where `kept` is given the responsibilities [R, K]. */
int forward(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    (void)low, (void)high;
    return densities(numbers, addresses, 0);
}

/* `forward` with the log-responsibilities in `kept`. */
int log_responsibilities(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    (void)low, (void)high;
    return densities(numbers, addresses, 1);
}

/* ---- backward */

/* A weight of 0 times an infinite term would be NaN, so the term is clamped. */
INLINE vec within(vec x, int careful) {
    if (!careful) return x;
    x = either(x > LIMIT, (vec){0} + LIMIT, x);
    return either(x < -LIMIT, (vec){0} - LIMIT, x); /* NaN stays */
}

/* Add the block's gradients: dz and dlogvar of its rows, and the sums over rows. */
INLINE void add_gradients(const problem *p, const slice *t, const block *b, int form, int rows) {
    int n = p->columns, width = t->width;
    const REAL *restrict means = t->mean, *restrict roots = t->root, *restrict z = b->z, *restrict weights = b->joint;
    REAL *restrict firsts = b->first, *restrict seconds = b->second, *restrict dz = b->dz, *restrict dlogvar = b->dlogvar;
    const slice components = *t;
    const block given = *b;
    for (int d = 0; d < n; d++) {
        vec pull[ROWS], widen[ROWS];
        for (int r = 0; r < rows; r++) pull[r] = widen[r] = (vec){0};
        for (int k = 0; k < width; k += LANES) {
            int64_t at = (int64_t)d * width + k;
            vec mean = load(means + at), root = load(roots + at), first = load(firsts + at), second = load(seconds + at);
            for (int r = 0; r < rows; r++) {
                int i = r * n + d;
                vec w = load(weights + r * width + k);
                if (form == CONVOLVED) {
                    convolved c = convolve(&components, &given, at, i);
                    vec one = c.ratio - c.ratio + 1, x = within((mean - z[i]) * c.root, rows == 1), share = 1 / (1 + c.ratio);
                    vec pulled = w * x * share * c.root, widened = w * (x * x * share - 1) * share;
                    pull[r] += pulled, first += pulled;
                    widen[r] += widened * either(c.component, c.ratio, one), second += widened * either(c.component, one, c.ratio);
                    continue;
                }
                vec x = within((mean - z[i]) * root, rows == 1), weighed = w * x;
                pull[r] += weighed * root, first += weighed, second += weighed * x;
                if (form == EXPECTED) {
                    vec ratio = within(sigma_ratio(&components, &given, at, i), rows == 1), widened = w * ratio * ratio;
                    widen[r] -= widened, second += widened;
                }
            }
            store(firsts + at, first), store(seconds + at, second);
        }
        for (int r = 0; r < rows; r++) {
            dz[r * n + d] = total(pull[r]);
            if (form != POINT) dlogvar[r * n + d] = (REAL)0.5 * total(widen[r]);
        }
    }
}

/* Whether no term of the block can exceed LIMIT. */
static int is_tame(const problem *p, const slice *t, const block *b) {
    int64_t all = b->count * (int64_t)p->columns;
    REAL root = p->form == POINT ? t->most_root : maximum(t->most_root, largest(b->root, all));
    REAL wide = p->form == POINT ? 0 : largest(b->quarter, all);
    return (largest(b->z, all) + t->most_mean) * root < LIMIT / 4 && wide * wide * root < LIMIT / 4;
}

/* The weights of log-responsibilities with cotangents g: g_k - r_k sum(g). A sum of 0 leaves out r, which is NaN in a row of
 * density 0. */
static void weigh_logs(const problem *p, const slice *t, int64_t row, REAL *restrict weights) {
    const REAL *restrict g = p->lp + row * p->count, *restrict logs = p->kept + row * p->count + t->first;
    REAL all = sum(g, (int)p->count);
    g += t->first;
    for (int k = 0; k < t->count; k++) weights[k] = g[k] - (all == 0 ? 0 : exponential(logs[k]) * all);
}

/* The weights of the block's rows and components, in place of the joint. */
static void weigh(const problem *p, const slice *t, block *b) {
    int width = t->width;
    if (!p->kept && is_single(p)) fill_single(p, t, b->row[0], b->joint);
    else if (!p->kept) fill_joint(p, t, b);
    for (int r = 0; r < b->count; r++) {
        REAL *restrict weights = b->joint + r * width, own;
        b->scale[r] = p->logs ? 0 : p->moments ? 1 : *read_tile(&p->dlp, (tile){b->row[r], 0, 1, 1}, &own);
        REAL scale = b->scale[r];
        if (p->logs) weigh_logs(p, t, b->row[r], weights);
        else if (p->kept) memcpy(weights, p->kept + b->row[r] * p->count + t->first, (size_t)t->count * sizeof *weights);
        else responsibilities(weights, t->count, p->log_density[b->row[r]]);
        if (!p->logs) for (int k = 0; k < t->count; k++) weights[k] = scale == 0 ? 0 : weights[k] * scale;
        for (int k = t->count; k < width; k++) weights[k] = 0;
    }
}

static void write_rows(const problem *p, const slice *t, const block *b, const tensor *out, REAL *values) {
    int n = p->columns;
    if (!out->data) return;
    for (int r = 0; r < b->count; r++) {
        REAL *restrict row = values + r * n;
        tile at = {b->row[r], 0, 1, n};
        if (t->first) { /* add to the gradients of earlier slices */
            const REAL *before = read_tile(out, at, b->out);
            for (int d = 0; d < n; d++) row[d] += before[d];
        }
        write_tile(out, at, row, row);
    }
}

static void gradient_block(const problem *p, const slice *t, block *b) {
    if (b->count == ROWS && is_tame(p, t, b)) {
        if (p->form == POINT) add_gradients(p, t, b, POINT, ROWS);
        else if (p->form == EXPECTED) add_gradients(p, t, b, EXPECTED, ROWS);
        else add_gradients(p, t, b, CONVOLVED, ROWS);
    } else
        for (int r = 0; r < b->count; r++) {
            block one = one_row(p, b, r, t->width);
            if (p->form == POINT) add_gradients(p, t, &one, POINT, 1);
            else if (p->form == EXPECTED) add_gradients(p, t, &one, EXPECTED, 1);
            else add_gradients(p, t, &one, CONVOLVED, 1);
        }
    write_rows(p, t, b, &p->dz, b->dz);
    if (p->form != POINT) write_rows(p, t, b, &p->dlogvar, b->dlogvar);
}

/* Add the gradients of the components' log-variances [count, D], if components or dimensions share some. */
static void add_spread(const problem *p, int64_t first, int count, const REAL *gradients, double *restrict spread) {
    int64_t down = p->size[1] > 1 ? p->size[2] : 0, along = p->size[2] > 1;
    for (int k = 0; k < count; k++)
        for (int d = 0; d < p->columns; d++) spread[(first + k) * down + d * along] += gradients[k * p->columns + d];
}

/* Write the gradients of components [k, k + LANES) of the slice, from [D, stride] sums of weighted terms. If some sizes of
 * the log-variances are 1, add their gradient to `spread` instead. */
static void finish_components(const problem *p, const slice *t, int64_t set, int k, const REAL *first, const REAL *second,
                              const REAL *counts, int64_t stride, REAL *restrict out, double *spread) {
    int n = p->columns, count = t->count - k < LANES ? t->count - k : LANES;
    int64_t width = t->width;
    tile at = {set * p->count + t->first + k, 0, count, n};
    REAL *restrict to = p->dmeans.data ? target_tile(&p->dmeans, at, out) : out;
    const REAL *restrict roots = t->root + k;
    for (int i = 0; p->dmeans.data && i < count; i++) {
        if (p->moments) for (int d = 0; d < n; d++) to[i * n + d] = -first[d * stride + i] / roots[d * width + i];
        else if (p->form == CONVOLVED) for (int d = 0; d < n; d++) to[i * n + d] = -first[d * stride + i];
        else for (int d = 0; d < n; d++) to[i * n + d] = -first[d * stride + i] * roots[d * width + i];
    }
    if (p->dmeans.data) write_tile(&p->dmeans, at, to, out);
    if (!p->dlogvars.data) return;
    to = spread ? out : target_tile(&p->dlogvars, at, out);
    for (int i = 0; i < count; i++) {
        REAL weight = p->form == CONVOLVED ? 0 : counts[i];
        if (p->moments) for (int d = 0; d < n; d++) to[i * n + d] = second[d * stride + i] / roots[d * width + i] / roots[d * width + i];
        else for (int d = 0; d < n; d++) to[i * n + d] = (REAL)0.5 * (second[d * stride + i] - weight);
    }
    if (!spread) { write_tile(&p->dlogvars, at, to, out); return; }
    add_spread(p, t->first + k, count, out, spread);
}

static void write_spread(const problem *p, int64_t set, const double *spread, REAL *own) {
    int n = (int)p->size[2];
    for (int64_t k = 0; k < p->size[1]; k++) {
        for (int d = 0; d < n; d++) own[d] = (REAL)spread[k * n + d];
        write_tile(&p->dlogvars, (tile){set * p->size[1] + k, 0, 1, n}, own, own);
    }
}

/* The gradient in a datum's own logits, from the sums of its weights and of its scales. */
static void write_logits(const problem *p, const slice *t, int64_t set, REAL *restrict weights, double scale, REAL *restrict pi) {
    if (!p->dlogits.data) return;
    log_weights(p, t, set, pi);
    for (int k = 0; k < t->count; k++) weights[k] -= exponential(pi[k]) * (REAL)scale;
    write_tile(&p->dlogits, (tile){set, t->first, 1, t->count}, weights, weights);
}

/* The gradients of a row with components of its own, from its weights; those of the means are -pulls. */
static void single_gradients(const problem *p, const slice *t, const block *b, double *spread) {
    REAL m_own[TILE], v_own[TILE], dm_own[TILE], dv_own[TILE], w[TILE], widened[TILE];
    REAL *restrict dz = b->dz, *restrict dq = b->dlogvar;
    repeated r;
    int n = p->columns;
    repeat(p, b->row[0], &r);
    memset(dz, 0, (size_t)n * sizeof *dz), memset(dq, 0, (size_t)n * sizeof *dq);
    for (int k = 0; k < t->count; k += r.each) {
        int count = t->count - k < r.each ? t->count - k : r.each, all = count * n;
        tile at = {b->row[0] * p->count + k, 0, count, n};
        const REAL *restrict m = read_tile(&p->means, at, m_own), *restrict v = read_logvars(p, at, v_own);
        REAL *restrict dm = p->dmeans.data ? target_tile(&p->dmeans, at, dm_own) : dm_own;
        REAL *restrict dv = p->dlogvars.data && !spread ? target_tile(&p->dlogvars, at, dv_own) : dv_own;
        for (int i = 0; i < count; i++)
            for (int d = 0; d < n; d++) w[i * n + d] = b->joint[k + i];
        if (p->form == CONVOLVED)
            for (int i = 0; i < all; i++) {
                REAL gap = v[i] - r.q[i], ratio = exponential(gap > 0 ? -gap : gap), share = 1 / (1 + ratio);
                REAL root = bounded_root(gap > 0 ? v[i] : r.q[i]), x = w[i] == 0 ? 0 : (m[i] - r.z[i]) * root;
                REAL half = (REAL)0.5 * w[i] * (x * x * share - 1) * share;
                dm[i] = -w[i] * x * share * root;
                dv[i] = half * (gap > 0 ? 1 : ratio), widened[i] = half * (gap > 0 ? ratio : 1);
            }
        else
            for (int i = 0; i < all; i++) {
                REAL root = bounded_root(v[i]), x = w[i] == 0 ? 0 : (m[i] - r.z[i]) * root, weighed = w[i] * x;
                dm[i] = -weighed * root, dv[i] = (REAL)0.5 * (weighed * x - w[i]);
            }
        if (p->form == EXPECTED)
            for (int i = 0; i < all; i++) {
                REAL half = weighted(w[i], (REAL)0.5 * exponential(r.q[i] - v[i]));
                widened[i] = -half, dv[i] += half;
            }
        for (int i = 0; i < count; i++)
            for (int d = 0; d < n; d++) dz[d] -= dm[i * n + d];
        for (int i = 0; p->form != POINT && i < count; i++)
            for (int d = 0; d < n; d++) dq[d] += widened[i * n + d];
        if (p->dmeans.data) write_tile(&p->dmeans, at, dm, dm_own);
        if (spread) add_spread(p, k, count, dv, spread);
        else if (p->dlogvars.data) write_tile(&p->dlogvars, at, dv, dv_own);
    }
    write_rows(p, t, b, &p->dz, b->dz);
    if (p->form != POINT) write_rows(p, t, b, &p->dlogvar, b->dlogvar);
}

/* Add to the job's sums [2, D, width]: few rows are added one after the other. */
static void fold(const problem *p, const slice *t, block *b, REAL *restrict sums) {
    int64_t all = 2 * (int64_t)t->width * p->columns;
    for (int64_t i = 0; i < all; i++) sums[i] += b->first[i];
    memset(b->first, 0, (size_t)all * sizeof(REAL));
}

/* A job's sums in `partial`: of the weights [width], then [2, D, width]. */
static void backward_job(void *context, int64_t place) {
    problem *p = context;
    slice owned = {.mean = NULL}, *t = p->sets > 1 ? &owned : &p->shared;
    block b;
    int own = p->sets > 1;
    int64_t job = p->first_job + place, end = (job + 1) * p->each < p->data ? (job + 1) * p->each : p->data;
    int64_t groups = own ? (p->samples + ROWS - 1) / ROWS : p->samples;
    if (open_block(&b, p, 1)) { p->failed = 1; return; }
    if (own && open_slice(&owned, p)) { p->failed = 1; free(b.joint); return; }
    int width = own ? padded(p->count) : t->width;
    size_t all = (size_t)width * (size_t)p->columns;
    b.second = b.first + all;
    REAL *counts = p->partial + place * p->sums, *sums = counts + width;
    double *spread = own && p->spread ? p->spread_parts + place * p->spread : NULL;
    int direct = !own && p->each * p->samples <= FOLD; /* few rows: no sums of sums */
    if (direct) b.first = sums, b.second = sums + all;
    memset(counts, 0, (size_t)p->sums * sizeof *counts);
    if (spread) memset(spread, 0, (size_t)p->spread * sizeof *spread);
    if (!direct) memset(b.first, 0, 2 * all * sizeof(REAL));
    int since = 0, folded = 0;
    for (int64_t datum = job * p->each; datum < end; datum += own ? 1 : ROWS) {
        double scales[ROWS] = {0};
        if (own) fill_slice(t, p, datum, 0);
        memset(b.weights, 0, (size_t)(ROWS * width) * sizeof(REAL));
        for (int64_t group = 0; group < groups; group++) {
            if (!direct && since >= FOLD) fold(p, t, &b, sums), since = 0, folded = 1;
            place_rows(p, &b, datum, end, group);
            read_block(p, &b);
            weigh(p, t, &b);
            gradient_block(p, t, &b);
            for (int r = 0; r < b.count; r++) {
                REAL *restrict weights = b.weights + (own ? 0 : r) * width, *restrict w = b.joint + r * width;
                for (int k = 0; k < width; k++) weights[k] += w[k];
                scales[own ? 0 : r] += b.scale[r];
            }
            since += b.count;
        }
        for (int r = 0; r < (own ? 1 : ROWS); r++)
            for (int k = 0; k < width; k++) counts[k] += b.weights[r * width + k];
        if (own) {
            if (folded) fold(p, t, &b, sums);
            REAL *found = folded ? sums : b.first;
            for (int k = 0; k < width; k += LANES)
                finish_components(p, t, datum, k, found + k, found + all + k, b.weights + k, width, b.out, spread);
            memset(found, 0, 2 * all * sizeof *found);
            since = folded = 0;
            if (spread && p->size[0] > 1) {
                write_spread(p, datum, spread, b.out);
                memset(spread, 0, (size_t)p->spread * sizeof *spread);
            }
        }
        if (p->weight_sets > 1)
            for (int64_t r = 0; r < (own ? 1 : end - datum < ROWS ? end - datum : ROWS); r++)
                write_logits(p, t, datum + r, b.weights + r * width, scales[r], b.product);
    }
    if (!own && !direct) fold(p, t, &b, sums);
    free(owned.mean), free(b.joint);
}

/* backward_job for rows with components of their own. */
static void single_job(void *context, int64_t place) {
    problem *p = context;
    slice t = every(p);
    block b;
    int64_t job = p->first_job + place, end = (job + 1) * p->each < p->data ? (job + 1) * p->each : p->data;
    if (open_block(&b, p, 0)) { p->failed = 1; return; }
    REAL *counts = p->partial + place * p->sums;
    double *spread = p->spread ? p->spread_parts + place * p->spread : NULL;
    memset(counts, 0, (size_t)p->sums * sizeof *counts);
    if (spread) memset(spread, 0, (size_t)p->spread * sizeof *spread);
    b.count = 1;
    for (int64_t row = job * p->each; row < end; row++) {
        b.row[0] = row;
        weigh(p, &t, &b);
        single_gradients(p, &t, &b, spread);
        for (int k = 0; k < t.count; k++) counts[k] += b.joint[k];
        if (spread && p->size[0] > 1) {
            write_spread(p, row, spread, b.dz);
            memset(spread, 0, (size_t)p->spread * sizeof *spread);
        }
        if (p->weight_sets > 1) write_logits(p, &t, row, b.joint, b.scale[0], b.product);
    }
    free(b.joint);
}

/* Add the sums of a wave of jobs to the totals, a piece of them. */
static void sum_job(void *context, int64_t piece) {
    problem *p = context;
    int64_t start = piece * CHUNK, end = start + CHUNK < p->sums ? start + CHUNK : p->sums;
    int64_t left = p->jobs - p->first_job, jobs = left < p->wave ? left : p->wave;
    double *restrict totals = p->totals;
    for (int64_t job = 0; job < jobs; job++) {
        const REAL *restrict from = p->partial + job * p->sums;
        for (int64_t i = start; i < end; i++) totals[i] += from[i];
    }
}

/* The gradients of LANES shared components, from the totals. */
static void finish_job(void *context, int64_t group) {
    problem *p = context;
    const slice *t = &p->shared;
    int k = (int)group * LANES, n = p->columns;
    int64_t width = t->width;
    REAL none[LANES] = {0}, *first = allocate(3 * LANES * (size_t)n), *second = first + LANES * n, *out = second + LANES * n;
    if (!first) { p->failed = 1; return; }
    const double *counts = p->totals + k, *a = counts + width, *b = a + width * n;
    for (int64_t d = 0; d < n; d++)
        for (int i = 0; i < LANES; i++) {
            first[d * LANES + i] = (REAL)a[d * width + i];
            second[d * LANES + i] = (REAL)(b[d * width + i] - (p->form == CONVOLVED || p->moments ? 0 : counts[i]));
        }
    for (int i = 0; i < LANES && k + i < t->count; i++) p->counts[t->first + k + i] = counts[i];
    finish_components(p, t, 0, k, first, second, none, LANES, out, p->spread ? p->spreads : NULL);
    free(first);
}

static void run_wave(problem *p) {
    int64_t left = p->jobs - p->first_job, jobs = left < p->wave ? left : p->wave;
    run(jobs, p->rows * p->columns * p->count, p->threads, is_single(p) ? single_job : backward_job, p);
    if (p->sets == 1) {
        run((p->sums + CHUNK - 1) / CHUNK, jobs * p->sums, p->threads, sum_job, p);
        return;
    }
    for (int64_t job = 0; job < jobs && !p->failed; job++) {
        const REAL *counts = p->partial + job * p->sums;
        for (int64_t k = 0; k < p->count; k++) p->counts[k] += counts[k];
        for (int64_t i = 0; i < p->spread; i++) p->spreads[i] += p->spread_parts[job * p->spread + i];
    }
}

/* The gradient in the logits that all rows share. */
static void write_shared_logits(const problem *p, REAL *restrict own) {
    slice all = every(p);
    double scale = 0;
    for (int64_t k = 0; k < p->count; k++) scale += p->counts[k];
    log_weights(p, &all, 0, own);
    for (int64_t k = 0; k < p->count; k++) own[k] = (REAL)(p->counts[k] - (p->moments ? 0 : exponential(own[k]) * scale));
    write_tile(&p->dlogits, (tile){0, 0, 1, (int)p->count}, own, own);
}

static int sums_over_rows(const int64_t *numbers, const int64_t *addresses, int logs, int moments) {
    problem p = open_problem(numbers, addresses);
    p.logs = logs, p.moments = moments;
    int own = p.sets > 1, reduced = p.size[0] < p.sets || p.size[1] < p.count || p.size[2] < p.columns;
    int64_t width = padded(p.step), all = (2 * p.columns + 1) * width;
    p.spread = p.dlogvars.data && reduced ? p.size[1] * p.size[2] : 0;
    p.sums = is_single(&p) ? width : all;
    cut_data(&p, FOLD / 4);
    p.wave = SUMS / (p.sums * (int64_t)sizeof(REAL) + p.spread * (int64_t)sizeof(double));
    p.wave = p.wave < 1 ? 1 : p.wave < p.jobs ? p.wave : p.jobs;
    REAL *last = malloc((size_t)(p.count + p.size[2]) * sizeof *last);
    p.partial = allocate((size_t)(p.wave * p.sums));
    p.totals = malloc((size_t)(all + p.count + (1 + p.wave) * p.spread) * sizeof *p.totals);
    p.failed = !last || !p.partial || !p.totals || normalise_all(&p) || (!own && open_slice(&p.shared, &p));
    if (!p.failed) {
        p.counts = p.totals + all, p.spreads = p.counts + p.count, p.spread_parts = p.spreads + p.spread;
        memset(p.counts, 0, (size_t)(p.count + p.spread) * sizeof *p.counts);
    }
    for (int64_t first = 0; first < p.count && !p.failed; first += p.step) {
        if (!own) fill_slice(&p.shared, &p, 0, first), p.sums = (2 * p.columns + 1) * (int64_t)p.shared.width;
        memset(p.totals, 0, (size_t)all * sizeof *p.totals);
        for (p.first_job = 0; p.first_job < p.jobs && !p.failed; p.first_job += p.wave) run_wave(&p);
        /* one after the other where components share a log-variance */
        if (!own && !p.failed) run(p.shared.width / LANES, p.spread ? 0 : p.sums, p.threads, finish_job, &p);
    }
    if (!p.failed && p.spread && p.size[0] == 1) write_spread(&p, 0, p.spreads, last);
    if (!p.failed && p.dlogits.data && p.weight_sets == 1) write_shared_logits(&p, last);
    free(last), free(p.partial), free(p.totals), free(p.normaliser), free(p.shared.mean);
    return p.failed;
}

/* Returns 0, or 1 if out of memory. Every gradient may be absent; `kept` has the responsibilities, or is absent. */
int backward(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    (void)low, (void)high;
    return sums_over_rows(numbers, addresses, 0, 0);
}

/* The gradients of log-responsibilities: their cotangents are in the place of ln p, and they in that of `kept`. */
int log_responsibilities_gradients(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    (void)low, (void)high;
    return sums_over_rows(numbers, addresses, 1, 0);
}

/* The sums of r, r (z - m) and r (z - m)^2 over the rows, in the places of the gradients in logits, means and log-variances. */
int moments(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    (void)low, (void)high;
    return sums_over_rows(numbers, addresses, 0, 1);
}
