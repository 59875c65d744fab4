// ROWS rows of N floats: y = (x - mean) / sqrt(variance + EPSILON) * w + b.

#if BACKWARD
// With z the normalised x and g = dy · w: dx = (g - mean(g) - z · mean(g · z)) · scale; dw and db are the sums over the rows
// of dy · z and dy: of a slice's rows here, (SLICES, 2, N).
KERNEL NAME(float *restrict dx, float *restrict sums, const float *restrict x, const float *restrict w, const float *restrict dy, int slice) {
  float *dw = sums + (long)slice * 2 * N, *db = dw + N;
  for (int i = 0; i < 2 * N; i++) dw[i] = 0;
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++) {
    const float *xs = x + row * N, *dys = dy + row * N;
    float mean = mean_of(xs, N), scale = scale_of(xs, N, mean, EPSILON);
    vec g_sums = 0, gz_sums = 0;
    int i = 0;
    for (; i + V <= N; i += V) {
      vec z = (*(const vec *)(xs + i) - mean) * scale, dy_i = *(const vec *)(dys + i), g = dy_i * *(const vec *)(w + i);
      g_sums += g;
      gz_sums += g * z;
      *(vec *)(dw + i) += dy_i * z;
      *(vec *)(db + i) += dy_i;
    }
    if (i < N) {
      vec z = (load_some(xs + i, N - i, mean) - mean) * scale, dy_i = load_some(dys + i, N - i, 0), g = dy_i * load_some(w + i, N - i, 0);
      g_sums += g;
      gz_sums += g * z;
      store_some(dw + i, load_some(dw + i, N - i, 0) + dy_i * z, N - i);
      store_some(db + i, load_some(db + i, N - i, 0) + dy_i, N - i);
    }
    float g_mean = sum_vec(g_sums) / N, gz_mean = sum_vec(gz_sums) / N;
    for (i = 0; i < N; i++) dx[row * N + i] = (dys[i] * w[i] - g_mean - (xs[i] - mean) * scale * gz_mean) * scale;
  }
}
#else
#if BIAS
KERNEL NAME(float *restrict y, const float *restrict x, const float *restrict w, const float *restrict b, int slice) {
#else
KERNEL NAME(float *restrict y, const float *restrict x, const float *restrict w, int slice) {
#endif
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++) {
    const float *xs = x + row * N;
    float mean = mean_of(xs, N), scale = scale_of(xs, N, mean, EPSILON);
#if BIAS
    for (int i = 0; i < N; i++) y[row * N + i] = (xs[i] - mean) * scale * w[i] + b[i];
#else
    for (int i = 0; i < N; i++) y[row * N + i] = (xs[i] - mean) * scale * w[i];
#endif
  }
}
#endif
