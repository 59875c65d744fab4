// y = finish(a · wᵀ) for a few rows of a, (M, K), and w stored row by row, (N, K), BATCH times: every weight is read once, in
// order, as fast as memory gives it. The types BIAS, NORM_WEIGHT and NORM_BIAS are defined where there are such: with NORM_WEIGHT,
// each row of a is normalised first, as layernorm.c does. `finish` adds the bias, takes GELU and adds the residual, (M, N).

#define LANES 4

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

// `lanes` columns of y from the n-th on, as sums.
PART void dots(float *restrict y, const float *restrict a, const WEIGHT *restrict w, long n, int lanes) {
  vec sums[M][LANES];
  float tails[M][LANES];
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int j = 0; j < LANES; j++) { sums[m][j] = 0; tails[m][j] = 0; }
  for (int k = 0; k + V <= K; k += V)
    UNROLL for (int j = 0; j < LANES; j++)
      if (j < lanes) {
        vec weights = load(w + (n + j) * K + k);
        UNROLL for (int m = 0; m < M; m++) sums[m][j] += *(const vec *)(a + m * K + k) * weights;
      }
  for (int k = K / V * V; k < K; k++)
    UNROLL for (int j = 0; j < LANES; j++)
      if (j < lanes)
        UNROLL for (int m = 0; m < M; m++) tails[m][j] += a[m * K + k] * load1(w + (n + j) * K + k);
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int j = 0; j < LANES; j++)
      if (j < lanes) y[m * N + n + j] = tails[m][j] + sum_vec(sums[m][j]);
}

KERNEL NAME(float *restrict y, const float *restrict a, const WEIGHT *restrict w BIAS_ARGUMENT RESIDUAL_ARGUMENT
                NORM_WEIGHT_ARGUMENT NORM_BIAS_ARGUMENT, int slice) {
  const long first = FIRST(N / LANES) * LANES, last = slice == SLICES - 1 ? N : LAST(N / LANES) * LANES;
#ifdef NORM_WEIGHT
  float normalised[M * K] __attribute__((aligned(64)));
  for (int m = 0; m < M; m++) {
    float mean = mean_of(a + m * K, K), scale = scale_of(a + m * K, K, mean, EPSILON);
    for (int k = 0; k < K; k++)
#ifdef NORM_BIAS
      normalised[m * K + k] = (a[m * K + k] - mean) * scale * load1(norm_weight + k) + load1(norm_bias + k);
#else
      normalised[m * K + k] = (a[m * K + k] - mean) * scale * load1(norm_weight + k);
#endif
  }
  a = normalised;
#endif
  for (int batch = 0; batch < BATCH; batch++, a += M * K, w += (long)N * K, y += M * N) {
    long n = first;
    for (; n + LANES <= last; n += LANES) dots(y, a, w, n, LANES);
    for (; n < last; n++) dots(y, a, w, n, 1);
    for (int m = 0; m < M; m++)
      for (n = first; n < last; n += V) {
        const int some = MIN(V, last - n);
        vec value = some == V ? load(y + m * N + n) : load_some(y + m * N + n, some, 0);
#ifdef BIAS
        value += some == V ? load(bias + n) : load_some(bias + n, some, 0);
#endif
        if (GELU) value = gelu(value);
#if RESIDUAL
        value += some == V ? load(residual + m * N + n) : load_some(residual + m * N + n, some, 0);
#endif
        if (some == V)
          *(vec *)(y + m * N + n) = value;
        else
          store_some(y + m * N + n, value, some);
      }
  }
}
