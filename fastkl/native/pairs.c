/* Sums of a kernel over the pairs of two batches, and their gradients, on a CPU: the squared MMD.
 *
 * The points are cut into blocks. A job takes a pair of blocks: the squared distances by differences, as in the definition,
 * the kernel and its slope, and the gradients of both blocks. As in a tournament, the jobs of a round have no block in
 * common, so that each adds to its own rows of the gradients, in an order that does not depend on the threads. */

#include "functions.h"
#include "tiles.h"

enum { IMQ, RBF };
#define BYTES 64                            /* of a vector; the compiler splits it where the machine has shorter ones */
#define LANES (BYTES / (int)sizeof(REAL))   /* also the dimensions of a step */
#define SIDE (512 / (int)sizeof(REAL))      /* points of a block at most: its pairs take 64 KiB or less */
#define ROWS 4                              /* rows that share each load */
typedef REAL vector __attribute__((vector_size(BYTES)));
#define ALIGNED __attribute__((aligned(BYTES)))

enum { BETWEEN = 2 }; /* instead of `unbiased`: only the pairs of a point of x with one of y */
typedef struct { int64_t first; int count, side; } block; /* side: 0 for points of x, 1 for points of y */
typedef struct {
    int kernel, unbiased, scales;
    const int64_t *scale; /* the bits of a double each */
    int64_t rows[2], columns, threads, blocks[2], round;
    tensor points[2];
    REAL *gradient[2]; /* contiguous; NULL where it is not wanted */
    double *values;    /* of the jobs of a round */
} problem;

static double weight_of(const problem *p, int a, int b) {
    double n = (double)p->rows[a], m = (double)p->rows[b];
    return a == b ? 1 / (p->unbiased ? n * (n - 1) : n * n) : -1 / (n * m);
}

/* Blocks of about equal size, those of x first. */
static block block_of(const problem *p, int64_t index) {
    int side = index >= p->blocks[0];
    int64_t rows = p->rows[side], step = (rows + p->blocks[side] - 1) / p->blocks[side];
    int64_t first = (side ? index - p->blocks[0] : index) * step, rest = rows - first;
    return (block){first, (int)(rest < step ? rest : step), side};
}

/* A block's points in some dimensions, [SIDE, LANES]; zeros complete it. */
static void load(const problem *p, block b, int64_t column, REAL *restrict out) {
    REAL own[SIDE * LANES];
    int columns = (int)(p->columns - column < LANES ? p->columns - column : LANES);
    const REAL *values = read_tile(&p->points[b.side], (tile){b.first, column, b.count, columns}, own);
    memset(out, 0, sizeof(REAL) * SIDE * LANES);
    for (int i = 0; i < b.count; i++) memcpy(out + i * LANES, values + i * columns, (size_t)columns * sizeof *out);
}

/* distances [SIDE, SIDE] += the squares of a - b in LANES dimensions; b is transposed. */
static void add_squares(const REAL *restrict a, const REAL *restrict b, int rows, int others, REAL *restrict distances) {
    for (int i = 0; i < rows; i += ROWS)
        for (int j = 0; j < others; j += LANES) {
            vector total[ROWS];
            for (int r = 0; r < ROWS; r++) memcpy(&total[r], distances + (i + r) * SIDE + j, BYTES);
            for (int d = 0; d < LANES; d++) {
                vector other;
                memcpy(&other, b + d * SIDE + j, BYTES);
                for (int r = 0; r < ROWS; r++) {
                    vector u = a[(i + r) * LANES + d] - other;
                    total[r] += u * u;
                }
            }
            for (int r = 0; r < ROWS; r++) memcpy(distances + (i + r) * SIDE + j, &total[r], BYTES);
        }
}

/* The sum of the kernel at t = d^2 / (2 D) of a row's pairs, and its slopes in place of the squared distances. */
static REAL kernel_of(const problem *p, REAL *restrict t, int n) {
    REAL value[SIDE] ALIGNED = {0}, slope[SIDE] ALIGNED = {0}, half = (REAL)(0.5 / (double)p->columns);
    for (int j = 0; j < n; j++) t[j] *= half;
    for (int k = 0; k < p->scales; k++) {
        double scale;
        memcpy(&scale, p->scale + k, sizeof scale);
        REAL s = (REAL)scale, inverse = (REAL)(1 / scale);
        if (p->kernel == IMQ)
            for (int j = 0; j < n; j++) {
                REAL root = 1 / (t[j] + s), term = s * root;
                value[j] += term, slope[j] -= term * root;
            }
        else
            for (int j = 0; j < n; j++) {
                REAL term = exponential(-t[j] * inverse);
                value[j] += term, slope[j] -= term * inverse;
            }
    }
    memcpy(t, slope, (size_t)n * sizeof *t);
    return sum(value, n);
}

/* da_i += sum_j slope_ij (a_i - b_j) and, unless db is NULL, db_j the opposite, in LANES dimensions. */
static void add_slopes(
    const REAL *restrict slope, const REAL *restrict a, const REAL *restrict b, int rows, int others, REAL *restrict da,
    REAL *restrict db) {
    for (int i = 0; i < rows; i += ROWS) {
        vector own[ROWS], total[ROWS];
        for (int r = 0; r < ROWS; r++) memcpy(&own[r], a + (i + r) * LANES, BYTES), total[r] = (vector){0};
        for (int j = 0; j < others; j++) {
            vector other, back = {0};
            memcpy(&other, b + j * LANES, BYTES);
            if (db) memcpy(&back, db + j * LANES, BYTES);
            for (int r = 0; r < ROWS; r++) {
                vector u = own[r] - other;
                REAL weight = slope[(i + r) * SIDE + j];
                total[r] += weight * u;
                if (db) back -= weight * u;
            }
            if (db) memcpy(db + j * LANES, &back, BYTES);
        }
        for (int r = 0; r < ROWS; r++) memcpy(da + (i + r) * LANES, &total[r], BYTES);
    }
}

