/* Gaussian mixtures with diagonal covariances: components, rows, and the terms of their log-densities. */
#include "functions.h"
#include "tiles.h"

enum { POINT, EXPECTED, CONVOLVED };
#ifdef __AVX512F__
#define VECTOR 64 /* bytes */
#else
#define VECTOR 32
#endif
#define LANES (VECTOR / (int)sizeof(REAL))
#define ROWS 4         /* rows that share a load */
#define FEW 64         /* dimensions per addition to the joint; the product of as many numbers up to 2 is finite */
#define FOLD 512       /* rows added one after the other */
#define SUMS (8 << 20) /* bytes of the sums of jobs */
#ifdef FLOAT64
#define LIMIT 1e154 /* its square is finite */
#define NEGLIGIBLE 1e-260
#else
#define NEGLIGIBLE 1e-26f /* a smaller responsibility is 0: products with subnormal numbers are ten times slower */
#define LIMIT 1.8e19f
#endif

typedef REAL vec __attribute__((vector_size(VECTOR)));
typedef BITS mask __attribute__((vector_size(VECTOR)));

INLINE vec load(const REAL *from) { vec v; memcpy(&v, from, sizeof v); return v; }
INLINE void store(REAL *to, vec v) { memcpy(to, &v, sizeof v); }
INLINE vec either(mask m, vec a, vec b) { return (vec)((m & (mask)a) | (~m & (mask)b)); }

INLINE REAL total(vec v) {
    typedef REAL part __attribute__((vector_size(16)));
    part parts[VECTOR / 16];
    REAL lanes[16 / sizeof(REAL)], all = 0;
    memcpy(parts, &v, sizeof v);
    for (int i = 1; i < VECTOR / 16; i++) parts[0] += parts[i];
    memcpy(lanes, parts, sizeof lanes);
    for (int i = 0; i < 16 / (int)sizeof(REAL); i++) all += lanes[i];
    return all;
}

/* The largest value; NaN does not count. By vectors, because compilers leave such a loop scalar. */
static REAL highest(const REAL *values, int64_t count) {
    vec most = (vec){0} - (REAL)INFINITY;
    REAL lanes[LANES], found = -(REAL)INFINITY;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        vec next = load(values + i);
        most = either(next > most, next, most);
    }
    memcpy(lanes, &most, sizeof most);
    for (int k = 0; k < LANES; k++) found = lanes[k] > found ? lanes[k] : found;
    for (; i < count; i++) found = values[i] > found ? values[i] : found;
    return found;
}

INLINE REAL maximum(REAL a, REAL b) { return a > b ? a : b; }

/* The largest size of a value */
static REAL largest(const REAL *values, int64_t count) {
    vec most = (vec){0};
    REAL lanes[LANES], found = 0;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        vec next = load(values + i);
        next = either(next < 0, -next, next);
        most = either(next > most, next, most);
    }
    memcpy(lanes, &most, sizeof most);
    for (int k = 0; k < LANES; k++) found = lanes[k] > found ? lanes[k] : found;
    for (; i < count; i++) found = values[i] > found ? values[i] : -values[i] > found ? -values[i] : found;
    return found;
}

/* Components [first, first + count), each array [D, width]. Those past the last repeat it with a weight of 0.
 * root = 1 / sigma, and quarter = sigma^1/2 and inverse = sigma^-1/2 serve ratios of two sigmas that overflow alone. */
typedef struct {
    int64_t first;
    int count, width;
    REAL *mean, *root, *quarter, *inverse, *logvar, *constant; /* constant: [width] */
    REAL most_mean, most_root;
} slice;

/* Up to ROWS rows of D or width elements, and the sums over rows [D, width] of weighted terms, from which the gradients of
 * the means and log-variances are made. */
typedef struct {
    int64_t row[ROWS];
    int count;
    const REAL *z, *logvar;
    REAL *z_own, *logvar_own, *quarter, *inverse, *root, *dz, *dlogvar, *joint, *product, *weights, *first, *second, *out;
    REAL scale[ROWS];
} block;

typedef struct {
    int form, columns, failed, logs, moments; /* logs: `kept` has log-responsibilities; moments: instead of gradients */
    int64_t threads, step, rows, count, sets, weight_sets, data, samples, each, jobs;
    int64_t size[3], spread; /* sizes of dlogvars; their product if they are less than the components', else 0 */
    int64_t first_job, wave, sums; /* jobs that run together; REALs of the sums of each */
    tensor z, logvar, dlp, dz, dlogvar, logits, dlogits, means, logvars, dmeans, dlogvars;
    REAL *lp, *kept; /* backward, with logs: lp has the cotangents of the log-responsibilities [R, K] */
    REAL *partial;
    double *log_density, *normaliser, *totals, *counts, *spreads, *spread_parts;
    slice shared;
} problem;

