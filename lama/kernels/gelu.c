// N values of x · σ(2u) with u = √(2/π) (x + 0.044715 x³): GELU's tanh approximation, since (1 + tanh u) / 2 = σ(2u).

#define SCALE 0.7978845608f
#define CUBIC 0.044715f

PART vec gate(vec x) { return 1 / (1 + exp_vec(-2 * SCALE * x * (1 + CUBIC * x * x))); }

#if BACKWARD
PART vec value(vec x, vec dy) {
  vec s = gate(x);
  return dy * (s + x * s * (1 - s) * 2 * SCALE * (1 + 3 * CUBIC * x * x));
}

KERNEL NAME(float *restrict dx, const float *restrict x, const float *restrict dy, int slice) {
  for (long i = FIRST(N / V) * V; i < LAST(N / V) * V; i += V)
    *(vec *)(dx + i) = value(*(const vec *)(x + i), *(const vec *)(dy + i));
  long i = N / V * V;
  if (i < N && slice == 0) store_some(dx + i, value(load_some(x + i, N - i, 0), load_some(dy + i, N - i, 0)), N - i);
}
#else
PART vec value(vec x) { return x * gate(x); }

KERNEL NAME(float *restrict y, const float *restrict x, int slice) {
  for (long i = FIRST(N / V) * V; i < LAST(N / V) * V; i += V) *(vec *)(y + i) = value(*(const vec *)(x + i));
  long i = N / V * V;
  if (i < N && slice == 0) store_some(y + i, value(load_some(x + i, N - i, 0)), N - i);
}
#endif
