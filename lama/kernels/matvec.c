// y = finish(a · wᵀ) for a few rows of a, (M, K), and w, (N, K), BATCH times: every weight is read once, in
// order, at the speed of memory. BIAS, NORM_WEIGHT and NORM_BIAS are the types of these inputs, or undefined.
// With NORM_WEIGHT, each row of a is normalised first, as in layernorm.c. With BITS, w is quantised: see
// quantized.h. `finish` adds the bias, applies GELU and adds the residual, (M, N).

#ifdef BITS
#define LANES 1
#define DOTS(n, lanes) quantized_dots(y + (n), a, w + (n) * ROW_BYTES, scales + (n) * GROUPS)
#define SCALES_ARGUMENT , const _Float16 *restrict scales
#else
#define DOTS(n, lanes) dots(y + (n), a, w + (n) * K, lanes)
#define SCALES_ARGUMENT
// The rows of w at a time, and the vectors of each. One row, read in order, is best for memory; many rows of
// a come from the second cache and should meet more than one row of w. All sums stay in registers.
#define LANES (M <= 2 || (V < 16 && M > 4) ? 1 : 2)
#define AT_ONCE (M <= 2 ? 4 : V == 16 && M <= 4 ? 2 : 1)
#ifndef AHEAD
#define AHEAD 4096  // bytes
#endif
#endif

#ifdef BIAS
#define BIAS_ARGUMENT , const BIAS *restrict bias
#else
#define BIAS_ARGUMENT
#endif
#ifdef NORM_WEIGHT
#define NORM_WEIGHT_ARGUMENT , const NORM_WEIGHT *restrict norm_weight
#else
#define NORM_WEIGHT_ARGUMENT
#endif
#ifdef NORM_BIAS
#define NORM_BIAS_ARGUMENT , const NORM_BIAS *restrict norm_bias
#else
#define NORM_BIAS_ARGUMENT
#endif
#if RESIDUAL
#define RESIDUAL_ARGUMENT , const float *restrict residual
#else
#define RESIDUAL_ARGUMENT
#endif

#ifndef BITS
// The products of `lanes` rows of w with all rows of a, written N apart. Prefetches the next rows: the CPU's
// own prefetching ends at the end of a page, and a row is hardly longer.
PART void dots(float *restrict y, const float *restrict a, const WEIGHT *restrict w, const int lanes) {
  vec sums[M][LANES][AT_ONCE];
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int i = 0; i < lanes; i++)
      UNROLL for (int j = 0; j < AT_ONCE; j++) sums[m][i][j] = 0;
  int k = 0;
  for (; k + AT_ONCE * V <= K; k += AT_ONCE * V)
    UNROLL for (int i = 0; i < lanes; i++) {
      UNROLL for (int byte = 0; byte < AT_ONCE * V * (int)sizeof(WEIGHT); byte += 64)
        __builtin_prefetch((const char *)(w + i * K + k) + AHEAD + byte);
      UNROLL for (int j = 0; j < AT_ONCE; j++) {
        vec weights = load(w + i * K + k + j * V);
        UNROLL for (int m = 0; m < M; m++) sums[m][i][j] += load(a + m * K + k + j * V) * weights;
      }
    }
  for (; k < K; k += V)
    UNROLL for (int i = 0; i < lanes; i++) {
      const int some = MIN(V, K - k);
      vec weights = get(w + i * K + k, some, 0);
      UNROLL for (int m = 0; m < M; m++) {
        vec values = get(a + m * K + k, some, 0);
        sums[m][i][0] += values * weights;
      }
    }
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int i = 0; i < lanes; i++) {
      UNROLL for (int j = 1; j < AT_ONCE; j++) sums[m][i][0] += sums[m][i][j];
      y[m * N + i] = sum_vec(sums[m][i][0]);
    }
}
#endif

KERNEL NAME(float *restrict y, const float *restrict a, const WEIGHT *restrict w SCALES_ARGUMENT BIAS_ARGUMENT RESIDUAL_ARGUMENT
                NORM_WEIGHT_ARGUMENT NORM_BIAS_ARGUMENT, int slice) {
#ifdef NORM_WEIGHT
  float normalised[M * K] __attribute__((aligned(64)));
  for (int m = 0; m < M; m++) {
    float mean = mean_of(a + m * K, K), scale = scale_of(a + m * K, K, mean, EPSILON);
    for (int k = 0; k < K; k += V) {
      const int some = MIN(V, K - k);
      const float *from = a + m * K + k;
      vec weights = get(norm_weight + k, some, 0), biases = 0;
#ifdef NORM_BIAS
      biases = get(norm_bias + k, some, 0);
#endif
      vec values = (get(from, some, 0) - mean) * scale * weights + biases;
      put(normalised + m * K + k, values, some);
    }
  }
  a = normalised;
#endif
#ifdef BITS
  float arranged[M * LINES * X_LINE] __attribute__((aligned(64)));
  for (int m = 0; m < M; m++) arrange(arranged + m * LINES * X_LINE, a + m * K);
  a = arranged;
#endif
  for (int batch = 0; batch < BATCH; batch++, a += M * K, w += (long)N * K, y += M * N) {
    long n = FIRST(N);
    for (; n + LANES <= LAST(N); n += LANES) DOTS(n, LANES);
    for (; n < LAST(N); n++) DOTS(n, 1);
    for (int m = 0; m < M; m++)
      for (n = FIRST(N); n < LAST(N); n += V) {
        const int some = MIN(V, LAST(N) - n);
        vec value = get(y + m * N + n, some, 0);
#ifdef BIAS
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
