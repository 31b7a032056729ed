/* Strided tensors as tiles of rows by columns that fit the first cache.
 *
 * A call is two lists of int64, which Python packs with struct. The first depends only on the shapes: ndim, event, the
 * sizes, and for each tensor its element kind and its strides. The second has the tensors' addresses, 0 for an absent one.
 * The last `event` dimensions are the columns, the others the rows. */

#ifndef FASTKL_TILES_H
#define FASTKL_TILES_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif

#include "functions.h"
#include "halves.h"

#define MOST_DIMS 8
#define TILE 1024   /* elements */
#define CHUNK 8192  /* elements of a piece of work; pieces do not depend on the number of threads */
#define GRAIN 32768 /* elements from which a second thread pays; torch's figure */

typedef struct { int dims; int64_t size[MOST_DIMS], stride[MOST_DIMS]; } axis; /* neighbouring dimensions merged */
typedef struct { char *data; int kind; axis rows, columns; } tensor; /* kind: of halves.h */
typedef struct { const int64_t *strides, *addresses, *sizes; int ndim, event; int64_t rows, columns; } call;
typedef struct { int64_t row, column; int rows, columns; } tile;

static call open_call(const int64_t *numbers, const int64_t *addresses) {
    call c = {numbers + 2 + numbers[0], addresses, numbers + 2, (int)numbers[0], (int)numbers[1], 1, 1};
    for (int d = 0; d < c.ndim; d++) *(d < c.ndim - c.event ? &c.rows : &c.columns) *= c.sizes[d];
    return c;
}

static axis merge(const int64_t *sizes, const int64_t *strides, int dims) {
    axis merged = {.dims = 1, .size = {1}, .stride = {1}};
    for (int d = 0; d < dims; d++) {
        int last = merged.dims - 1;
        if (sizes[d] == 1) continue;
        if (merged.size[last] == 1 || merged.stride[last] == sizes[d] * strides[d]) {
            merged.size[last] *= sizes[d], merged.stride[last] = strides[d];
        } else {
            merged.size[merged.dims] = sizes[d], merged.stride[merged.dims++] = strides[d];
        }
    }
    return merged;
}

static tensor next_tensor(call *c) {
    const int64_t *strides = c->strides + 1;
    int batch = c->ndim - c->event;
    tensor t = {.data = (char *)(intptr_t)*c->addresses++, .kind = (int)*c->strides};
    if (t.data) t.rows = merge(c->sizes, strides, batch), t.columns = merge(c->sizes + batch, strides + batch, c->event);
    c->strides += c->ndim + 1;
    return t;
}

static inline int64_t bytes(const tensor *t) { return t->kind == WHOLE ? (int64_t)sizeof(REAL) : 2; }

static inline int64_t offset(const axis *a, int64_t index) {
    if (a->dims == 1) return index * a->stride[0];
    int64_t at = 0;
    for (int d = a->dims - 1; d >= 0; d--) at += index % a->size[d] * a->stride[d], index /= a->size[d];
    return at;
}

/* The first element of a tile. */
static inline void *place(const tensor *t, const tile *at) {
    return t->data + (offset(&t->rows, at->row) + offset(&t->columns, at->column)) * bytes(t);
}

/* Whether the tile is contiguous. */
static inline int in_one_piece(const tensor *t, const tile *at) {
    int line = at->columns == 1; /* a single column: its stride does not matter */
    if (!line && (t->columns.dims > 1 || t->columns.stride[0] != 1)) return 0;
    if (at->rows == 1) return 1;
    return t->rows.dims == 1 && t->rows.stride[0] == at->columns && (line || at->columns == t->columns.size[0]);
}

