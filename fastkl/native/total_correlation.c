/* total_correlation and its gradients on a CPU, in sweeps over blocks of posteriors that fit the cache.
 *
 * With s = exp(-logvar / 2) / sqrt 2 and t = (z - mu) s a density is exp(ln s - t^2) / sqrt pi. Exponents are relative to
 * row i's own posterior, from which z_i is drawn, so that sums need no running maximum. If z_i lies so far from its own
 * posterior that a sum overflows, `far` is set, and the closed form must compute the result.
 *
 * The posteriors are those of the whole batch, or a block of them, whose sums are added to those of other blocks. */

#include "functions.h"
#include "tiles.h"

#define LANES (64 / (int)sizeof(REAL)) /* posteriors are padded to vectors */
#define ROWS 64                        /* of a block */
#define WIDEST 256                     /* posteriors of a block at most */
#define AREA 4096                      /* elements of a block's temporaries */
#define LN2 0.69314718055994530942
#ifdef FLOAT64
#define MOST_LOG_SCALE 709.0
#else
#define MOST_LOG_SCALE 88.0f
#endif

typedef struct {
    int64_t rows, batch, columns, threads, width, padded, row_blocks, blocks, round;
    int64_t first, start, total;  /* row 0's own posterior in the block, the block's first and all of the whole batch */
    REAL own_weight, next_weight; /* w_ij in units of the most common weight */
    double base;                  /* the logarithm of the latter */
    int stratified;
    int64_t *far;
    tensor z, mu, logvar;
    REAL *points;                  /* z [rows, D] */
    REAL *mean, *scale, *log;      /* [D, padded]: mu, s, ln s; of the padding 0, 0 and -inf */
    REAL *own_mean, *own_scale, *own_log; /* of the rows' own posteriors, those of one dimension own_padded apart */
    int64_t own_padded;
    REAL *joint, *marginal;        /* sums over posteriors, [rows] and [rows, D] */
    REAL *out[3];                  /* [rows]: the three estimates, or their incoming gradients */
    REAL *dz, *count, *one, *two;  /* [rows, D], then [D, padded]: sums over rows of w, w t and w t^2 */
} problem;

/* t and ln s - t^2 + origin. Not inlined: the backward pass needs the same bits as the forward pass, so that a posterior
 * that outweighs all others has a share of exactly 1. */
__attribute__((noinline)) static void exponents(
    const problem *p, REAL z, REAL origin, int64_t at, int n, REAL *restrict t, REAL *restrict exponent) {
    const REAL *restrict mean = p->mean + at, *restrict scale = p->scale + at, *restrict log = p->log + at;
    for (int j = 0; j < n; j++) {
        REAL u = (z - mean[j]) * scale[j];
        t[j] = u, exponent[j] = (origin + log[j]) - u * u;
    }
}

static REAL bounded(REAL x) { return x > MOST ? MOST : x < -MOST ? -MOST : x; }

/* Row i's t with its own posterior, and minus its exponents there. */
static void origins(const problem *p, int64_t i, REAL *restrict own, REAL *restrict origin) {
    for (int64_t d = 0; d < p->columns; d++) {
        int64_t at = d * p->own_padded + i;
        own[d] = (p->points[i * p->columns + d] - p->own_mean[at]) * p->own_scale[at];
        origin[d] = bounded(own[d] * own[d]) - p->own_log[at];
    }
}

/* Multiply the entries of a row's own posterior and of the next one by their weights; the rest have weight 1. */
static void weigh(const problem *p, int64_t i, int64_t start, int n, REAL *values) {
    if (!p->stratified) return;
    int64_t own = p->first + i, next = own + 1 == p->total - p->start ? -p->start : own + 1;
    if (own >= start && own < start + n) values[own - start] *= p->own_weight;
    if (next >= start && next < start + n) values[next - start] *= p->next_weight;
}

static int width_of(const problem *p, int64_t start) {
    return (int)(p->padded - start < p->width ? p->padded - start : p->width);
}

