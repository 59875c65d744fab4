// Softmax of ROWS rows of N floats.

#if BACKWARD
// With p = softmax(x): dx = p · (dp − Σ dp·p), the sum over the row.
KERNEL NAME(float *restrict dx, const float *restrict p, const float *restrict dp, int slice) {
  dx += FIRST(ROWS) * N, p += FIRST(ROWS) * N, dp += FIRST(ROWS) * N;
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++, dx += N, p += N, dp += N) {
    vec sums = 0;
    int i = 0;
    for (; i + V <= N; i += V) sums += *(const vec *)(p + i) * *(const vec *)(dp + i);
    if (N % V) sums += load_some(p + i, N - i, 0) * load_some(dp + i, N - i, 0);
    float sum = sum_vec(sums);
    for (i = 0; i + V <= N; i += V) *(vec *)(dx + i) = *(const vec *)(p + i) * (*(const vec *)(dp + i) - sum);
    for (; i < N; i++) dx[i] = p[i] * (dp[i] - sum);
  }
}
#else
// p = exp(x − max(x)) / Σ exp(x − max(x)).
KERNEL NAME(float *restrict p, const float *restrict x, int slice) {
  p += FIRST(ROWS) * N, x += FIRST(ROWS) * N;
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++, p += N, x += N) {
    vec most = x[0], sums = 0;
    int i = 0;
    for (; i + V <= N; i += V) most = __builtin_elementwise_max(most, *(const vec *)(x + i));
    if (N % V) most = __builtin_elementwise_max(most, load_some(x + i, N - i, x[0]));
    float top = max_vec(most);
    for (i = 0; i + V <= N; i += V) {
      vec e = exp_vec(*(const vec *)(x + i) - top);
      *(vec *)(p + i) = e;
      sums += e;
    }
    if (N % V) {
      vec e = exp_vec(load_some(x + i, N - i, 0) - top);
      store_some(p + i, e, N - i);
      sums += load_some(p + i, N - i, 0);
    }
    float scale = 1 / sum_vec(sums);
    for (i = 0; i < N; i++) p[i] *= scale;
  }
}
#endif
