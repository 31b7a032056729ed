/* Gumbel-Softmax on a CPU, with logits [rows, classes, inner]. fastkl.reference.categorical defines each op. The method is
 * that of fastkl.kernels, with blocks that fit the cache. Noise is drawn again instead of stored. */

#pragma GCC diagnostic ignored "-Wunused-function" /* functions of the headers that only other sources use */
#include "functions.h"
#include "philox.h"
#include "tiles.h"

#define LANES 256 /* most neighbours in `inner` of one block; a multiple of 4 */

/* rows x classes from `line` on x neighbours in `inner` from `lane` on; several rows only if each is complete. */
typedef struct { int64_t row, line, lane; int rows, lines, lanes; } block;
typedef struct { tile at; int first, count, rows, lines; } part; /* of a block, read and written at a time */

typedef struct {
    int limit;                   /* the value is the one-hot vector */
    REAL sharpness, inverse;     /* 1 / tau of the weights and of the gradient */
    int64_t threads, classes, inner;
    uint64_t seed;
    uint32_t stream;
    call shape;
    block most;                  /* the largest block */
    int64_t rows_each, lane_blocks, chunks, jobs;
    double *found, *tau_partial; /* per job: [3][lanes] of maximum, sum, weighted gradient; and tau's partial gradient */
    tensor logits, y, dy, dlogits;
} problem;

/* numbers: hard, stream, ndim, event (the classes and all later dimensions), sizes, strides. addresses: the number of
 * threads, the seed, the tensors. */
static problem open_problem(const int64_t *numbers, const int64_t *addresses, REAL tau, int limit) {
    problem p = {.threads = addresses[0], .limit = limit, .seed = *(const uint64_t *)(intptr_t)addresses[1]};
    p.stream = (uint32_t)numbers[1], p.shape = open_call(numbers + 2, addresses + 2);
    p.classes = p.shape.sizes[p.shape.ndim - p.shape.event], p.inner = p.shape.columns / p.classes;
    REAL positive = tau < (REAL)LEAST_NORMAL ? (REAL)LEAST_NORMAL : tau; /* NaN stays */
    p.sharpness = tau < 0 ? (REAL)NAN : 1 / positive;
    p.inverse = tau == 0 ? 0 : p.sharpness;
    if (limit) p.sharpness = p.sharpness * 0 + 1 / (REAL)LEAST_NORMAL; /* only the maximum has a weight */
    p.lane_blocks = (p.inner + LANES - 1) / LANES;
    int lanes = (int)(p.lane_blocks == 1 ? p.inner : ((p.inner + p.lane_blocks - 1) / p.lane_blocks + 3) / 4 * 4);
    p.lane_blocks = (p.inner + lanes - 1) / lanes;
    int whole = p.lane_blocks == 1 && p.shape.columns <= CHUNK;
    int64_t rows = whole && p.shape.columns < TILE ? TILE / p.shape.columns : 1;
    int64_t lines = whole || p.classes * lanes <= CHUNK ? p.classes : CHUNK / lanes;
    p.most = (block){0, 0, 0, (int)rows, (int)lines, lanes};
    p.rows_each = whole ? CHUNK / (rows * p.shape.columns) * rows : 1;
    p.chunks = (p.classes + lines - 1) / lines;
    p.jobs = (p.shape.rows + p.rows_each - 1) / p.rows_each * p.lane_blocks * p.chunks;
    return p;
}

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* The first block of a job. */
static block first_block(const problem *p, int64_t job) {
    int64_t strip = job / p->chunks;
    block b = p->most;
    b.row = strip / p->lane_blocks * p->rows_each, b.lane = strip % p->lane_blocks * p->most.lanes;
    b.line = job % p->chunks * p->most.lines;
    b.rows = (int)least(b.rows, p->shape.rows - b.row);
    b.lines = (int)least(b.lines, p->classes - b.line), b.lanes = (int)least(b.lanes, p->inner - b.lane);
    return b;
}