static void add_to(const problem *p, block b, int64_t column, double weight, const REAL *values) {
    int columns = (int)(p->columns - column < LANES ? p->columns - column : LANES);
    REAL *out = p->gradient[b.side] + b.first * p->columns + column, factor = (REAL)(2 * weight / (double)p->columns);
    for (int i = 0; i < b.count; i++)
        for (int d = 0; d < columns; d++) out[i * p->columns + d] += factor * values[i * LANES + d];
}

/* The weighted kernel of a pair of blocks; adds their gradients. */
static double pair(const problem *p, block a, block b) {
    REAL t[SIDE * SIDE] ALIGNED, first[SIDE * LANES] ALIGNED, second[SIDE * LANES] ALIGNED, across[SIDE * LANES] ALIGNED;
    int same = a.side == b.side && a.first == b.first;
    if (!p->gradient[a.side]) { block other = a; a = b, b = other; } /* the gradient of a is wanted if one is */
    int rows = (a.count + ROWS - 1) / ROWS * ROWS, others = (b.count + LANES - 1) / LANES * LANES;
    double weight = weight_of(p, a.side, b.side), total = 0;
    for (int i = 0; i < rows; i++) memset(t + i * SIDE, 0, (size_t)others * sizeof *t);
    for (int64_t column = 0; column < p->columns; column += LANES) {
        load(p, a, column, first), load(p, b, column, second);
        for (int d = 0; d < LANES; d++)
            for (int j = 0; j < others; j++) across[d * SIDE + j] = second[j * LANES + d];
        add_squares(first, across, rows, others, t);
    }
    for (int i = 0; i < a.count; i++) {
        /* At an infinite distance kernel and slope are 0: the point itself, and the padding. */
        if (same) t[i * SIDE + i] = (REAL)INFINITY;
        for (int j = b.count; j < others; j++) t[i * SIDE + j] = (REAL)INFINITY;
        total += kernel_of(p, t + i * SIDE, others);
    }
    for (int i = a.count; i < rows; i++) memset(t + i * SIDE, 0, (size_t)others * sizeof *t);
    if (!p->gradient[a.side]) return weight * (same ? total : 2 * total);
    int both = !same && p->gradient[b.side];
    REAL *da = across, db[SIDE * LANES] ALIGNED;
    for (int64_t column = 0; column < p->columns; column += LANES) {
        load(p, a, column, first), load(p, b, column, second);
        if (both) memset(db, 0, sizeof db);
        add_slopes(t, first, second, rows, b.count, da, both ? db : NULL);
        add_to(p, a, column, weight, da);
        if (both) add_to(p, b, column, weight, db);
    }
    return weight * (same ? total : 2 * total);
}

/* Job k of a round of a tournament of `count` blocks, an even number: the last one stays, the others move in a circle. */
static void play(void *context, int64_t job) {
    const problem *p = context;
    int64_t blocks = p->blocks[0] + p->blocks[1], count = blocks + blocks % 2, others = count - 1;
    int64_t one = job ? (p->round + job) % others : others, two = (p->round - job + others) % others;
    if (p->round < 0) one = two = job; /* each block with itself */
    int within = (one < p->blocks[0]) == (two < p->blocks[0]);
    int none = one >= blocks || two >= blocks || (within && p->unbiased == BETWEEN);
    p->values[job] = none ? 0 : pair(p, block_of(p, one), block_of(p, two));
}

/* Returns 0, or 1 if out of memory. numbers: kernel, whether the estimate is unbiased or BETWEEN, rows of x and of y, the
 * number of scales, the scales, ndim, event, sizes, strides. addresses: threads, x, y, their gradients, the value. */
int mmd(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    problem p = {.kernel = (int)numbers[0], .unbiased = (int)numbers[1], .scales = (int)numbers[4], .scale = numbers + 5};
    call shape = open_call(numbers + 5 + p.scales, addresses + 1);
    (void)low, (void)high;
    p.columns = shape.columns, p.threads = addresses[0];
    double *value = (double *)(intptr_t)addresses[5];
    *value = 0;
    for (int side = 0; side < 2; side++) {
        p.rows[side] = numbers[2 + side], p.blocks[side] = (p.rows[side] + SIDE - 1) / SIDE;
        p.points[side] = next_tensor(&shape);
        p.gradient[side] = (REAL *)(intptr_t)addresses[3 + side];
        if (p.gradient[side]) memset(p.gradient[side], 0, (size_t)(p.rows[side] * p.columns) * sizeof(REAL));
        if (!p.unbiased && p.rows[side]) *value += p.scales * (double)p.rows[side] * weight_of(&p, side, side);
    }
    int64_t blocks = p.blocks[0] + p.blocks[1], half = (blocks + 1) / 2, all = p.rows[0] + p.rows[1];
    if (!(p.values = malloc((size_t)blocks * sizeof *p.values))) return 1;
    for (p.round = -1; p.round < 2 * half - 1; p.round++) {
        int64_t jobs = p.round < 0 ? blocks : half;
        run(jobs, all * all / (2 * half) * p.columns, p.threads, play, &p);
        for (int64_t job = 0; job < jobs; job++) *value += p.values[job];
    }
    free(p.values);
    return 0;
}