/* numbers: form, components of a slice, then four calls: rows [R, D], weights [I, K], components [M, K, D], and the gradient
 * of their log-variances, of which each size may be 1. */
static problem open_problem(const int64_t *numbers, const int64_t *addresses) {
    problem p = {.form = (int)numbers[0], .step = numbers[1], .threads = addresses[0]};
    p.lp = (REAL *)(intptr_t)addresses[1], p.log_density = (double *)(intptr_t)addresses[2];
    p.kept = (REAL *)(intptr_t)addresses[3];
    call c = open_call(numbers + 2, addresses + 4);
    p.rows = c.rows, p.columns = (int)c.columns;
    p.z = next_tensor(&c), p.logvar = next_tensor(&c), p.dlp = next_tensor(&c);
    p.dz = next_result(&c), p.dlogvar = next_result(&c);
    c = open_call(c.strides, c.addresses);
    p.weight_sets = c.rows, p.count = c.columns;
    p.logits = next_tensor(&c), p.dlogits = next_result(&c);
    c = open_call(c.strides, c.addresses);
    p.sets = c.rows / p.count;
    p.means = next_tensor(&c), p.logvars = next_tensor(&c), p.dmeans = next_result(&c);
    c = open_call(c.strides, c.addresses);
    memcpy(p.size, c.sizes, sizeof p.size);
    p.dlogvars = next_result(&c);
    p.data = p.sets > p.weight_sets ? p.sets : p.weight_sets;
    if (p.data == 1) p.data = p.rows;
    p.samples = p.rows / p.data;
    return p;
}

/* Jobs of about CHUNK * 4 elements, of at least `least` rows and whole groups of ROWS data. */
static void cut_data(problem *p, int64_t least) {
    int64_t work = p->columns * (p->count < p->step ? p->count : p->step), rows = 4 * CHUNK / work;
    if (rows < least) rows = least;
    if (rows > FOLD) rows = FOLD;
    p->each = (rows / p->samples + ROWS) / ROWS * ROWS;
    p->jobs = (p->data + p->each - 1) / p->each;
}

static void for_jobs(problem *p, void (*work)(void *, int64_t)) {
    run(p->jobs, p->rows * p->columns * p->count, p->threads, work, p);
}

/* All components, without arrays of their own. */
static slice every(const problem *p) { return (slice){.first = 0, .count = (int)p->count, .width = (int)p->count}; }

static int padded(int64_t count) { return (int)((count + LANES - 1) / LANES * LANES); }
static REAL *allocate(size_t count) {
    return aligned_alloc(VECTOR, (count * sizeof(REAL) + VECTOR - 1) / VECTOR * VECTOR);
}

/* ---- the log-weights */

static void normalise(void *context, int64_t job) {
    problem *p = context;
    REAL own[TILE], e[TILE];
    int64_t rows = p->weight_sets == 1 ? 1 : p->each, end = (job + 1) * rows;
    for (int64_t set = job * rows; set < end && set < p->weight_sets; set++) {
        REAL most = -(REAL)INFINITY;
        double sum_all = 0;
        for (int pass = 0; pass < 2; pass++)
            for (tile at = {set, 0, 1, 0}; at.column < p->count; at.column += at.columns) {
                at.columns = (int)(p->count - at.column < TILE ? p->count - at.column : TILE);
                const REAL *v = read_tile(&p->logits, at, own);
                if (pass == 0) for (int i = 0; i < at.columns; i++) most = v[i] > most ? v[i] : most;
                else {
                    for (int i = 0; i < at.columns; i++) e[i] = exponential(v[i] - most);
                    sum_all += sum(e, at.columns);
                }
            }
        p->normaliser[set] = most + log(sum_all);
    }
}

/* ln pi of a slice, into `out` */
static void log_weights(const problem *p, const slice *t, int64_t set, REAL *restrict out) {
    const REAL *v = read_tile(&p->logits, (tile){set, t->first, 1, t->count}, out);
    double normaliser = p->normaliser[set];
    for (int k = 0; k < t->count; k++) out[k] = (REAL)(v[k] - normaliser);
}

