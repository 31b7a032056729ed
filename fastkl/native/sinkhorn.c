/* Sinkhorn's potentials of two small sets of points on a CPU: all updates in one call, with the costs in memory.
 *
 * An update is f_i = -eps ln sum_j b_j exp((g_j - C_ij) / eps). The exponents are computed in double relative to the old
 * f_i / eps, which is near the result: then one exponential of a REAL for each pair suffices. A row whose sum leaves the
 * range where that is exact is computed again relative to its largest exponent. */

#include "functions.h"
#include "tiles.h"

#define LEAST_SUM 1e-20
#define MOST_SUM 1e20
#define ROWS 16 /* of a job */

typedef struct {
    const REAL *points, *others; /* [rows, columns]; the other points, [columns, count] */
    const double *cost, *outer;  /* [rows, count]; the old potentials of these points */
    const double *inner;         /* the old potentials of the other points */
    const REAL *weights;         /* of the other points */
    double *terms;               /* [count]: g_j / eps, -inf for a weight of 0 */
    int64_t rows, count, columns;
    double eps;
    double *found, *pull; /* costs, or new potentials [rows]; x_i - sum_j pi_ij y_j [rows, columns], or NULL */
    REAL *shares;         /* [jobs, count] */
} update;

/* b_j exp(terms - cost / eps - origin) in `shares`, and their sum */
static double shares_of(const update *u, const double *restrict cost, double origin, REAL *restrict shares) {
    const double *restrict terms = u->terms;
    double total = 0, each = 1 / u->eps;
    for (int64_t j = 0; j < u->count; j++) shares[j] = (REAL)((terms[j] - cost[j] * each) - origin);
    for (int64_t j = 0; j < u->count; j++) shares[j] = u->weights[j] * exponential(shares[j]);
    for (int64_t j = 0; j < u->count; j += TILE) total += sum(shares + j, (int)(u->count - j < TILE ? u->count - j : TILE));
    return total;
}

static double largest(const update *u, const double *cost) {
    double most = -INFINITY, each = 1 / u->eps;
    for (int64_t j = 0; j < u->count; j++) {
        double exponent = u->terms[j] - cost[j] * each;
        most = exponent > most ? exponent : most;
    }
    return most;
}

/* Sums of at most FEW + LANES terms are REALs, and sums of these are double. */
#define FEW 64
#define LANES 16
static void pull_row(const update *u, int64_t row, const REAL *restrict shares, double total) {
    const REAL *x = u->points + row * u->columns;
    for (int64_t d = 0; d < u->columns; d++) {
        const REAL *restrict y = u->others + d * u->count, own = x[d];
        double pull = 0;
        for (int64_t first = 0; first < u->count; first += FEW * LANES) {
            REAL sums[LANES] = {0};
            int64_t end = u->count - first < FEW * LANES ? u->count : first + FEW * LANES, j = first;
            for (; j + LANES <= end; j += LANES)
                for (int k = 0; k < LANES; k++) sums[k] += shares[j + k] * (own - y[j + k]);
            for (int k = 0; j < end; j++, k++) sums[k] += shares[j] * (own - y[j]);
            pull += sum(sums, LANES);
        }
        u->pull[row * u->columns + d] = pull / total;
    }
}

static void update_rows(void *context, int64_t job) {
    const update *u = context;
    REAL *shares = u->shares + job * u->count;
    int64_t end = (job + 1) * ROWS < u->rows ? (job + 1) * ROWS : u->rows;
    for (int64_t row = job * ROWS; row < end; row++) {
        const double *cost = u->cost + row * u->count;
        double origin = -u->outer[row] / u->eps, total = shares_of(u, cost, origin, shares);
        if (!(total > LEAST_SUM && total < MOST_SUM)) origin = largest(u, cost), total = shares_of(u, cost, origin, shares);
        u->found[row] = -u->eps * (origin + log(total));
        if (u->pull) pull_row(u, row, shares, total);
    }
}

static void apply(update *u, double eps, double *found, double *pull, int64_t threads) {
    u->eps = eps, u->found = found, u->pull = pull;
    for (int64_t j = 0; j < u->count; j++) u->terms[j] = u->weights[j] > 0 ? u->inner[j] / eps : -INFINITY;
    run((u->rows + ROWS - 1) / ROWS, 8 * u->rows * u->count, threads, update_rows, u);
}

