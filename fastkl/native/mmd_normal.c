/* The RBF kernel between Gaussian posteriors, summed over their pairs and several scales, and its gradients, on a CPU.
 * fastkl.ops.pairs._mmd_posteriors has the formulas. Every row of pairs is a piece of work, with any number of threads.
 * Pairs are computed in both orders, so that each row has its own gradients. */

#include "functions.h"
#include "tiles.h"

#define SIDE 256 /* posteriors of a step: its sums for eight scales stay in the first cache */
#define MOST_SCALES 16
#define FAR (REAL)1e30 /* a larger square would overflow, and 0 times infinity be NaN; the kernel is 0 there */
#ifdef FLOAT64
#define SQUARE_ROOT sqrt
#else
#define SQUARE_ROOT sqrtf
#endif

typedef struct {
    int scales, unbiased;
    int64_t rows, columns;
    REAL inverse[MOST_SCALES]; /* 1 / g */
    const REAL *mean, *variance; /* [columns, rows] */
    REAL *dmean, *dvariance; /* [columns, rows], or NULL */
    double *totals; /* [rows] */
} problem;

/* The kernels of row i and n others, from `first` on, for each scale: [scales, SIDE]. */
static void kernels(const problem *p, int64_t i, int64_t first, int n, REAL kernel[][SIDE]) {
    REAL quadratic[MOST_SCALES][SIDE], square[SIDE], width[SIDE];
    for (int s = 0; s < p->scales; s++)
        for (int j = 0; j < n; j++) kernel[s][j] = 1, quadratic[s][j] = 0;
    for (int64_t d = 0; d < p->columns; d++) {
        const REAL *restrict m = p->mean + d * p->rows, *restrict v = p->variance + d * p->rows;
        REAL own = m[i], spread = v[i];
        for (int j = 0; j < n; j++) {
            REAL u = own - m[first + j];
            square[j] = u * u < FAR ? u * u : FAR, width[j] = spread + v[first + j];
        }
        for (int s = 0; s < p->scales; s++) {
            REAL inverse = p->inverse[s], *restrict k = kernel[s], *restrict q = quadratic[s];
            for (int j = 0; j < n; j++) {
                REAL r = 1 / (1 + width[j] * inverse);
                k[j] *= r, q[j] += square[j] * r; /* the product underflows only if the kernel is negligible */
            }
        }
    }
    for (int s = 0; s < p->scales; s++)
        for (int j = 0; j < n; j++)
            kernel[s][j] = SQUARE_ROOT(kernel[s][j]) * exponential((REAL)-0.5 * quadratic[s][j] * p->inverse[s]);
}

/* Add to the gradients of row i those of its pairs with n others. */
static void add_gradients(const problem *p, int64_t i, int64_t first, int n, REAL kernel[][SIDE]) {
    REAL square[SIDE], width[SIDE], difference[SIDE], pull[SIDE], widen[SIDE];
    for (int64_t d = 0; d < p->columns; d++) {
        const REAL *restrict m = p->mean + d * p->rows, *restrict v = p->variance + d * p->rows;
        REAL own = m[i], spread = v[i];
        for (int j = 0; j < n; j++) {
            difference[j] = own - m[first + j];
            REAL exact = difference[j] * difference[j];
            square[j] = exact < FAR ? exact : FAR, width[j] = spread + v[first + j], pull[j] = widen[j] = 0;
        }
        for (int s = 0; s < p->scales; s++) {
            REAL inverse = p->inverse[s];
            const REAL *restrict k = kernel[s];
            for (int j = 0; j < n; j++) {
                REAL r = 1 / (1 + width[j] * inverse), weighed = k[j] * r * inverse;
                pull[j] += weighed, widen[j] += weighed * (square[j] * r * inverse - 1);
            }
        }
        for (int j = 0; j < n; j++) pull[j] *= difference[j];
        p->dmean[d * p->rows + i] -= 2 * sum(pull, n);
        p->dvariance[d * p->rows + i] += sum(widen, n);
    }
}

static void row_job(void *context, int64_t i) {
    const problem *p = context;
    REAL kernel[MOST_SCALES][SIDE];
    double n = (double)p->rows, weight = 1 / (p->unbiased ? n * (n - 1) : n * n);
    p->totals[i] = 0;
    for (int64_t d = 0; p->dmean && d < p->columns; d++) p->dmean[d * p->rows + i] = p->dvariance[d * p->rows + i] = 0;
    for (int64_t first = 0; first < p->rows; first += SIDE) {
        int count = (int)(p->rows - first < SIDE ? p->rows - first : SIDE);
        kernels(p, i, first, count, kernel);
        for (int s = 0; s < p->scales; s++) {
            if (p->unbiased && i >= first && i < first + count) kernel[s][i - first] = 0;
            for (int j = 0; j < count; j++) kernel[s][j] *= (REAL)weight;
            p->totals[i] += sum(kernel[s], count);
        }
        if (p->dmean) add_gradients(p, i, first, count, kernel);
    }
}

/* numbers: rows, columns, whether pairs of a posterior with itself are left out, the number of scales, and the bits of 1 / g
 * as double for each. addresses: the number of threads; means and variances [columns, rows]; their gradients or 0; room for
 * a double per row; the sum as double. */
int mmd_normal(const int64_t *numbers, const int64_t *addresses, double low, double high) {
    problem p = {.rows = numbers[0], .columns = numbers[1], .unbiased = (int)numbers[2], .scales = (int)numbers[3]};
    (void)low, (void)high;
    for (int s = 0; s < p.scales; s++) {
        double inverse;
        memcpy(&inverse, numbers + 4 + s, sizeof inverse);
        p.inverse[s] = (REAL)inverse;
    }
    p.mean = (REAL *)(intptr_t)addresses[1], p.variance = (REAL *)(intptr_t)addresses[2];
    p.dmean = (REAL *)(intptr_t)addresses[3], p.dvariance = (REAL *)(intptr_t)addresses[4];
    p.totals = (double *)(intptr_t)addresses[5];
    run(p.rows, p.rows * p.rows * p.columns, addresses[0], row_job, &p);
    double total = 0;
    for (int64_t i = 0; i < p.rows; i++) total += p.totals[i];
    *(double *)(intptr_t)addresses[6] = total;
    return 0;
}