static int normalise_all(problem *p) {
    p->normaliser = malloc((size_t)p->weight_sets * sizeof *p->normaliser);
    if (!p->normaliser) return 1;
    if (p->weight_sets == 1) normalise(p, 0);
    else for_jobs(p, normalise);
    return 0;
}

/* ---- components */

static int open_slice(slice *t, const problem *p) {
    size_t width = (size_t)padded(p->step), all = width * (size_t)p->columns, arrays = p->form == POINT ? 2 : 5;
    if (!(t->mean = allocate(arrays * all + width + 2 * (size_t)(LANES * p->columns)))) return 1;
    t->root = t->mean + all, t->quarter = t->root + all, t->inverse = t->quarter + all, t->logvar = t->inverse + all;
    t->constant = t->mean + arrays * all;
    return 0;
}

/* [count, columns] -> [columns, LANES], the last row repeated */
static void transpose(const REAL *restrict from, int count, int columns, REAL *restrict to, int width) {
    if (count == LANES)
        for (int d = 0; d < columns; d++)
            for (int i = 0; i < LANES; i++) to[d * width + i] = from[i * columns + d];
    else
        for (int d = 0; d < columns; d++)
            for (int i = 0; i < LANES; i++) to[d * width + i] = from[(i < count ? i : count - 1) * columns + d];
}

/* Fill the slice from a set of components. ln pi is part of the constant if all rows share the weights. */
static void fill_slice(slice *t, const problem *p, int64_t set, int64_t first) {
    int64_t left = p->count - first;
    int n = p->columns;
    t->first = first, t->count = (int)(left < p->step ? left : p->step), t->width = padded(t->count);
    t->most_mean = t->most_root = 0;
    REAL *own = t->constant + t->width, *out = own + LANES * n;
    if (p->weight_sets == 1) log_weights(p, t, 0, t->constant);
    for (int k = 0; k < t->width; k += LANES) {
        int count = t->count - k < LANES ? t->count - k : LANES, all = count * n;
        tile at = {set * p->count + first + k, 0, count, n};
        const REAL *m = read_tile(&p->means, at, own);
        t->most_mean = maximum(t->most_mean, largest(m, all));
        transpose(m, count, n, t->mean + k, t->width);
        if (p->logvars.data) m = read_tile(&p->logvars, at, own);
        else m = memset(own, 0, (size_t)all * sizeof *own);
        for (int i = 0; i < LANES; i++) {
            REAL weight = p->weight_sets == 1 && i < count ? t->constant[k + i] : 0, logs = n * (REAL)1.8378770664093453;
            if (p->form != CONVOLVED && i < count) logs += sum(m + i * n, n);
            t->constant[k + i] = i < count ? weight - (REAL)0.5 * logs : -(REAL)INFINITY;
        }
        for (int i = 0; i < all; i++) {
            REAL e = exponential((REAL)-0.5 * m[i]);
            out[i] = e > MOST ? MOST : e; /* 0 times infinity would be NaN */
        }
        t->most_root = maximum(t->most_root, largest(out, all));
        transpose(out, count, n, t->root + k, t->width);
        if (p->form == POINT) continue;
        transpose(m, count, n, t->logvar + k, t->width);
        for (int i = 0; i < all; i++) out[i] = exponential((REAL)-0.25 * m[i]);
        transpose(out, count, n, t->inverse + k, t->width);
        for (int i = 0; i < all; i++) out[i] = exponential((REAL)0.25 * m[i]);
        transpose(out, count, n, t->quarter + k, t->width);
    }
}

/* ---- rows */

static int open_block(block *b, const problem *p, int gradient) {
    size_t rows = ROWS * (size_t)p->columns, width = (size_t)padded(p->step), own = ROWS * width;
    size_t all = gradient ? width * (size_t)p->columns : 0;
    if (!(b->joint = allocate(3 * own + 2 * all + 7 * rows + 2 * (gradient ? LANES : 0) * (size_t)p->columns))) return 1;
    b->product = b->joint + own, b->weights = b->product + own, b->first = b->weights + own, b->second = b->first + all;
    b->z_own = b->second + all, b->logvar_own = b->z_own + rows, b->quarter = b->logvar_own + rows;
    b->inverse = b->quarter + rows, b->root = b->inverse + rows, b->dz = b->root + rows, b->dlogvar = b->dz + rows;
    b->out = b->dlogvar + rows;
    return 0;
}

