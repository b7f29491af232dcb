/* The passes over planes, see `activation.h`; for the type `Element`. */

/* Every `step`-th value, where the squares of a block have left the range of float32. */
static void observe_widely(const Element *x, int64_t count, int64_t step, Moments *moments)
{
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < count; i++)
        sum += load(x[i * step]);
    for (int64_t i = 0; i < count; i++) {
        double d = load(x[i * step]) - sum / (double)count;
        squares += d * d;
    }
    merge(moments, (double)count, sum / (double)count, squares);
}

VECTORIZED static void observe_plane(const void *x, int64_t count, Moments *moments)
{
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t n = count - start < BLOCK ? count - start : BLOCK;
        const Element *v = (const Element *)x + start;
        float sum = 0, rest = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++)
            sum += load(v[i]);
        float mean = sum / (float)n;
#pragma omp simd reduction(+ : rest, squares)
        for (int64_t i = 0; i < n; i++) {
            float d = load(v[i]) - mean;
            rest += d;
            squares += d * d;
        }
        if (squares <= FLT_MAX)
            merge(moments, (double)n, mean + (double)rest / n, squares - (double)rest * rest / n);
        else
            observe_widely(v, n, 1, moments);
    }
}

VECTORIZED static void apply_plane(const void *from, void *to, int64_t count, const float *k)
{
    const Element *x = from;
    Element *y = to;
    float scale = k[0], mean = k[1], bias = k[2];
#pragma omp simd
    for (int64_t i = 0; i < count; i++)
        y[i] = store(scale * (load(x[i]) - mean) + bias);
}

VECTORIZED static void sums_of_plane(const void *dy, const void *x, int64_t count, float centre, double *sums)
{
    for (int64_t start = 0; start < count; start += BLOCK) {
        int64_t n = count - start < BLOCK ? count - start : BLOCK;
        const Element *g = (const Element *)dy + start, *v = (const Element *)x + start;
        float total = 0, weighted = 0;
#pragma omp simd reduction(+ : total, weighted)
        for (int64_t i = 0; i < n; i++) {
            total += load(g[i]);
            weighted += load(g[i]) * (load(v[i]) - centre);
        }
        sums[0] += total;
        sums[1] += weighted;
    }
}

VECTORIZED static void gradient_of_plane(const void *upstream, const void *from, void *to, int64_t count, const float *k)
{
    const Element *dy = upstream, *x = from;
    Element *dx = to;
    float a = k[0], b = k[1], mean = k[2], c = k[3];
#pragma omp simd
    for (int64_t i = 0; i < count; i++)
        dx[i] = store(a * load(dy[i]) + (b * (load(x[i]) - mean) + c));
}