/* One row of a tile, from a strided tensor or (`out`) to it. */
__attribute__((noinline)) static void copy_row(const tensor *t, const tile *at, int row, REAL *buffer, int out) {
    const axis *columns = &t->columns;
    char *data = t->data + offset(&t->rows, at->row + row) * bytes(t);
    int last = columns->dims - 1;
    int64_t inner = columns->size[last], stride = columns->stride[last];
    for (int done = 0; done < at->columns;) {
        int64_t column = at->column + done, within = column % inner;
        int count = (int)(inner - within < at->columns - done ? inner - within : at->columns - done);
        void *start = data + offset(columns, column) * bytes(t);
        REAL *from = start, *to = buffer + done;
        if (t->kind != WHOLE && out) store_halves(t->kind, start, stride, to, count);
        else if (t->kind != WHOLE) load_halves(t->kind, start, stride, to, count);
        else if (out && stride == 1) memcpy(from, to, (size_t)count * sizeof *to);
        else if (out) for (int i = 0; i < count; i++) from[i * stride] = to[i];
        else if (stride == 1) memcpy(to, from, (size_t)count * sizeof *to);
        else if (stride == 0) for (int i = 0; i < count; i++) to[i] = *from;
        else for (int i = 0; i < count; i++) to[i] = from[i * stride];
        done += count;
    }
}

/* All rows of a tile. */
static void copy_rows(const tensor *t, const tile *at, REAL *buffer, int out) {
    int n = at->columns, count = at->rows * n;
    int64_t down = t->rows.dims == 1 ? t->rows.stride[0] : -1, along = t->columns.stride[0];
    if (down == 0 && !out) { /* one row for all */
        copy_row(t, at, 0, buffer, 0);
        for (int done = n; done < count; done *= 2)
            memcpy(buffer + done, buffer, (size_t)(done < count - done ? done : count - done) * sizeof *buffer);
    } else if (down >= 0 && t->columns.dims == 1 && n < 16) { /* short rows, for which copy_row has too much overhead */
        char *start = place(t, at);
        for (int row = 0; row < at->rows; row++, buffer += n, start += down * bytes(t)) {
            REAL *data = (REAL *)start;
            if (t->kind != WHOLE && out) store_halves(t->kind, (uint16_t *)start, along, buffer, n);
            else if (t->kind != WHOLE) load_halves(t->kind, (uint16_t *)start, along, buffer, n);
            else if (out) for (int i = 0; i < n; i++) data[i * along] = buffer[i];
            else for (int i = 0; i < n; i++) buffer[i] = data[i * along];
        }
    } else
        for (int row = 0; row < at->rows; row++) copy_row(t, at, row, buffer + row * n, out);
}

/* The tile's elements, in place if contiguous, else copied to `buffer`. */
__attribute__((noinline)) static const REAL *read_tile(const tensor *t, tile at, REAL *buffer) {
    const void *start = place(t, &at);
    int line = at.columns == 1 && t->rows.dims == 1, piece = in_one_piece(t, &at);
    if (piece && t->kind == WHOLE) return start;
    if (piece && t->kind != WHOLE) return load_halves(t->kind, start, 1, buffer, at.rows * at.columns), buffer;
    if (line && t->kind != WHOLE) return load_halves(t->kind, start, t->rows.stride[0], buffer, at.rows), buffer;
    if (line) {
        const REAL *from = start;
        for (int i = 0; i < at.rows; i++) buffer[i] = from[i * t->rows.stride[0]];
        return buffer;
    }
    copy_rows(t, &at, buffer, 0);
    return buffer;
}

/* The place to write the tile's elements to; if it is `buffer`, write_tile copies it to the tensor. */
static REAL *target_tile(const tensor *t, tile at, REAL *buffer) {
    return t->kind == WHOLE && in_one_piece(t, &at) ? place(t, &at) : buffer;
}

static void write_tile(const tensor *t, tile at, REAL *from, const REAL *buffer) {
    if (from != buffer) return;
    if (t->kind != WHOLE && in_one_piece(t, &at)) {
        store_halves(t->kind, place(t, &at), 1, from, at.rows * at.columns);
        return;
    }
    copy_rows(t, &at, from, 1);
}

