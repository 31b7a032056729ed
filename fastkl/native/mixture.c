/* Gaussian mixtures with diagonal covariances on a CPU: the log-density and its gradients.
 * fastkl.reference.mixture defines the op, and fastkl.ops.mixture._mixture the forms of a component's term. The lanes of a vector
 * are components, and four rows share each load of a component. A difference z - mean is taken before it is scaled, so
 * narrow and distant components lose no digits. */

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

#define INLINE static inline __attribute__((always_inline)) /* one copy for each constant form */
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
    int form, columns, failed;
    int64_t threads, step, rows, count, sets, weight_sets, data, samples, each, jobs;
    int64_t size[3], spread; /* sizes of dlogvars; their product if they are less than the components', else 0 */
    int64_t first_job, wave, sums; /* jobs that run together; REALs of the sums of each */
    tensor z, logvar, dlp, dz, dlogvar, logits, dlogits, means, logvars, dmeans, dlogvars;
    REAL *lp, *kept;
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

/* ---- forward */

/* exp(values - high - low), in place */
static void exponentials(REAL *restrict values, int count, REAL high, REAL low) {
    for (int k = 0; k < count; k++) {
        REAL e = exponential((values[k] - high) - low);
        values[k] = e < NEGLIGIBLE ? 0 : e;
    }
}

static void finish_row(const problem *p, const slice *t, const block *b, int r) {
    REAL *restrict joint = b->joint + r * t->width, most = -(REAL)INFINITY;
    int64_t row = b->row[r];
    most = highest(joint, t->count);
    int several = t->count < p->count;
    REAL *restrict kept = p->kept ? p->kept + row * p->count + t->first : b->product;
    if (several && p->kept) memcpy(kept, joint, (size_t)t->count * sizeof *kept);
    REAL origin = most > -(REAL)INFINITY ? most : 0;
    exponentials(joint, t->count, origin, 0);
    REAL all = sum(joint, t->count), share = 1 / all; /* NaN in a row of density 0, whose gradient may be anything */
    if (!several && p->kept) for (int k = 0; k < t->count; k++) kept[k] = joint[k] * share;
    double found = (double)origin + logarithm(all);
    if (t->first) {
        double before = p->log_density[row], larger = before > found ? before : found;
        double difference = before > found ? found - before : before - found;
        found = larger == -INFINITY && found == before ? larger : larger + log1p(exp(difference));
    }
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
    for (int64_t row = job * each; row < end; row++)
        responsibilities(p->kept + row * p->count, (int)p->count, p->log_density[row]);
}

/* Returns 0, or 1 if out of memory. Writes ln p, also as double, and where `kept` is given the responsibilities [R, K]. */
int forward(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    problem p = open_problem(numbers, addresses);
    (void)low, (void)high;
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

/* The weights of the block's rows and components, in place of the joint. */
static void weigh(const problem *p, const slice *t, block *b) {
    int width = t->width;
    if (!p->kept && is_single(p)) fill_single(p, t, b->row[0], b->joint);
    else if (!p->kept) fill_joint(p, t, b);
    for (int r = 0; r < b->count; r++) {
        REAL *restrict weights = b->joint + r * width, own;
        double log_density = p->log_density[b->row[r]];
        b->scale[r] = *read_tile(&p->dlp, (tile){b->row[r], 0, 1, 1}, &own);
        if (p->kept) memcpy(weights, p->kept + b->row[r] * p->count + t->first, (size_t)t->count * sizeof *weights);
        else responsibilities(weights, t->count, log_density);
        REAL scale = b->scale[r];
        for (int k = 0; k < t->count; k++) weights[k] = scale == 0 ? 0 : weights[k] * scale;
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
        if (p->form == CONVOLVED) for (int d = 0; d < n; d++) to[i * n + d] = -first[d * stride + i];
        else for (int d = 0; d < n; d++) to[i * n + d] = -first[d * stride + i] * roots[d * width + i];
    }
    if (p->dmeans.data) write_tile(&p->dmeans, at, to, out);
    if (!p->dlogvars.data) return;
    to = spread ? out : target_tile(&p->dlogvars, at, out);
    for (int i = 0; i < count; i++) {
        REAL weight = p->form == CONVOLVED ? 0 : counts[i];
        for (int d = 0; d < n; d++) to[i * n + d] = (REAL)0.5 * (second[d * stride + i] - weight);
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
            second[d * LANES + i] = (REAL)(b[d * width + i] - (p->form == CONVOLVED ? 0 : counts[i]));
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
    for (int64_t k = 0; k < p->count; k++) own[k] = (REAL)(p->counts[k] - exponential(own[k]) * scale);
    write_tile(&p->dlogits, (tile){0, 0, 1, (int)p->count}, own, own);
}

/* Returns 0, or 1 if out of memory. Every gradient may be absent; `kept` has the responsibilities, or is absent. */
int backward(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    problem p = open_problem(numbers, addresses);
    (void)low, (void)high;
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
