// Softmax of ROWS rows of N floats.

#if BACKWARD
// With p = softmax(x): dx = p · (dp − Σ dp·p), the sum over the row.
KERNEL NAME(output dx, input p, input dp, int slice) {
  dx += FIRST(ROWS) * N, p += FIRST(ROWS) * N, dp += FIRST(ROWS) * N;
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++, dx += N, p += N, dp += N) {
    vec sums = 0;
    int i = 0;
    for (; i + V <= N; i += V) sums += load(p + i) * load(dp + i);
    if (N % V) sums += get(p + i, N - i, 0) * get(dp + i, N - i, 0);
    float sum = sum_vec(sums);
    for (i = 0; i + V <= N; i += V) store(dx + i, load(p + i) * (load(dp + i) - sum));
    for (; i < N; i++) dx[i] = p[i] * (dp[i] - sum);
  }
}
#else
// p = exp(x − max(x)) / Σ exp(x − max(x)).
KERNEL NAME(output p, input x, int slice) {
  p += FIRST(ROWS) * N, x += FIRST(ROWS) * N;
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++, p += N, x += N) {
    float scale = 1 / exp_row(p, x, N);
    for (int i = 0; i < N; i++) p[i] *= scale;
  }
}
#endif