static int next_block(const problem *p, int64_t job, block *b) {
    int64_t end = least((job / p->chunks / p->lane_blocks + 1) * p->rows_each, p->shape.rows);
    b->row += b->rows, b->rows = (int)least(b->rows, end - b->row);
    return b->rows > 0;
}

static int next_part(const problem *p, const block *b, part *r) {
    int first = r->first + r->count, left = b->rows * b->lines * b->lanes - first;
    if (!left) return 0;
    *r = (part){{b->row, 0, b->rows, b->lines * b->lanes}, first, left, b->rows, b->lines};
    if (b->rows == 1) {
        r->lines = (int)least(b->lanes < p->inner ? 1 : TILE / b->lanes, left / b->lanes);
        r->count = r->lines * b->lanes;
        r->at = (tile){b->row, (b->line + first / b->lanes) * p->inner + b->lane, 1, r->count};
    }
    return 1;
}

/* -ln(-ln u), u = (word + 1/2) / 2^32; near 1 from 1 - u, so that both tails are accurate. */
static inline float gumbel(uint32_t word) {
    int32_t is_signed = (int32_t)word;
    float tail = (float)(is_signed ^ (is_signed >> 31)) * 0x1p-32f + 0x1p-33f; /* u or 1 - u, at most 1/2 */
    float u = is_signed < 0 ? 1 - tail : tail;
    float rounding = is_signed < 0 ? (u - 1) + tail : 0; /* the rounding error of 1 - tail, which dominates ln u near 1 */
    return -log_unit(rounding - log_unit(u));
}

/* Logits with the noise of the seed added. */
static void draw(const problem *p, tile at, REAL *restrict out) {
    uint32_t words[4][CALLS];
    float noise[NOISE];
    REAL own[TILE];
    uint64_t first = (uint64_t)(at.row * p->shape.columns + at.column);
    int count = at.rows * at.columns, shift = (int)(first % 4), calls = (shift + count + 3) / 4;
    philox(p->seed, first / 4, 0, p->stream, calls, words, NOTHING);
    for (int i = 0; i < calls; i++) {
        noise[4 * i] = gumbel(words[0][i]), noise[4 * i + 1] = gumbel(words[1][i]);
        noise[4 * i + 2] = gumbel(words[2][i]), noise[4 * i + 3] = gumbel(words[3][i]);
    }
    const REAL *logits = read_tile(&p->logits, at, own);
    for (int i = 0; i < count; i++) out[i] = logits[i] + noise[shift + i];
}

enum { SUM, MAXIMUM };

/* [lines, lanes] -> [lanes]; several short lines at a time. */
static inline void reduce(int operation, const REAL *values, int lines, int lanes, REAL *restrict found) {
    int n = lines * lanes, period = lanes;
    while (period < 16 && 2 * period <= n) period *= 2;
    memcpy(found, values, (size_t)period * sizeof *found);
    for (int at = period; at < n; at += period) {
        int count = period < n - at ? period : n - at;
        const REAL *v = values + at;
        if (operation == SUM) for (int i = 0; i < count; i++) found[i] += v[i];
        else for (int i = 0; i < count; i++) found[i] = v[i] > found[i] ? v[i] : found[i];
    }
    for (int half = period / 2; half >= lanes; half /= 2)
        for (int i = 0; i < half; i++) {
            REAL other = found[half + i];
            found[i] = operation == SUM ? found[i] + other : other > found[i] ? other : found[i];
        }
}

/* Add the sums of a part's rows and lanes to those of earlier parts. */
static void add_up(const part *r, int lanes, const REAL *values, double *totals) {
    REAL found[LANES];
    for (int row = 0; row < r->rows; row++) {
        reduce(SUM, values + row * r->lines * lanes, r->lines, lanes, found);
        for (int i = 0; i < lanes; i++) totals[row * lanes + i] += found[i];
    }
}

static void find_top(const part *r, int lanes, const REAL *values, REAL *tops) {
    REAL found[LANES];
    for (int row = 0; row < r->rows; row++) {
        reduce(MAXIMUM, values + row * r->lines * lanes, r->lines, lanes, found);
        REAL *top = tops + row * lanes;
        for (int i = 0; i < lanes; i++) top[i] = found[i] > top[i] ? found[i] : top[i];
    }
}