static void estimate(const problem *p, int64_t i, const REAL *own, const REAL *origin) {
    double marginals = 0, off = 0, prior = 0, joint = logarithm(p->joint[i]) + p->base;
    for (int64_t d = 0; d < p->columns; d++) {
        double z = p->points[i * p->columns + d], each = logarithm(p->marginal[i * p->columns + d]) + p->base;
        REAL square = own[d] * own[d];
        off += square - (origin[d] + p->own_log[d * p->own_padded + i]); /* rounding error */
        marginals += each, prior += (0.5 * z * z - origin[d]) + each;
    }
    p->out[0][i] = (REAL)(-joint - off), p->out[1][i] = (REAL)(joint - marginals);
    p->out[2][i] = (REAL)(prior + 0.5 * LN2 * (double)p->columns);
}

static void forward_rows(void *context, int64_t job) {
    const problem *p = context;
    int64_t last = job * ROWS + ROWS < p->rows ? job * ROWS + ROWS : p->rows;
    REAL t[WIDEST], each[WIDEST], total[WIDEST], *own = malloc(2 * (size_t)p->columns * sizeof *own);
    if (!own) { __atomic_store_n(p->far, 2, __ATOMIC_RELAXED); return; }
    REAL *origin = own + p->columns;
    for (int64_t i = job * ROWS; i < last && !__atomic_load_n(p->far, __ATOMIC_RELAXED); i++) {
        REAL *marginal = p->marginal + i * p->columns, joint = 0;
        memset(marginal, 0, (size_t)p->columns * sizeof *marginal);
        origins(p, i, own, origin);
        for (int64_t start = 0; start < p->padded; start += p->width) {
            int n = width_of(p, start);
            memset(total, 0, sizeof total);
            for (int64_t d = 0; d < p->columns; d++) {
                exponents(p, p->points[i * p->columns + d], origin[d], d * p->padded + start, n, t, each);
                for (int j = 0; j < n; j++) total[j] += each[j], each[j] = exponential(each[j]);
                weigh(p, i, start, n, each);
                marginal[d] += sum(each, n);
            }
            for (int j = 0; j < n; j++) total[j] = exponential(total[j]);
            weigh(p, i, start, n, total);
            joint += sum(total, n);
        }
        p->joint[i] = joint;
        if (!p->out[0]) continue; /* sums of a block, which may be 0 */
        int far = !(joint > 0 && joint <= MOST);
        for (int64_t d = 0; d < p->columns; d++) far |= !(marginal[d] > 0 && marginal[d] <= MOST);
        if (far) __atomic_store_n(p->far, 1, __ATOMIC_RELAXED);
        else estimate(p, i, own, origin);
    }
    free(own);
}

/* A block of rows and one of posteriors. The jobs of a round have no block in common. */
static void backward_blocks(void *context, int64_t job) {
    const problem *p = context;
    int64_t most = p->row_blocks > p->blocks ? p->row_blocks : p->blocks, other = (job + p->round) % most;
    if (job >= p->row_blocks || other >= p->blocks || __atomic_load_n(p->far, __ATOMIC_RELAXED)) return;
    int64_t last = job * ROWS + ROWS < p->rows ? job * ROWS + ROWS : p->rows, start = other * p->width, wide = p->columns;
    int n = width_of(p, start);
    REAL joint[WIDEST], part[WIDEST], *own = malloc((size_t)(wide * (2 + 2 * n)) * sizeof *own);
    if (!own) { __atomic_store_n(p->far, 2, __ATOMIC_RELAXED); return; }
    REAL *origin = own + wide, *t = origin + wide, *exponent = t + wide * n;
    for (int64_t i = job * ROWS; i < last; i++) {
        REAL dmutual = p->out[0][i], dtotal = p->out[1][i], ddimension = p->out[2][i];
        /* A row of weight 0 has gradient 0, even if it lies infinitely far from all posteriors. */
        REAL of_joint = dtotal == dmutual ? 0 : (dtotal - dmutual) / p->joint[i], of_marginal = ddimension - dtotal;
        int64_t mine = p->first + i - start;
        memset(joint, 0, sizeof joint);
        origins(p, i, own, origin);
        for (int64_t d = 0; d < wide; d++) {
            exponents(p, p->points[i * wide + d], origin[d], d * p->padded + start, n, t + d * n, exponent + d * n);
            for (int j = 0; j < n; j++) joint[j] += exponent[d * n + j];
        }
        for (int j = 0; j < n; j++) joint[j] = exponential(joint[j]) * of_joint;
        for (int64_t d = 0; d < wide; d++) {
            int64_t at = d * p->padded + start;
            const REAL *restrict scale = p->scale + at;
            REAL *restrict count = p->count + at, *restrict one = p->one + at, *restrict two = p->two + at;
            REAL *restrict each = exponent + d * n, *restrict u = t + d * n;
            REAL share = of_marginal == 0 ? 0 : of_marginal / p->marginal[i * wide + d];
            for (int j = 0; j < n; j++) each[j] = joint[j] + share * exponential(each[j]);
            weigh(p, i, start, n, each);
            if (mine >= 0 && mine < n) each[mine] += dmutual;
            for (int j = 0; j < n; j++) {
                REAL distance = bounded(u[j]), moment = each[j] * distance; /* an infinite distance has weight 0 */
                count[j] += each[j], one[j] += moment, two[j] += moment * distance, part[j] = moment * scale[j];
            }
            p->dz[i * wide + d] += sum(part, n);
        }
    }
    free(own);
}

