// ROWS rows of N floats: y = (x - mean) / sqrt(variance + EPSILON) * w + b. With RMS, the mean counts as 0.
//
// With OF_SUM, the input is a sum: s = x + h, or with DROPOUT x + dropout(h), as in dropout.c. s is written too.

#define MEAN(xs) (RMS ? 0 : mean_of(xs, N))
#define VECTORS(i) for (int i = 0; i < N; i += V)

#if BACKWARD
// With z the normalised x and g = dy · w: dx = (g - mean(g) - z · mean(g · z)) · scale. With OTHERS, ds is added,
// the gradient from other readers of x. `sums` (SLICES, 2, N) has, for each slice's rows, the sums of dy · z and of
// dy: its parts of dw and db. With DROPOUT, dh is dropout(dx).
KERNEL NAME(output dx, output sums WITH(DROPOUT, output dh), input x, input w, input dy WITH(OTHERS, input ds)
                WITH(DROPOUT, uint_input key, uint_input site), int slice) {
  SEED;
  float *dw = sums + (long)slice * 2 * N, *db = dw + N;
  for (int i = 0; i < 2 * N; i++) dw[i] = 0;
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++) {
    const float *xs = x + row * N, *dys = dy + row * N;
    float mean = MEAN(xs), scale = scale_of(xs, N, mean, EPSILON);
    vec g_sums = 0, gz_sums = 0;
    VECTORS(i) {
      int n = LEFT(i);
      vec z = (get(xs + i, n, mean) - mean) * scale, dy_i = get(dys + i, n, 0), g = dy_i * get(w + i, n, 0);
      g_sums += g;
      gz_sums += g * z;
      put(dw + i, get(dw + i, n, 0) + dy_i * z, n);
      put(db + i, get(db + i, n, 0) + dy_i, n);
    }
    float g_mean = RMS ? 0 : sum_vec(g_sums) / N, gz_mean = sum_vec(gz_sums) / N;
    VECTORS(i) {
      int n = LEFT(i);
      vec d = (get(dys + i, n, 0) * get(w + i, n, 0) - g_mean - (get(xs + i, n, 0) - mean) * scale * gz_mean) * scale;
#if OTHERS
      d += get(ds + row * N + i, n, 0);
#endif
      put(dx + row * N + i, d, n);
#if DROPOUT
      put(dh + row * N + i, DROPPED(d, row * N + i), n);
#endif
    }
  }
}
#else
KERNEL NAME(output y WITH(OF_SUM, output s), input x WITH(OF_SUM, input h) WITH(DROPOUT, uint_input key, uint_input site),
            input w WITH(BIAS, input b), int slice) {
  SEED;
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++) {
#if OF_SUM
    VECTORS(i) {
      int n = LEFT(i);
      put(s + row * N + i, get(x + row * N + i, n, 0) + DROPPED(get(h + row * N + i, n, 0), row * N + i), n);
    }
    const float *xs = s + row * N;
#else
    const float *xs = x + row * N;
#endif
    float mean = MEAN(xs), scale = scale_of(xs, N, mean, EPSILON);
#if BIAS
    for (int i = 0; i < N; i++) y[row * N + i] = (xs[i] - mean) * scale * w[i] + b[i];
#else
    for (int i = 0; i < N; i++) y[row * N + i] = (xs[i] - mean) * scale * w[i];
#endif
  }
}
#endif
