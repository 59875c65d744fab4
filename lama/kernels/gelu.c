// GELU of N numbers, or the gradient of it.

#if BACKWARD
PART vec value(vec x, vec dy) {
  vec slope;
  gelu_and_slope(x, &slope);
  return dy * slope;
}

KERNEL NAME(float *restrict dx, const float *restrict x, const float *restrict dy, int slice) {
  for (long i = FIRST(N / V) * V; i < LAST(N / V) * V; i += V)
    *(vec *)(dx + i) = value(*(const vec *)(x + i), *(const vec *)(dy + i));
  long i = N / V * V;
  if (i < N && slice == 0) store_some(dx + i, value(load_some(x + i, N - i, 0), load_some(dy + i, N - i, 0)), N - i);
}
#else
KERNEL NAME(float *restrict y, const float *restrict x, int slice) {
  for (long i = FIRST(N / V) * V; i < LAST(N / V) * V; i += V) *(vec *)(y + i) = gelu(*(const vec *)(x + i));
  long i = N / V * V;
  if (i < N && slice == 0) store_some(y + i, gelu(load_some(x + i, N - i, 0)), N - i);
}
#endif