/* Rows of data [datum, end) of sample `group` or, if each datum has its own components, of one datum and ROWS samples. */
static void place_rows(const problem *p, block *b, int64_t datum, int64_t end, int64_t group) {
    int64_t left = p->sets > 1 ? p->samples - group * ROWS : end - datum;
    b->count = (int)(left < ROWS ? left : ROWS);
    for (int i = 0; i < b->count; i++)
        b->row[i] = p->sets > 1 ? (group * ROWS + i) * p->data + datum : group * p->data + datum + i;
}

static const REAL *read_rows(const problem *p, const block *b, const tensor *t, REAL *own) {
    int n = p->columns;
    if (p->sets == 1 || b->count == 1) return read_tile(t, (tile){b->row[0], 0, b->count, n}, own);
    for (int i = 0; i < b->count; i++) {
        const REAL *row = read_tile(t, (tile){b->row[i], 0, 1, n}, own + i * n);
        if (row != own + i * n) memcpy(own + i * n, row, (size_t)n * sizeof *own);
    }
    return own;
}

static void read_block(const problem *p, block *b) {
    int all = b->count * p->columns;
    b->z = read_rows(p, b, &p->z, b->z_own);
    if (p->form == POINT) return;
    b->logvar = read_rows(p, b, &p->logvar, b->logvar_own);
    for (int i = 0; i < all; i++) {
        REAL v = b->logvar[i], e = exponential((REAL)-0.5 * v);
        b->root[i] = e > MOST ? MOST : e;
        b->quarter[i] = exponential((REAL)0.25 * v), b->inverse[i] = exponential((REAL)-0.25 * v);
    }
}

/* One row of the block, as a block. */
static block one_row(const problem *p, const block *b, int i, int width) {
    int64_t n = i * p->columns, w = i * width;
    block one = *b;
    one.z += n, one.logvar += p->form == POINT ? 0 : n;
    one.quarter += n, one.inverse += n, one.root += n, one.dz += n, one.dlogvar += n;
    one.joint += w, one.product += w;
    return one;
}

/* The precision of a convolved component. ratio is the smaller variance divided by the larger one. */
typedef struct { mask component; vec spread, root, ratio; } convolved;

INLINE convolved convolve(const slice *t, const block *b, int64_t at, int i) {
    vec v = load(t->logvar + at), q = v - v + b->logvar[i];
    mask component = v > q;
    vec small = either(component, b->quarter[i] * load(t->inverse + at), load(t->quarter + at) * b->inverse[i]);
    vec own = load(t->root + at), root = either(component, own, own - own + b->root[i]);
    small *= small;
    return (convolved){component, either(component, v, q), root, small * small};
}

/* sigma of q divided by that of the component */
INLINE vec sigma_ratio(const slice *t, const block *b, int64_t at, int i) {
    vec root = b->quarter[i] * load(t->inverse + at);
    return root * root;
}

/* joint += the term of each component, without its constant, for dimensions [start, end) */
INLINE void add_terms(const problem *p, const slice *t, const block *b, int form, int rows, int vectors, int k, int start, int end) {
    int n = p->columns, width = t->width;
    const REAL *restrict means = t->mean, *restrict roots = t->root, *restrict z = b->z;
    vec sums[ROWS][2], products[ROWS][2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sums[r][v] = (vec){0}, products[r][v] = sums[r][v] + 1;
    for (int d = start; d < end; d++)
        for (int v = 0; v < vectors; v++) {
            int64_t at = (int64_t)d * width + k + v * LANES;
            vec mean = load(means + at), root = load(roots + at);
            for (int r = 0; r < rows; r++) {
                int i = r * n + d;
                if (form == CONVOLVED) {
                    convolved c = convolve(t, b, at, i);
                    vec x = (mean - z[i]) * c.root;
                    sums[r][v] += x * x / (1 + c.ratio) + c.spread, products[r][v] *= 1 + c.ratio;
                    continue;
                }
                vec x = (mean - z[i]) * root;
                sums[r][v] += x * x;
                if (form == EXPECTED) x = sigma_ratio(t, b, at, i), sums[r][v] += x * x;
            }
        }
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) {
            int at = r * width + k + v * LANES;
            store(b->joint + at, load(b->joint + at) - (REAL)0.5 * sums[r][v]);
            if (form == CONVOLVED) store(b->product + at, products[r][v]);
        }
}

INLINE void all_terms(const problem *p, const slice *t, const block *b, int form, int rows) {
    for (int start = 0; start < p->columns; start += FEW) {
        int end = start + FEW < p->columns ? start + FEW : p->columns, k = 0;
        if (form != CONVOLVED) for (; k + 2 * LANES <= t->width; k += 2 * LANES) add_terms(p, t, b, form, rows, 2, k, start, end);
        for (; k < t->width; k += LANES) add_terms(p, t, b, form, rows, 1, k, start, end);
        if (form == CONVOLVED)
            for (int i = 0; i < rows * t->width; i++) b->joint[i] -= (REAL)0.5 * logarithm(b->product[i]);
    }
}

