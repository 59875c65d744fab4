// y = the sum of the ROWS rows of x, N floats each, in order; a slice computes some of the columns.
#define UNIT (4 * V)

KERNEL NAME(output y, input x, int slice) {
  for (long n = FIRST((N + UNIT - 1) / UNIT) * UNIT; n < LAST((N + UNIT - 1) / UNIT) * UNIT; n += UNIT)
    if (n + UNIT <= N) {
      vec sums[4] = {0, 0, 0, 0};
      for (long row = 0; row < ROWS; row++)
        EACH(j, 4) sums[j] += load(x + row * N + n + j * V);
      EACH(j, 4) store(y + n + j * V, sums[j]);
    } else {
      for (long i = n; i < N; i++) y[i] = 0;
      for (long row = 0; row < ROWS; row++)
        for (long i = n; i < N; i++) y[i] += x[row * N + i];
    }
}
