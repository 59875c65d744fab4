// y = x where an element is kept, times 1 / (1 - rate); 0 where it is dropped. The N elements of x begin at row key[1], of
// ROW elements each, of a larger batch; its element i is kept if its hash, one of the numbers below 2^32, is at least
// THRESHOLD.

PART vec drop(vec x, uints i, uints seed) { return hash_of(i, seed) >= THRESHOLD ? x * SCALE : (vec)0; }

KERNEL NAME(float *restrict y, const float *restrict x, const unsigned int *restrict key, int slice) {
  uints seed = seed_of(key, SITE), place;
  UNROLL for (int j = 0; j < V; j++) place[j] = key[1] * ROW + j;
  for (long i = FIRST(N / V) * V; i < LAST(N / V) * V; i += V)
    *(vec *)(y + i) = drop(*(const vec *)(x + i), place + (unsigned int)i, seed);
  long i = N / V * V;
  if (i < N && slice == 0) store_some(y + i, drop(load_some(x + i, N - i, 0), place + (unsigned int)i, seed), N - i);
}
