/* The passes over rows, see `activation.h`; for the type `Element`. */

static inline double folded(const double *row, int64_t channel, int64_t channels, int64_t width)
{
    double sum = 0;
    for (int64_t i = channel; i < width; i += channels)
        sum += row[i];
    return sum;
}

/* Sums go down the rows four at a time, each row in the order of memory. */
VECTORIZED static inline void add_centred_rows(
    const Element *restrict x, int64_t values, int64_t width, const float *restrict centre, float *restrict rest,
    float *restrict squares)
{
    int64_t start = 0;
    for (; start + 4 * width <= values; start += 4 * width) {
        const Element *v = x + start;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float m = centre[i];
            float d0 = load(v[i]) - m, d1 = load(v[i + width]) - m;
            float d2 = load(v[i + 2 * width]) - m, d3 = load(v[i + 3 * width]) - m;
            rest[i] += (d0 + d1) + (d2 + d3);
            squares[i] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3);
        }
    }
    for (; start < values; start += width) {
        int64_t n = values - start < width ? values - start : width;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            float d = load(x[start + i]) - centre[i];
            rest[i] += d;
            squares[i] += d * d;
        }
    }
}

VECTORIZED static inline void add_weighted_rows(
    const Element *restrict dy, const Element *restrict x, int64_t values, int64_t width, const float *restrict centre,
    float *restrict total, float *restrict weighted)
{
    int64_t start = 0;
    for (; start + 4 * width <= values; start += 4 * width) {
        const Element *g = dy + start, *v = x + start;
#pragma omp simd
        for (int64_t i = 0; i < width; i++) {
            float m = centre[i], g0 = load(g[i]), g1 = load(g[i + width]);
            float g2 = load(g[i + 2 * width]), g3 = load(g[i + 3 * width]);
            float w0 = g0 * (load(v[i]) - m), w1 = g1 * (load(v[i + width]) - m);
            float w2 = g2 * (load(v[i + 2 * width]) - m), w3 = g3 * (load(v[i + 3 * width]) - m);
            total[i] += (g0 + g1) + (g2 + g3);
            weighted[i] += (w0 + w1) + (w2 + w3);
        }
    }
    for (; start < values; start += width) {
        int64_t n = values - start < width ? values - start : width;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            total[i] += load(dy[start + i]);
            weighted[i] += load(dy[start + i]) * (load(x[start + i]) - centre[i]);
        }
    }
}

VECTORIZED static void apply_rows(const void *from, void *to, int64_t values, int64_t width, const float *k)
{
    const Element *x = from;
    Element *y = to;
    const float *scale = k, *mean = k + width, *bias = k + 2 * width;
    for (int64_t start = 0; start < values; start += width) {
        int64_t n = values - start < width ? values - start : width;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            y[start + i] = store(scale[i] * (load(x[start + i]) - mean[i]) + bias[i]);
    }
}

VECTORIZED static void gradient_of_rows(
    const void *upstream, const void *from, void *to, int64_t values, int64_t width, const float *k)
{
    const Element *dy = upstream, *x = from;
    Element *dx = to;
    const float *a = k, *b = k + width, *mean = k + 2 * width, *c = k + 3 * width;
    for (int64_t start = 0; start < values; start += width) {
        int64_t n = values - start < width ? values - start : width;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            dx[start + i] = store(a[i] * load(dy[start + i]) + (b[i] * (load(x[start + i]) - mean[i]) + c[i]));
    }
}

static inline void gather(float *row, double *sums, int64_t width)
{
    for (int64_t i = 0; i < width; i++) {
        sums[i] += row[i];
        row[i] = 0;
    }
}

/* All sums are about one centre, the mean of a few rows from everywhere. Where it is far from the mean of all, so are
   those rows, and the variance is large. */
static int observe_rows(const void *from, int64_t rows, int64_t channels, Moments *moments)
{
    const Element *x = from;
    int64_t width = width_of(channels), values = rows * channels, block = LINES * width;
    int64_t few = rows < SAMPLE ? rows : SAMPLE;
    double *sums = calloc(2 * width, sizeof(double) + 2 * sizeof(float));
    float *rest = (float *)(sums + 2 * width), *squares = rest + width, *centre = squares + width;
    if (!sums)
        return 1;
    for (int64_t i = 0; i < few; i++)
        for (int64_t c = 0; c < channels; c++)
            centre[c] += load(x[(2 * i + 1) * rows / (2 * few) * channels + c]) / (float)few;
    spread(centre, channels, centre, width);
    for (int64_t start = 0; start < values; start += block) {
        int64_t n = values - start < block ? values - start : block;
        add_centred_rows(x + start, n, width, centre, rest, squares);
        gather(rest, sums, 2 * width);
    }
    for (int64_t c = 0; c < channels; c++) {
        double r = folded(sums, c, channels, width), s = folded(sums + width, c, channels, width);
        moments[c] = (Moments){(double)rows, centre[c] + r / rows, s - r * r / rows};
        if (!isfinite(s)) {
            moments[c] = (Moments){0, 0, 0};
            observe_widely(x + c, rows, channels, moments + c);
        }
    }
    free(sums);
    return 0;
}

static int sums_of_rows(
    const void *upstream, const void *from, int64_t rows, int64_t channels, const float *centre, double *sums)
{
    const Element *dy = upstream, *x = from;
    int64_t width = width_of(channels), values = rows * channels, block = LINES * width;
    double *totals = calloc(2 * width, sizeof(double) + 2 * sizeof(float));
    float *total = (float *)(totals + 2 * width), *weighted = total + width, *row = weighted + width;
    if (!totals)
        return 1;
    spread(centre, channels, row, width);
    for (int64_t start = 0; start < values; start += block) {
        int64_t n = values - start < block ? values - start : block;
        add_weighted_rows(dy + start, x + start, n, width, row, total, weighted);
        gather(total, totals, 2 * width);
    }
    for (int64_t c = 0; c < channels; c++) {
        sums[2 * c] = folded(totals, c, channels, width);
        sums[2 * c + 1] = folded(totals + width, c, channels, width);
    }
    free(totals);
    return 0;
}

const Passes PASSES = {
    sizeof(Element), observe_plane, apply_plane, sums_of_plane, gradient_of_plane,
    observe_rows, sums_of_rows, apply_rows, gradient_of_rows,
};