static void read_row(const tensor *t, int64_t row, int64_t columns, REAL *buffer) {
    const REAL *values = read_tile(t, (tile){row, 0, 1, (int)columns}, buffer);
    if (values != buffer) memcpy(buffer, values, (size_t)columns * sizeof *buffer);
}

static void write_row(const tensor *t, int64_t row, int64_t columns, REAL *buffer) {
    copy_row(t, &(tile){row, 0, 1, (int)columns}, 0, buffer, 1);
}

/* mu, s and ln s of `count` posteriors, [D, padded] each. The buffer has room for two rows. */
static void read_posteriors(
    const tensor *mu, const tensor *logvar, int64_t count, int64_t padded, int64_t columns, REAL *buffer, REAL *mean) {
    REAL *scale = mean + columns * padded, *log = scale + columns * padded, *spread = buffer + columns;
    for (int64_t j = 0; j < padded; j++) {
        if (j < count) read_row(mu, j, columns, buffer), read_row(logvar, j, columns, spread);
        for (int64_t d = 0; d < columns; d++) {
            int64_t at = d * padded + j;
            REAL half = spread[d] * (REAL)-0.5;
            /* Clamped, because infinity times a difference of 0 would be NaN; ln s is exact all the same. */
            REAL root = exponential(half > MOST_LOG_SCALE ? MOST_LOG_SCALE : half) * (REAL)0.70710678118654752;
            mean[at] = j < count ? buffer[d] : 0, scale[at] = j < count ? bounded(root) : 0;
            log[at] = j < count ? half - (REAL)(0.5 * LN2) : -(REAL)INFINITY;
        }
    }
}

/* The tensors in the layout of the sweeps. Returns their memory, which has room for `more` elements at its end. */
static REAL *open_problem(problem *p, const int64_t *numbers, const int64_t *addresses, call *shape, int64_t more) {
    int whole = numbers[6] == 0; /* the rows' own posteriors are in the batch */
    *p = (problem){.rows = numbers[0], .batch = numbers[1], .first = numbers[2], .stratified = (int)numbers[4]};
    p->start = numbers[5], p->total = whole ? p->batch : numbers[6];
    *shape = open_call(numbers + 7, addresses + 2);
    p->threads = addresses[0], p->far = (int64_t *)(intptr_t)addresses[1];
    p->z = next_tensor(shape), p->mu = next_tensor(shape), p->logvar = next_tensor(shape);
    double size = (double)numbers[3], others = (double)(p->total - 1);
    p->own_weight = (REAL)(others / size), p->next_weight = (REAL)((size - others) / size);
    p->columns = shape->columns, p->padded = (p->batch + LANES - 1) / LANES * LANES;
    p->width = AREA / p->columns / LANES * LANES;
    p->width = p->width < LANES ? LANES : p->width > WIDEST ? WIDEST : p->width;
    p->row_blocks = (p->rows + ROWS - 1) / ROWS, p->blocks = (p->padded + p->width - 1) / p->width;
    int64_t each = p->columns * p->padded, all = p->rows * p->columns, own = whole ? 0 : all;
    REAL *memory = malloc((size_t)(3 * each + 3 * own + all + 2 * p->columns + more) * sizeof *memory);
    if (!memory) return NULL;
    p->mean = memory, p->scale = p->mean + each, p->log = p->scale + each, p->points = p->log + each + 3 * own;
    REAL *buffer = p->points + all;
    for (int64_t i = 0; i < p->rows; i++) read_row(&p->z, i, p->columns, p->points + i * p->columns);
    read_posteriors(&p->mu, &p->logvar, p->batch, p->padded, p->columns, buffer, p->mean);
    p->own_mean = whole ? p->mean + p->first : p->log + each, p->own_padded = whole ? p->padded : p->rows;
    p->own_scale = p->own_mean + p->columns * p->own_padded, p->own_log = p->own_scale + p->columns * p->own_padded;
    if (!whole) {
        tensor mu = next_tensor(shape), logvar = next_tensor(shape);
        read_posteriors(&mu, &logvar, p->rows, p->rows, p->columns, buffer, p->own_mean);
    }
    return memory;
}

