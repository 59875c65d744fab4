// -log softmax(x)[target] of ROWS rows of N logits: log Σ exp(x) - Σ q x. q is the smoothed target: 1 - SMOOTHING for
// the target itself, plus SMOOTHING / N for every class. A target outside the N classes has only the second part.

#if BACKWARD
// dx = dy · (softmax(x) - the smoothed target).
KERNEL NAME(output dx, input x, const int *restrict targets, input dy, int slice) {
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++) {
    float *to = dx + row * N, scale = dy[row] / exp_row(to, x + row * N, N), every = dy[row] * SMOOTHING / N;
    for (int i = 0; i < N; i++) to[i] = to[i] * scale - every;
    if (targets[row] >= 0 && targets[row] < N) to[targets[row]] -= dy[row] * (1 - SMOOTHING);
  }
}
#else
KERNEL NAME(output y, input x, const int *restrict targets, int slice) {
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++) {
    const float *xs = x + row * N;
    float top = most_of(xs, N);
    vec sums = 0, values = 0;
    float rest = 0;
    for (int i = 0; i < N; i += V) {
      vec d = get(xs + i, N - i, top) - top, e = exp_vec(d);
      values += d;
      if (i + V <= N)
        sums += e;
      else
        for (int j = 0; j < N - i; j++) rest += e[j];
    }
    float picked = targets[row] >= 0 && targets[row] < N ? xs[targets[row]] - top : -top;
    y[row] = log_of(sum_vec(sums) + rest) - (1 - SMOOTHING) * picked;
    if (SMOOTHING > 0) y[row] -= SMOOTHING * (sum_vec(values) / N);  // infinite if a logit is -inf
  }
}
#endif