/* One value for each row and lane, written to all of a part's lines. */
static void widen(const part *r, int lanes, const REAL *values, REAL *restrict out) {
    for (int row = 0; row < r->rows; row++)
        if (lanes == 1) for (int i = 0; i < r->lines; i++) out[row * r->lines + i] = values[row];
        else
            for (int line = 0; line < r->lines; line++)
                memcpy(out + (row * r->lines + line) * lanes, values + row * lanes, (size_t)lanes * sizeof *out);
}

/* exp(x), with 0 for denormal results. */
static inline REAL weight(REAL x) {
    REAL value = exponential(x);
    return x < exp_bounds[0] ? 0 : value;
}

static inline REAL normal_or_zero(REAL x) { return x < (REAL)LEAST_NORMAL ? 0 : x; } /* for x >= 0 */

/* exp((v - top) / tau) of a block's perturbed logits v, with top and sum for each row and lane. In the limit tau = 0 only
 * the first maximum has a weight, 1. */
static void weigh(const problem *p, const block *b, REAL *v, REAL *top, double *total) {
    REAL wide[TILE], base[TILE];
    int groups = b->rows * b->lanes;
    for (int i = 0; i < groups; i++) top[i] = -(REAL)INFINITY, total[i] = 0;
    for (part r = {0}; next_part(p, b, &r);) draw(p, r.at, v + r.first), find_top(&r, b->lanes, v + r.first, top);
    for (int i = 0; i < groups; i++) base[i] = top[i] == -(REAL)INFINITY ? 0 : top[i];
    for (part r = {0}; next_part(p, b, &r);) {
        REAL *values = v + r.first;
        widen(&r, b->lanes, base, wide);
        for (int i = 0; i < r.count; i++) values[i] = weight((values[i] - wide[i]) * p->sharpness);
        add_up(&r, b->lanes, values, total);
    }
    for (int i = 0; p->limit && i < groups; i++)
        if (total[i] > 1) {
            REAL *values = v + i / b->lanes * b->lines * b->lanes + i % b->lanes;
            for (int line = 0; line < b->lines; line++) {
                values[line * b->lanes] = total[i] > 1 && values[line * b->lanes] == 1;
                if (values[line * b->lanes] == 1) total[i] = 1;
            }
        }
}

static int rounded_sample(const problem *p) { return !p->logits.data && p->y.kind != WHOLE; }

static void load(const problem *p, const block *b, const tensor *from, REAL *v) {
    REAL own[TILE];
    for (part r = {0}; next_part(p, b, &r);)
        memcpy(v + r.first, read_tile(from, r.at, own), (size_t)r.count * sizeof *v);
}

static void store(const problem *p, const block *b, const tensor *to, const REAL *v) {
    REAL own[TILE];
    for (part r = {0}; next_part(p, b, &r);) {
        REAL *out = target_tile(to, r.at, own);
        memcpy(out, v + r.first, (size_t)r.count * sizeof *v);
        write_tile(to, r.at, out, own);
    }
}

/* The value: weights times a factor that normalises their sum to 1. */
static void finish_forward(const problem *p, const block *b, const REAL *v, const REAL *factor) {
    REAL own[TILE], wide[TILE];
    for (part r = {0}; next_part(p, b, &r);) {
        REAL *out = target_tile(&p->y, r.at, own);
        widen(&r, b->lanes, factor, wide);
        for (int i = 0; i < r.count; i++) out[i] = normal_or_zero(v[r.first + i] * wide[i]);
        write_tile(&p->y, r.at, out, own);
    }
}