/* The division of the work into pieces, by shape only: groups of rows, and chunks of columns for long rows. */
typedef struct { int64_t rows, columns, rows_each, columns_each, chunks, jobs; int tile_rows, tile_columns; } pieces;

static pieces cut(const call *c, int64_t rows_each, int64_t columns_each) {
    pieces p = {.rows = c->rows, .columns = c->columns, .rows_each = rows_each, .columns_each = columns_each};
    p.chunks = (c->columns + columns_each - 1) / columns_each;
    p.jobs = (c->rows + rows_each - 1) / rows_each * p.chunks;
    p.tile_columns = (int)(columns_each < TILE ? columns_each : TILE);
    p.tile_rows = p.tile_columns < c->columns ? 1 : TILE / p.tile_columns;
    return p;
}

/* Pieces for sums over columns: whole rows, or the chunks of a long row. */
static pieces cut_rows(const call *c) {
    if (c->columns > CHUNK) return cut(c, 1, CHUNK);
    int64_t rows = CHUNK / c->columns, tile_rows = c->columns < TILE ? TILE / c->columns : 1;
    return cut(c, (rows + tile_rows - 1) / tile_rows * tile_rows, c->columns);
}

/* Pieces for sums over rows: at most 64 groups of rows, by tiles of columns. */
static pieces cut_columns(const call *c) {
    int64_t columns = c->columns < TILE ? c->columns : TILE, rows = CHUNK / columns;
    if (rows < (c->rows + 63) / 64) rows = (c->rows + 63) / 64;
    return cut(c, rows, columns);
}

/* The tiles of a piece that are left; next_tile takes one. */
typedef struct { int64_t row, row_end, column, column_end, column_start; const pieces *of; } region;

static region piece(const pieces *p, int64_t job) {
    int64_t row = job / p->chunks * p->rows_each, column = job % p->chunks * p->columns_each;
    region r = {row, row + p->rows_each, column, column + p->columns_each, column, p};
    if (r.row_end > p->rows) r.row_end = p->rows;
    if (r.column_end > p->columns) r.column_end = p->columns;
    return r;
}

/* Request large pages for a large result. It is newly mapped memory, whose writes mostly cost a page fault every 4 KiB;
 * large pages give 512 times fewer faults, if the system lets programs choose. Smaller blocks are reused by glibc and
 * already mapped; requesting large pages for them took longer. The memory between elements of a non-contiguous tensor
 * belongs to the same storage. */
#define LARGE_PAGE (2 << 20) /* bytes */
#define FRESH (32 << 20)     /* bytes; glibc maps a new block of this size or more for each allocation */
static void expect_writes(const tensor *t) {
#ifdef MADV_HUGEPAGE
    if (!t->data) return;
    int64_t extent = 1;
    const axis *axes[2] = {&t->rows, &t->columns};
    for (int k = 0; k < 2; k++)
        for (int d = 0; d < axes[k]->dims; d++) extent += (axes[k]->size[d] - 1) * axes[k]->stride[d];
    if (extent * bytes(t) < FRESH) return;
    uintptr_t begin = ((uintptr_t)t->data + LARGE_PAGE - 1) / LARGE_PAGE * LARGE_PAGE;
    uintptr_t end = (uintptr_t)(t->data + extent * bytes(t)) / LARGE_PAGE * LARGE_PAGE;
    madvise((void *)begin, end - begin, MADV_HUGEPAGE); /* a failure is harmless */
#else
    (void)t;
#endif
}

static tensor next_result(call *c) {
    tensor t = next_tensor(c);
    expect_writes(&t);
    return t;
}

static int next_tile(region *r, tile *at) {
    if (r->row >= r->row_end) return 0;
    int64_t rows = r->row_end - r->row, columns = r->column_end - r->column;
    at->row = r->row, at->column = r->column;
    at->rows = (int)(rows < r->of->tile_rows ? rows : r->of->tile_rows);
    at->columns = (int)(columns < r->of->tile_columns ? columns : r->of->tile_columns);
    r->column += at->columns;
    if (r->column >= r->column_end) r->column = r->column_start, r->row += at->rows;
    return 1;
}

