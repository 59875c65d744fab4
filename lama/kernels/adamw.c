// One AdamW update of N numbers in place. `scalars`: the rate, 1 - beta1^t, 1 - beta2^t; g is multiplied by
// scale[0] first.

// Number by number, which becomes one instruction: older compilers have no root of a vector.
PART vec root(vec x) {
  UNROLL for (int i = 0; i < V; i++) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

PART vec updated(vec p, vec g, vec *m, vec *v, const float *scalars) {
  *m = BETA1 * *m + (1 - BETA1) * g;
  *v = BETA2 * *v + (1 - BETA2) * (g * g);
  vec step = (*m / scalars[1]) / (root(*v / scalars[2]) + EPSILON);
  return p - scalars[0] * (step + DECAY * p);
}

KERNEL NAME(float *restrict p, float *restrict m, float *restrict v, const float *restrict g, const float *restrict scalars,
            const float *restrict scale, int slice) {
  for (long i = FIRST(N / V) * V; i < LAST(N / V) * V; i += V)
    *(vec *)(p + i) = updated(*(vec *)(p + i), *(const vec *)(g + i) * scale[0], (vec *)(m + i), (vec *)(v + i), scalars);
  long i = N / V * V;
  if (i < N && slice == 0) {
    vec mean = load_some(m + i, N - i, 0), square = load_some(v + i, N - i, 0);
    store_some(p + i, updated(load_some(p + i, N - i, 0), load_some(g + i, N - i, 0) * scale[0], &mean, &square, scalars), N - i);
    store_some(m + i, mean, N - i);
    store_some(v + i, square, N - i);
  }
}
