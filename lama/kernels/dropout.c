// y = x / (1 - rate), or 0 for the dropped elements. The N elements of x begin at row key[1], of ROW elements
// each, of a larger batch, whose element i stays if its hash, below 2^32, is at least THRESHOLD.

#define DROP(x, i) drop(x, key[1] * ROW + (unsigned int)(i), seed, THRESHOLD, SCALE)

KERNEL NAME(float *restrict y, const float *restrict x, const unsigned int *restrict key,
            const unsigned int *restrict site, int slice) {
  uints seed = seed_of(key, site[0]);
  for (long i = FIRST(N / V) * V; i < LAST(N / V) * V; i += V) *(vec *)(y + i) = DROP(*(const vec *)(x + i), i);
  long i = N / V * V;
  if (i < N && slice == 0) store_some(y + i, DROP(load_some(x + i, N - i, 0), i), N - i);
}