/* A sum in a fixed order, by four vectors in parallel, which shortens the chain of dependent additions and reduces the
 * rounding error. */
#define WIDTH (32 / (int)sizeof(REAL))
#define ABREAST 4
static inline REAL sum(const REAL *values, int count) {
    typedef REAL vector __attribute__((vector_size(32)));
    vector lanes[ABREAST] = {{0}};
    REAL rest = 0, folded[WIDTH];
    int i = 0;
    for (; i + ABREAST * WIDTH <= count; i += ABREAST * WIDTH)
        for (int k = 0; k < ABREAST; k++) {
            vector next;
            memcpy(&next, values + i + k * WIDTH, sizeof next);
            lanes[k] += next;
        }
    for (; i + WIDTH <= count; i += WIDTH) {
        vector next;
        memcpy(&next, values + i, sizeof next);
        lanes[0] += next;
    }
    for (; i < count; i++) rest += values[i];
    lanes[0] = (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
    memcpy(folded, lanes, sizeof folded);
    for (int half = WIDTH / 2; half; half /= 2)
        for (int k = 0; k < half; k++) folded[k] += folded[k + half];
    return folded[0] + rest;
}

/* The sums of a tile's rows: a copy for one column, scalar code for short rows, vectors for longer ones. */
static void sum_each(const REAL *values, int rows, int columns, REAL *restrict out) {
    if (columns == 1) memcpy(out, values, (size_t)rows * sizeof *out);
    else if (columns >= 16) for (int row = 0; row < rows; row++) out[row] = sum(values + row * columns, columns);
    else
        for (int row = 0; row < rows; row++, values += columns) {
            REAL total = 0;
            for (int i = 0; i < columns; i++) total += values[i];
            out[row] = total;
        }
}

/* Sums over rows. A tile's rows are contiguous, so that vectors also pay for short rows. */
typedef struct { double totals[TILE]; REAL few[TILE]; int most, count; } column_sums; /* few: of `count` tiles */
#define TOGETHER 8 /* tiles whose sums are REALs */

static void add_few(column_sums *sums) {
    for (int i = 0; i < sums->most; i++) sums->totals[i] += sums->few[i], sums->few[i] = 0;
    sums->count = 0;
}

static inline void add_tile(column_sums *sums, const REAL *values, int n) {
    if (!sums->most) sums->count = 0;
    for (; sums->most < n; sums->most++) sums->totals[sums->most] = sums->few[sums->most] = 0;
    for (int i = 0; i < n; i++) sums->few[i] += values[i];
    if (++sums->count == TOGETHER) add_few(sums);
}

static void fold_rows(column_sums *sums, int columns, double *out) {
    add_few(sums);
    for (int at = columns; at < sums->most; at += columns)
        for (int i = 0; i < columns; i++) sums->totals[i] += sums->totals[at + i];
    memcpy(out, sums->totals, (size_t)columns * sizeof *out);
}

/* torch's threads, through the OpenMP library that it has loaded; one thread if that lacks these functions. */
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));

typedef struct { void (*work)(void *, int64_t); void *context; int64_t jobs; } team;

static void share(void *argument) {
    team *t = argument;
    int64_t mine = omp_get_thread_num(), all = omp_get_num_threads();
    for (int64_t job = t->jobs * mine / all; job < t->jobs * (mine + 1) / all; job++) t->work(t->context, job);
}

/* Run every job, on several threads if there are enough elements. */
static void run(int64_t jobs, int64_t elements, int64_t threads, void (*work)(void *, int64_t), void *context) {
    if (threads > jobs) threads = jobs;
    if (threads > 1 && elements >= GRAIN && GOMP_parallel && omp_get_thread_num && omp_get_num_threads) {
        team t = {work, context, jobs};
        GOMP_parallel(share, &t, (unsigned)threads, 0);
        return;
    }
    for (int64_t job = 0; job < jobs; job++) work(context, job);
}
#endif
