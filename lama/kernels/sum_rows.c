// y = the sum over the ROWS rows of x, N floats each, in order; a slice has some of the columns.
#define UNIT (4 * V)

KERNEL NAME(float *restrict y, const float *restrict x, int slice) {
  for (long n = FIRST((N + UNIT - 1) / UNIT) * UNIT; n < LAST((N + UNIT - 1) / UNIT) * UNIT; n += UNIT)
    if (n + UNIT <= N) {
      vec sums[4] = {0, 0, 0, 0};
      for (long row = 0; row < ROWS; row++)
        UNROLL for (int j = 0; j < 4; j++) sums[j] += *(const vec *)(x + row * N + n + j * V);
      UNROLL for (int j = 0; j < 4; j++) *(vec *)(y + n + j * V) = sums[j];
    } else {
      for (long i = n; i < N; i++) y[i] = 0;
      for (long row = 0; row < ROWS; row++)
        for (long i = n; i < N; i++) y[i] += x[row * N + i];
    }
}