static void cost_rows(void *context, int64_t job) {
    const update *u = context;
    int64_t end = (job + 1) * ROWS < u->rows ? (job + 1) * ROWS : u->rows;
    for (int64_t row = job * ROWS; row < end; row++) {
        double *restrict cost = u->found + row * u->count;
        memset(cost, 0, (size_t)u->count * sizeof *cost);
        for (int64_t d = 0; d < u->columns; d++) {
            const REAL *restrict y = u->others + d * u->count;
            double x = u->points[row * u->columns + d];
            for (int64_t j = 0; j < u->count; j++) cost[j] += (x - (double)y[j]) * (x - (double)y[j]);
        }
        for (int64_t j = 0; j < u->count; j++) cost[j] /= 2;
    }
}

/* The costs of the first of two updates, whose pairs are those of the second. */
static void turn_rows(void *context, int64_t job) {
    const update *u = context, *turned = u + 1;
    int64_t first = job * ROWS, end = (job + 1) * ROWS < u->rows ? (job + 1) * ROWS : u->rows;
    for (int64_t i = 0; i < u->count; i++)
        for (int64_t row = first; row < end; row++) u->found[row * u->count + i] = turned->cost[i * u->rows + row];
}

/* [columns, rows] from [rows, columns] */
static void transpose(const REAL *restrict from, int64_t rows, int64_t columns, REAL *restrict to) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t j = 0; j < columns; j++) to[j * rows + i] = from[i * columns + j];
}

static void average(double *restrict potential, const double *restrict next, int64_t count) {
    for (int64_t i = 0; i < count; i++) potential[i] = (potential[i] + next[i]) / 2;
}

/* numbers: rows of x and y, columns, temperatures, whether y is x. addresses: the number of threads, x, y, their
 * weights, the temperatures as double; then results as double: both potentials, both pulls or 0. The results for y are
 * not written if it is x. Returns 0, or 1 if out of memory. */
int potentials(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    int64_t n = numbers[0], m = numbers[1], columns = numbers[2], steps = numbers[3], same = numbers[4];
    int64_t threads = addresses[0], jobs = ((n > m ? n : m) + ROWS - 1) / ROWS, wide = n > m ? n : m;
    const REAL *x = (REAL *)(intptr_t)addresses[1], *y = (REAL *)(intptr_t)addresses[2];
    const REAL *a = (REAL *)(intptr_t)addresses[3], *b = (REAL *)(intptr_t)addresses[4];
    const double *schedule = (double *)(intptr_t)addresses[5];
    double *result[2] = {(double *)(intptr_t)addresses[6], (double *)(intptr_t)addresses[7]};
    double *pull[2] = {(double *)(intptr_t)addresses[8], (double *)(intptr_t)addresses[9]};
    (void)low, (void)high;
    double *cost = malloc((size_t)((same ? 1 : 2) * n * m + 2 * (n + m) + wide) * sizeof *cost);
    REAL *shares = malloc((size_t)(jobs * wide + (n + m) * columns) * sizeof *shares);
    if (!cost || !shares) { free(cost), free(shares); return 1; }
    double *across = same ? cost : cost + n * m, *f = across + n * m, *g = same ? f : f + n;
    double *new_f = g + m, *new_g = same ? new_f : new_f + n, *terms = new_g + m;
    REAL *y_across = shares + jobs * wide, *x_across = same ? y_across : y_across + m * columns;
    transpose(y, m, columns, y_across);
    if (!same) transpose(x, n, columns, x_across);
    update of_x = {.points = x, .others = y_across, .cost = cost, .inner = g, .outer = f, .weights = b, .terms = terms,
                   .rows = n, .count = m, .columns = columns, .found = cost, .shares = shares};
    update of_y = {.points = y, .others = x_across, .cost = across, .inner = f, .outer = g, .weights = a, .terms = terms,
                   .rows = m, .count = n, .columns = columns, .found = across, .shares = shares};
    run((n + ROWS - 1) / ROWS, n * m * columns, threads, cost_rows, &of_x);
    if (!same) run((m + ROWS - 1) / ROWS, n * m, threads, turn_rows, (update[]){of_y, of_x});
    for (int64_t i = 0; i < n; i++) f[i] = 0;
    for (int64_t j = 0; j < m; j++) g[j] = 0;
    for (int64_t step = -1; step < steps; step++) {
        double eps = schedule[step < 0 ? 0 : step];
        apply(&of_x, eps, new_f, NULL, threads);
        if (!same) apply(&of_y, eps, new_g, NULL, threads);
        if (step < 0) { /* the first potentials replace the zeros */
            memcpy(f, new_f, (size_t)n * sizeof *f);
            if (!same) memcpy(g, new_g, (size_t)m * sizeof *g);
            continue;
        }
        average(f, new_f, n);
        if (!same) average(g, new_g, m);
    }
    apply(&of_x, schedule[steps - 1], result[0], pull[0], threads);
    if (!same) apply(&of_y, schedule[steps - 1], result[1], pull[1], threads);
    free(cost), free(shares);
    return 0;
}