/* Return 0, or 1 if out of memory. numbers: rows, batch, first, the size of the data set, whether weights are stratified,
 * start, total (0: the batch is whole), ndim, event, sizes, strides. addresses: threads, far, z, mu, logvar, of a block also
 * the rows' own mu and logvar, then the three estimates (of the whole batch) and the two sums. low: the logarithm of the most
 * common weight. */
int forward(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    problem p;
    call shape;
    REAL *memory = open_problem(&p, numbers, addresses, &shape, 0);
    (void)high;
    if (!memory) return 1;
    p.base = low;
    const int64_t *results = shape.addresses;
    if (numbers[6] == 0)
        for (int k = 0; k < 3; k++) p.out[k] = (REAL *)(intptr_t)*results++;
    p.joint = (REAL *)(intptr_t)results[0], p.marginal = (REAL *)(intptr_t)results[1];
    run(p.row_blocks, p.rows * p.batch * p.columns, p.threads, forward_rows, &p);
    free(memory);
    return *p.far == 2;
}

/* As forward; the tensors after the posteriors: the gradients of the estimates, dz, dmu, dlogvar; then the addresses of the
 * sums. The part of dz from the prior belongs to the block with the rows' own posteriors. */
int backward(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    problem p;
    call shape;
    int64_t rows = numbers[0], wide = numbers[10], padded = (numbers[1] + LANES - 1) / LANES * LANES, all = rows * wide;
    int64_t more = 3 * rows + all + 3 * wide * padded;
    REAL *memory = open_problem(&p, numbers, addresses, &shape, more);
    (void)low, (void)high;
    if (!memory) return 1;
    REAL *row = p.points + all, *given = row + 2 * wide;
    for (int k = 0; k < 3; k++) {
        tensor gradient = next_tensor(&shape);
        p.out[k] = given + k * rows;
        for (int64_t i = 0; i < rows; i++) read_row(&gradient, i, 1, p.out[k] + i);
    }
    tensor dz = next_tensor(&shape), dmu = next_tensor(&shape), dlogvar = next_tensor(&shape);
    p.joint = (REAL *)(intptr_t)shape.addresses[0], p.marginal = (REAL *)(intptr_t)shape.addresses[1];
    for (int64_t i = 0; i < rows; i++)
        if (!(p.joint[i] > 0)) *p.far = 1;
    p.dz = given + 3 * rows, p.count = p.dz + all, p.one = p.count + wide * padded, p.two = p.one + wide * padded;
    memset(p.dz, 0, (size_t)(all + 3 * wide * padded) * sizeof *p.dz);
    int64_t most = p.row_blocks > p.blocks ? p.row_blocks : p.blocks;
    for (p.round = 0; p.round < most; p.round++)
        run(p.row_blocks, rows * p.batch * wide / most, p.threads, backward_blocks, &p);
    for (int64_t i = 0; i < rows && !*p.far; i++) {
        REAL of_prior = p.first >= 0 && p.first < p.batch ? p.out[2][i] : 0;
        for (int64_t d = 0; d < wide; d++) row[d] = of_prior * p.points[i * wide + d] - 2 * p.dz[i * wide + d];
        write_row(&dz, i, wide, row);
    }
    for (int64_t j = 0; j < p.batch && !*p.far; j++) {
        for (int64_t d = 0; d < wide; d++) {
            int64_t at = d * padded + j;
            row[d] = 2 * p.scale[at] * p.one[at], row[wide + d] = p.two[at] - (REAL)0.5 * p.count[at];
        }
        write_row(&dmu, j, wide, row), write_row(&dlogvar, j, wide, row + wide);
    }
    free(memory);
    return *p.far == 2;
}