/* The gradient w (dy - sum w dy) / tau; returns sum w (dy - sum w dy) ln w if tau's gradient is requested. */
static double finish_backward(const problem *p, const block *b, const REAL *v, const REAL *factor, const REAL *dot) {
    REAL own[TILE], d_own[TILE], wide[TILE], dots[TILE], terms[TILE];
    double total = 0;
    for (part r = {0}; next_part(p, b, &r);) {
        REAL *out = target_tile(&p->dlogits, r.at, own);
        const REAL *d = read_tile(&p->dy, r.at, d_own), *values = v + r.first;
        widen(&r, b->lanes, factor, wide), widen(&r, b->lanes, dot, dots);
        if (p->tau_partial) {
            for (int i = 0; i < r.count; i++) {
                REAL w = normal_or_zero(values[i] * wide[i]), log = logarithm(w);
                terms[i] = w * (d[i] - dots[i]) * (w == 0 ? 0 : log);
            }
            total += sum(terms, r.count);
        }
        for (int i = 0; i < r.count; i++)
            out[i] = normal_or_zero(values[i] * wide[i]) * (d[i] - dots[i]) * p->inverse;
        write_tile(&p->dlogits, r.at, out, own);
    }
    return total;
}

/* A block's weights in v; top, sum and weighted sum of dy for each row and lane. A soft sample holds its weights, whose
 * sum is not exactly 1 if they are rounded to 16 bits. */
static void weigh_backward(const problem *p, const block *b, REAL *v, REAL *top, double *total, double *dot) {
    REAL d_own[TILE], terms[TILE];
    int groups = b->rows * b->lanes;
    if (p->logits.data) weigh(p, b, v, top, total);
    else load(p, b, &p->y, v);
    if (!p->logits.data) for (int i = 0; i < groups; i++) top[i] = total[i] = 0;
    for (int i = 0; i < groups; i++) dot[i] = 0;
    for (part r = {0}; next_part(p, b, &r);) {
        const REAL *d = read_tile(&p->dy, r.at, d_own), *values = v + r.first;
        for (int i = 0; i < r.count; i++) terms[i] = values[i] * d[i];
        add_up(&r, b->lanes, terms, dot);
        if (rounded_sample(p)) add_up(&r, b->lanes, values, total);
    }
    for (int i = 0; !p->logits.data && !rounded_sample(p) && i < groups; i++) total[i] = 1;
}

/* Complete distributions, each in one job. */
static void forward_whole(void *context, int64_t job) {
    const problem *p = context;
    REAL v[CHUNK], top[TILE], factor[TILE];
    double total[TILE];
    block b = first_block(p, job);
    do {
        weigh(p, &b, v, top, total);
        for (int i = 0; i < b.rows * b.lanes; i++) factor[i] = (REAL)(total[i] == 0 ? 1 : 1 / total[i]);
        finish_forward(p, &b, v, factor);
    } while (next_block(p, job, &b));
}

static void backward_whole(void *context, int64_t job) {
    const problem *p = context;
    REAL v[CHUNK], top[TILE], factor[TILE], dots[TILE];
    double total[TILE], dot[TILE], tau = 0;
    block b = first_block(p, job);
    do {
        weigh_backward(p, &b, v, top, total, dot);
        for (int i = 0; i < b.rows * b.lanes; i++) {
            double scale = total[i] == 0 ? 1 : 1 / total[i];
            factor[i] = (REAL)scale, dots[i] = (REAL)(dot[i] * scale);
        }
        tau += finish_backward(p, &b, v, factor, dots);
    } while (next_block(p, job, &b));
    if (p->tau_partial) p->tau_partial[job] = tau;
}

/* Distributions cut in chunks, in three passes: statistics of each chunk, with its weights in the output; their merge; the
 * result. A 16-bit output would round the weights, so they are computed again. */
static void find_chunk(void *context, int64_t job) {
    const problem *p = context;
    REAL v[CHUNK], top[LANES];
    double *found = p->found + job * 3 * p->most.lanes;
    block b = first_block(p, job);
    if (!p->dy.data) {
        weigh(p, &b, v, top, found + b.lanes);
        if (p->y.kind == WHOLE) store(p, &b, &p->y, v);
    } else {
        weigh_backward(p, &b, v, top, found + b.lanes, found + 2 * b.lanes);
        if (p->logits.data && p->dlogits.kind == WHOLE) store(p, &b, &p->dlogits, v);
    }
    for (int i = 0; i < b.lanes; i++) found[i] = top[i];
}

