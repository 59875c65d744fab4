// -log softmax(x)[target] of ROWS rows of N logits. The target is smoothed: (1 - SMOOTHING) of itself and
// SMOOTHING / N of every class. A target outside the N classes counts as 0 everywhere.

PART float most_of(const float *x) {
  vec most = x[0];
  int i = 0;
  for (; i + V <= N; i += V) most = __builtin_elementwise_max(most, *(const vec *)(x + i));
  if (i < N) most = __builtin_elementwise_max(most, load_some(x + i, N - i, x[0]));
  return max_vec(most);
}

#if BACKWARD
// dx = dy · (softmax(x) - the smoothed target).
KERNEL NAME(float *restrict dx, const float *restrict x, const int *restrict targets, const float *restrict dy, int slice) {
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++) {
    const float *xs = x + row * N;
    float *to = dx + row * N, top = most_of(xs);
    vec sums = 0;
    int i = 0;
    for (; i + V <= N; i += V) {
      vec e = exp_vec(*(const vec *)(xs + i) - top);
      *(vec *)(to + i) = e;
      sums += e;
    }
    if (i < N) {
      vec e = exp_vec(load_some(xs + i, N - i, -1e38f) - top);
      store_some(to + i, e, N - i);
      sums += load_some(to + i, N - i, 0);
    }
    float scale = dy[row] / sum_vec(sums), every = dy[row] * SMOOTHING / N;
    for (i = 0; i < N; i++) to[i] = to[i] * scale - every;
    if (targets[row] >= 0 && targets[row] < N) to[targets[row]] -= dy[row] * (1 - SMOOTHING);
  }
}
#else
KERNEL NAME(float *restrict y, const float *restrict x, const int *restrict targets, int slice) {
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++) {
    const float *xs = x + row * N;
    float top = most_of(xs);
    vec sums = 0, values = 0;
    int i = 0;
    for (; i + V <= N; i += V) {
      vec d = *(const vec *)(xs + i) - top;
      sums += exp_vec(d);
      values += d;
    }
    float rest = 0;
    if (i < N) {
      vec d = load_some(xs + i, N - i, top) - top;
      float e[V];
      *(vec *)e = exp_vec(d);
      values += d;
      for (int j = 0; j < N - i; j++) rest += e[j];
    }
    float picked = targets[row] >= 0 && targets[row] < N ? xs[targets[row]] - top : -top;
    y[row] = log_of(sum_vec(sums) + rest) - (1 - SMOOTHING) * picked;
    if (SMOOTHING > 0) y[row] -= SMOOTHING * (sum_vec(values) / N);  // which a logit of -inf makes infinite
  }
}
#endif