/* ln pi + the term of each component, at each row */
static void fill_joint(const problem *p, const slice *t, block *b) {
    int width = t->width;
    for (int r = 0; r < b->count; r++) {
        REAL *restrict joint = b->joint + r * width;
        memcpy(joint, t->constant, (size_t)width * sizeof *joint);
        if (p->weight_sets == 1) continue;
        log_weights(p, t, b->row[r] % p->data, b->product);
        for (int k = 0; k < t->count; k++) joint[k] += b->product[k];
    }
    if (b->count == ROWS && p->form == POINT) all_terms(p, t, b, POINT, ROWS);
    else if (b->count == ROWS && p->form == EXPECTED) all_terms(p, t, b, EXPECTED, ROWS);
    else if (b->count == ROWS) all_terms(p, t, b, CONVOLVED, ROWS);
    else
        for (int r = 0; r < b->count; r++) {
            block one = one_row(p, b, r, width);
            if (p->form == POINT) all_terms(p, t, &one, POINT, 1);
            else if (p->form == EXPECTED) all_terms(p, t, &one, EXPECTED, 1);
            else all_terms(p, t, &one, CONVOLVED, 1);
        }
}

/* ---- a row with its own components: lanes are dimensions, because each value is used once */

/* A row's z and log-variance of q, once for each of `each` components [each, D]. */
typedef struct { int each; REAL z[TILE], q[TILE]; } repeated;

static int is_single(const problem *p) { return p->sets > 1 && p->samples == 1 && p->columns <= TILE; }

static void repeat(const problem *p, int64_t row, repeated *out) {
    int n = p->columns;
    out->each = (int)(TILE / n < p->count ? TILE / n : p->count);
    REAL own[TILE];
    for (int part = 0; part < (p->form == POINT ? 1 : 2); part++) {
        REAL *restrict to = part ? out->q : out->z;
        const REAL *from = read_tile(part ? &p->logvar : &p->z, (tile){row, 0, 1, n}, own);
        for (int k = 0; k < out->each; k++) memcpy(to + k * n, from, (size_t)n * sizeof *to);
    }
}

static const REAL *read_logvars(const problem *p, tile at, REAL *own) {
    if (p->logvars.data) return read_tile(&p->logvars, at, own);
    return memset(own, 0, (size_t)(at.rows * at.columns) * sizeof *own);
}

static inline REAL bounded_root(REAL logvar) {
    REAL root = exponential((REAL)-0.5 * logvar);
    return root > MOST ? MOST : root; /* 0 times infinity would be NaN */
}

/* ln pi + the term of each component at a row */
static void fill_single(const problem *p, const slice *t, int64_t row, REAL *restrict joint) {
    REAL m_own[TILE], v_own[TILE], terms[TILE], sums[TILE];
    repeated r;
    int n = p->columns;
    repeat(p, row, &r);
    log_weights(p, t, p->weight_sets > 1 ? row : 0, joint);
    for (int k = 0; k < t->count; k += r.each) {
        int count = t->count - k < r.each ? t->count - k : r.each, all = count * n;
        tile at = {row * p->count + k, 0, count, n};
        const REAL *restrict m = read_tile(&p->means, at, m_own), *restrict v = read_logvars(p, at, v_own);
        if (p->form == CONVOLVED)
            for (int i = 0; i < all; i++) {
                REAL gap = v[i] - r.q[i], wider = gap > 0 ? v[i] : r.q[i], ratio = exponential(gap > 0 ? -gap : gap);
                REAL x = (m[i] - r.z[i]) * bounded_root(wider);
                terms[i] = x * x / (1 + ratio) + wider + log_one_plus(ratio);
            }
        else
            for (int i = 0; i < all; i++) {
                REAL x = (m[i] - r.z[i]) * bounded_root(v[i]);
                terms[i] = x * x + v[i];
            }
        if (p->form == EXPECTED) for (int i = 0; i < all; i++) terms[i] += exponential(r.q[i] - v[i]);
        sum_each(terms, count, n, sums);
        for (int i = 0; i < count; i++) joint[k + i] -= (REAL)0.5 * (sums[i] + n * (REAL)1.8378770664093453);
    }
}