static void combine(void *context, int64_t strip) {
    const problem *p = context;
    int lanes = first_block(p, strip * p->chunks).lanes;
    int64_t step = 3 * p->most.lanes;
    for (int lane = 0; lane < lanes; lane++) {
        double *found = p->found + strip * p->chunks * step + lane, top = -INFINITY, total = 0, dot = 0;
        for (int64_t i = 0; i < p->chunks; i++) top = found[i * step] > top ? found[i * step] : top;
        double base = top == -INFINITY ? 0 : top;
        for (int64_t i = 0; i < p->chunks; i++) {
            double *mine = found + i * step;
            REAL w = weight((REAL)((mine[0] - base) * p->sharpness));
            if (p->limit && w == 1 && total >= 1) w = 0; /* an earlier chunk has the first maximum */
            if (!p->logits.data) w = 1;
            total += mine[lanes] * w;
            if (p->dy.data) dot += mine[2 * lanes] * w;
            mine[0] = w;
        }
        if ((!p->logits.data && !rounded_sample(p)) || total == 0) total = 1;
        for (int64_t i = 0; i < p->chunks; i++) found[i * step] /= total, found[i * step + 2 * lanes] = dot / total;
    }
}

static void finish_chunk(void *context, int64_t job) {
    const problem *p = context;
    REAL v[CHUNK], factor[LANES], dots[LANES], top[LANES];
    double total[LANES];
    const double *found = p->found + job * 3 * p->most.lanes;
    block b = first_block(p, job);
    for (int i = 0; i < b.lanes; i++) factor[i] = (REAL)found[i], dots[i] = (REAL)found[2 * b.lanes + i];
    const tensor *weights = !p->dy.data || !p->logits.data ? &p->y : &p->dlogits;
    if (p->logits.data && weights->kind != WHOLE) weigh(p, &b, v, top, total);
    else load(p, &b, weights, v);
    if (!p->dy.data) finish_forward(p, &b, v, factor);
    else {
        double tau = finish_backward(p, &b, v, factor, dots);
        if (p->tau_partial) p->tau_partial[job] = tau;
    }
}

static int run_all(problem *p) {
    int64_t elements = p->shape.rows * p->shape.columns;
    if (p->chunks == 1) {
        run(p->jobs, elements, p->threads, p->dy.data ? backward_whole : forward_whole, p);
        return 0;
    }
    if (!(p->found = malloc((size_t)(p->jobs * 3 * p->most.lanes) * sizeof *p->found))) return 1;
    run(p->jobs, elements, p->threads, find_chunk, p);
    run(p->jobs / p->chunks, elements, p->threads, combine, p);
    run(p->jobs, elements, p->threads, finish_chunk, p);
    free(p->found);
    return 0;
}

/* Returns 0, or 1 if out of memory. Tensors: logits, y. */
int forward(const int64_t *numbers, const int64_t *addresses, double tau, double unused) {
    (void)unused;
    problem p = open_problem(numbers, addresses, (REAL)tau, numbers[0] || (REAL)tau == 0);
    p.logits = next_tensor(&p.shape), p.y = next_result(&p.shape);
    return run_all(&p);
}

/* Returns 0, or 1 if out of memory. Tensors: logits, y (one of the two), dy, dlogits; then the address of tau's gradient. */
int backward(const int64_t *numbers, const int64_t *addresses, double tau, double unused) {
    (void)unused;
    problem p = open_problem(numbers, addresses, (REAL)tau, 0);
    p.logits = next_tensor(&p.shape), p.y = next_tensor(&p.shape);
    p.dy = next_tensor(&p.shape), p.dlogits = next_result(&p.shape);
    REAL *dtau = (REAL *)(intptr_t)*p.shape.addresses;
    if (dtau && !(p.tau_partial = malloc((size_t)p.jobs * sizeof *p.tau_partial))) return 1;
    int failed = run_all(&p);
    double total = 0;
    for (int64_t job = 0; dtau && !failed && job < p.jobs; job++) total += p.tau_partial[job];
    if (dtau) *dtau = (REAL)(-p.inverse * total);
    free(p.tau_partial);
    return failed;
}
