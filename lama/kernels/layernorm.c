// ROWS rows of N floats: y = (x - mean) / sqrt(variance + EPSILON) * w + b.
//
// With OF_SUM, the input is a sum: s = x + h, or x + dropout(h) with DROPOUT (as in dropout.c). s is written
// too.

#define EACH(i) for (int i = 0; i < N; i += V)
// The floats of a row in the vector that begins at float i of it.
#define COUNT(i) (N % V != 0 && (i) + V > N ? N - (i) : V)

#if DROPOUT
#define KEY const unsigned int *restrict key, const unsigned int *restrict site,
#define SEED uints seed = seed_of(key, site[0])
#define DROP(x, i) drop(x, key[1] * ROW + (unsigned int)(i), seed, THRESHOLD, SCALE)
#else
#define KEY
#define SEED
#define DROP(x, i) (x)
#endif

#if BACKWARD
// With z the normalised x and g = dy · w: dx = (g - mean(g) - z · mean(g · z)) · scale, plus ds with OF_SUM
// 2, the gradient from the sum's other readers. dw and db are the sums of dy · z and dy over each slice's
// rows, (SLICES, 2, N). With DROPOUT, dh is dropout(dx).
#if DROPOUT
#define TO float *restrict dx, float *restrict sums, float *restrict dh
#else
#define TO float *restrict dx, float *restrict sums
#endif
#if OF_SUM == 2
#define FROM const float *restrict x, const float *restrict w, const float *restrict dy, const float *restrict ds,
#else
#define FROM const float *restrict x, const float *restrict w, const float *restrict dy,
#endif
KERNEL NAME(TO, FROM KEY int slice) {
  SEED;
  float *dw = sums + (long)slice * 2 * N, *db = dw + N;
  for (int i = 0; i < 2 * N; i++) dw[i] = 0;
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++) {
    const float *xs = x + row * N, *dys = dy + row * N;
    float mean = mean_of(xs, N), scale = scale_of(xs, N, mean, EPSILON);
    vec g_sums = 0, gz_sums = 0;
    EACH(i) {
      int n = COUNT(i);
      vec z = (get(xs + i, n, mean) - mean) * scale, dy_i = get(dys + i, n, 0), g = dy_i * get(w + i, n, 0);
      g_sums += g;
      gz_sums += g * z;
      put(dw + i, get(dw + i, n, 0) + dy_i * z, n);
      put(db + i, get(db + i, n, 0) + dy_i, n);
    }
    float g_mean = sum_vec(g_sums) / N, gz_mean = sum_vec(gz_sums) / N;
    EACH(i) {
      int n = COUNT(i);
      vec d = (get(dys + i, n, 0) * get(w + i, n, 0) - g_mean - (get(xs + i, n, 0) - mean) * scale * gz_mean) * scale;
#if OF_SUM == 2
      d += get(ds + row * N + i, n, 0);
#endif
      put(dx + row * N + i, d, n);
#if DROPOUT
      put(dh + row * N + i, DROP(d, row * N + i), n);
#endif
    }
  }
}
#else
#if OF_SUM
#define TO float *restrict y, float *restrict s
#define FROM const float *restrict x, const float *restrict h, KEY
#else
#define TO float *restrict y
#define FROM const float *restrict x,
#endif
#if BIAS
KERNEL NAME(TO, FROM const float *restrict w, const float *restrict b, int slice) {
#else
KERNEL NAME(TO, FROM const float *restrict w, int slice) {
#endif
  SEED;
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++) {
#if OF_SUM
    EACH(i) {
      int n = COUNT(i);
      put(s + row * N + i, get(x + row * N + i, n, 0) + DROP(get(h + row * N + i, n, 0), row * N + i), n);
    }
    const float *xs = s + row * N;
#else
    const float *xs = x + row * N;
#endif
    float mean = mean_of(xs, N), scale = scale_of(xs, N, mean, EPSILON);
#if BIAS
    for (int i = 0; i < N; i++) y[row * N + i] = (xs[i] - mean) * scale * w[i] + b[i];
#else
    for (int i = 0; i < N; i++) y[row * N + i] = (xs[i] - mean) * scale * w[i];
#endif
  }
}
#endif
