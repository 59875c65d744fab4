// y = finish(a · wᵀ) for a few rows of a, (M, K), and w, (N, K), BATCH times: every weight is read once, in
// order, at the speed of memory. With NORM_WEIGHT, each row of a is normalised first, as in layernorm.c. With
// BITS, w is quantised: see quantized.h. `finish` adds the bias, applies GELU and adds the residual, (M, N).

#ifdef BITS
#define LANES 1
#define DOTS(n, lanes) quantized_dots(y + (n), a, w + (n) * ROW_BYTES, scales + (n) * SCALES)
#else
#define DOTS(n, lanes) dots(y + (n), a, w + (n) * K, lanes)
// The rows of w at a time, and the vectors of each. One row, read in order, is best for memory; many rows of
// a come from the second cache and should meet more than one row of w. All sums stay in registers.
#define LANES (M <= 2 || (V < 16 && M > 4) ? 1 : 2)
#define AT_ONCE (M <= 2 ? 4 : V == 16 && M <= 4 ? 2 : 1)
#ifndef AHEAD
#define AHEAD 4096  // bytes
#endif
#endif

#ifndef BITS
// The products of `lanes` rows of w with all rows of a, written N apart. Prefetches the next rows: the CPU's
// own prefetching ends at the end of a page, and a row is hardly longer.
PART void dots(output y, input a, const WEIGHT *restrict w, const int lanes) {
  vec sums[M][LANES][AT_ONCE];
  EACH(m, M) EACH(i, lanes) EACH(j, AT_ONCE) sums[m][i][j] = 0;
  int k = 0;
  for (; k + AT_ONCE * V <= K; k += AT_ONCE * V)
    EACH(i, lanes) {
      UNROLL for (int byte = 0; byte < AT_ONCE * V * (int)sizeof(WEIGHT); byte += 64)
        __builtin_prefetch((const char *)(w + i * K + k) + AHEAD + byte);
      EACH(j, AT_ONCE) {
        vec weights = load(w + i * K + k + j * V);
        EACH(m, M) sums[m][i][j] += load(a + m * K + k + j * V) * weights;
      }
    }
  for (; k < K; k += V)
    EACH(i, lanes) {
      vec weights = get(w + i * K + k, K - k, 0);
      EACH(m, M) sums[m][i][0] += get(a + m * K + k, K - k, 0) * weights;
    }
  EACH(m, M) EACH(i, lanes) {
    UNROLL for (int j = 1; j < AT_ONCE; j++) sums[m][i][0] += sums[m][i][j];
    y[m * N + i] = sum_vec(sums[m][i][0]);
  }
}
#endif

KERNEL NAME(output y, INPUTS, int slice) {
#if NORM_WEIGHT
  float normalised[M * K] __attribute__((aligned(64)));
  for (int m = 0; m < M; m++) {
    float mean = RMS ? 0 : mean_of(a + m * K, K), scale = scale_of(a + m * K, K, mean, EPSILON);
    for (int k = 0; k < K; k += V) {
      vec weights = get(norm_weight + k, K - k, 0), biases = 0;
#if NORM_BIAS
      biases = get(norm_bias + k, K - k, 0);
#endif
      put(normalised + m * K + k, (get(a + m * K + k, K - k, 0) - mean) * scale * weights + biases, K - k);
    }
  }
  a = normalised;
#endif
#ifdef BITS
  float arranged[M * X_ROW] __attribute__((aligned(64)));
  for (int m = 0; m < M; m++) arrange(arranged + m * X_ROW, a + m * K);
  a = arranged;
#endif
  for (int batch = 0; batch < BATCH; batch++, a += M * K, w += (long)N * K, y += M * N) {
    long n = FIRST(N);
    for (; n + LANES <= LAST(N); n += LANES) DOTS(n, LANES);
    for (; n < LAST(N); n++) DOTS(n, 1);
    for (int m = 0; m < M; m++)
      for (n = FIRST(N); n < LAST(N); n += V) {
        const long some = LAST(N) - n;
        vec value = get(y + m * N + n, some, 0);
#if BIAS
        value += get(bias + n, some, 0);
#endif
        if (GELU) value = gelu(value);
#if RESIDUAL
        value += get(residual + m * N + n, some, 0);
#endif
        put(y + m * N + n, value, some);
      }
  }
}
