// y = finish(a · wᵀ) for a few rows of a, (M, K), and w, (N, K), BATCH times. Every weight is read once, in
// order, at the speed of memory. `finish` adds the bias, applies GELU and adds the residual, (M, N).
//
// NORM_WEIGHT: each row of a is first normalised, as in layernorm.c. BITS: w is quantised, see quantized.h, and a
// is rounded unless FLOATS is 1. UNIT_SIZE: w is in tiles, see tiles.h. BFLOAT16: a is rounded to it, see bfloat16.h.

#if BIAS
#define BIASES(n, some) get(bias + (n), some, 0)
#else
#define BIASES(n, some) (vec)0
#endif
#if AMX_PAIRS && !UNIT_SIZE
#define TILE 32
#endif
#if UNIT_SIZE || AMX_PAIRS
#define COLUMNS TILE  // of y that are computed together
#else
#define COLUMNS V
#endif
#if !defined(BITS) || FLOATS
// The sums over k have the order of matmul.c, and so the same bits for any number of rows.
#define DEPTH (PER_LANE * SUMMED(LANES))
#define A_ROW (BFLOAT16 ? UP(LANES, V) : K)
#endif
#if AMX_PAIRS
// TILE columns of y from column n on. Rows of w that are not in tiles are copied first. The sums begin with `start`.
PART void columns(output y, input a, const WEIGHT *restrict w, long n, const vec *start) {
  float copy[V * TILE] __attribute__((aligned(64))), sums[M * TILE] __attribute__((aligned(64)));
  amx_load(start, 0, M);
  for (int lane = 0; lane < LANES; lane += V) {
#if UNIT_SIZE
    const float *from = (const float *)WEIGHTS_AT(w, n, lane * PER_LANE);
    if (lane + V > LANES) {
      for (int i = 0; i < V * TILE; i++) copy[i] = i < (LANES - lane) * TILE ? from[i] : 0;
      from = copy;
    }
#else
    const float *from = copy;
    const int k = lane * PER_LANE;
    UNROLL for (int j = 0; j < TILE; j += V) {
      const float *rows[V];
      vec x[V];
      EACH(i, V) rows[i] = (const float *)(w + MIN(n + j + i, N - 1) * K + k);
      EACH(i, V) __builtin_prefetch(w + (n + TILE + j + i) * K + k, 0, 2);
      if (k + V * PER_LANE <= K)
        load_transposed(x, rows);
      else
        EACH(i, V) x[i] = 0;
      if (k + V * PER_LANE > K)
        for (int l = 0; l < LANES - lane; l++)
          EACH(i, V) x[l][i] = ACROSS((const WEIGHT *)rows[i] + l * PER_LANE, 1, K - k - l * PER_LANE, 1)[0];
      EACH(i, V) store(copy + i * TILE + j, x[i]);
    }
#endif
    AMX_PRODUCTS("tdpbf16ps", a + lane, 4L * A_ROW, from, 4L * TILE, M);
  }
  amx_store(sums, 4L * TILE, M);
  for (int i = 0; i < M * (TILE / V); i++) {
    const long at = n + i % (TILE / V) * V;
    put(y + i / (TILE / V) * N + at, load(sums + i * V), N - at);
  }
}
#elif UNIT_SIZE
// The registers hold SUMS sums, of ROWS rows of a and VECTORS vectors of columns. Each addition to a sum waits for the
// last one, so as many sums as possible are computed together.
#define SUMS (V == 16 ? 24 : 12)
#define VECTORS (M * TILE / V <= SUMS ? TILE / V : 2)
#define ROWS EQUAL_PIECE(M, SUMS / VECTORS, 1)

// Add `lanes` products to the sums of `rows` rows of a, with VECTORS · V columns of w.
PART void add_units(const int rows, vec *totals, input a, const WEIGHT *restrict w, int lanes) {
  vec sums[ROWS][VECTORS];
  EACH(m, rows) EACH(v, VECTORS) sums[m][v] = 0;
  for (int lane = 0; lane < lanes; lane += UNIT_LANES, w += TILE * UNIT_SIZE) {
    vec x[VECTORS][UNIT_LANES];
    EACH(v, VECTORS) unit_at(x[v], w + v * V * UNIT_SIZE);
    EACH(i, UNIT_LANES) EACH(m, rows) EACH(v, VECTORS) sums[m][v] = MULTIPLY_ADD(sums[m][v], (vec)a[m * A_ROW + lane + i], x[v][i]);
  }
  EACH(m, rows) EACH(v, VECTORS) totals[m * (TILE / V) + v] += sums[m][v];
}

// The columns of y for one tile of w, from column n on. The sums begin with `start`.
PART void columns(output y, input a, const WEIGHT *restrict w, long n, const vec *start) {
  vec totals[M * (TILE / V)];
  for (int i = 0; i < M * (TILE / V); i++) totals[i] = start[i % (TILE / V)];
  for (int lane = 0; lane < LANES; lane += DEPTH / PER_LANE)
    for (int v = 0; v < TILE / V; v += VECTORS) {
      const WEIGHT *from = WEIGHTS_AT(w, n + v * V, lane * PER_LANE);
      const int lanes = MIN(DEPTH / PER_LANE, LANES - lane);
      for (int m = 0; m + ROWS <= M; m += ROWS) add_units(ROWS, totals + m * (TILE / V) + v, a + m * A_ROW + lane, from, lanes);
      const int m = M / ROWS * ROWS;
      if (m < M) add_units(M % ROWS, totals + m * (TILE / V) + v, a + m * A_ROW + lane, from, lanes);
    }
  for (int i = 0; i < M * (TILE / V); i++) {
    const long at = n + i % (TILE / V) * V;
    put(y + i / (TILE / V) * N + at, totals[i], N - at);
  }
}

#elif !defined(BITS) || FLOATS
#define ROWS MIN(M, 8)  // rows of a whose sums the registers hold

// Add `depth` products to the sums of `rows` rows of a, with the same V columns of w.
PART void add_products(const int rows, const int depth, vec *sums, input a, const vec *w) {
  vec added[ROWS];
  EACH(m, rows) added[m] = sums[m];
  EACH(i, depth) EACH(m, rows) added[m] = MULTIPLY_ADD(added[m], (vec)a[m * A_ROW + i], w[i]);
  EACH(m, rows) sums[m] = added[m];
}
PART void add_to_all(const int depth, vec sums[M], input a, const vec *w) {
  for (int m = 0; m + ROWS <= M; m += ROWS) add_products(ROWS, depth, sums + m, a + m * A_ROW, w);
  if (M % ROWS) add_products(M % ROWS, depth, sums + M / ROWS * ROWS, a + M / ROWS * ROWS * A_ROW, w);
}

#endif
#if !UNIT_SIZE && !defined(BITS) && !AMX_PAIRS
// V columns of y, or only `some` if `all` is 0: V rows of w at a time are transposed in registers. With `more`, the
// next V rows are prefetched. The sums begin with `start`. Pairs of bfloat16 are transposed as floats are.
#if PER_LANE == 2
#define LANE float
#else
#define LANE WEIGHT
#endif
PART void columns(output y, input a, const WEIGHT *restrict w, vec start, const int all, int some, int more) {
  vec totals[M];
  EACH(m, M) totals[m] = start;
  for (int k0 = 0; k0 < K; k0 += DEPTH) {
    vec sums[M];
    EACH(m, M) sums[m] = 0;
    int k = k0, end = MIN(K, k0 + DEPTH);
    for (; k + V * PER_LANE <= end; k += V * PER_LANE) {
      vec x[V];
      if (more) {
        UNROLL for (int byte = 0; byte < V * V * (int)sizeof(LANE); byte += 64)
          __builtin_prefetch((const char *)(w + (long)V * K + (long)k * V) + byte, 0, 2);
      }
      const LANE *from[V];
      EACH(i, V) from[i] = (const LANE *)(w + (long)(all ? i : MIN(i, some - 1)) * K + k);
      load_transposed(x, from);
      add_to_all(V, sums, a + k / PER_LANE, x);
    }
    for (; k < end; k += PER_LANE) {
      vec x;
      EACH(i, V) x[i] = ACROSS(w + (long)(all ? i : MIN(i, some - 1)) * K + k, 1, K - k, 1)[0];
      add_to_all(1, sums, a + k / PER_LANE, &x);
    }
    for (int m = 0; m < M; m++) totals[m] += sums[m];
  }
  for (int m = 0; m < M; m++) put(y + m * N, totals[m], all ? V : some);
}
#elif FLOATS
// `some` columns of y, at most V, from one tile of w. The sums begin with `start`.
PART void columns(output y, input a, struct row row, vec start, int some) {
  vec totals[M], sums[M];
  EACH(m, M) totals[m] = start, sums[m] = 0;
  for (int k = 0; k < K; k += 4) {
    if (k % DEPTH == 0)
      for (int m = 0; m < M; m++) {
        totals[m] += sums[m];
        sums[m] = 0;
      }
    vec numbers[4];
    four_numbers(numbers, row, k, some);
    if (k + 4 <= K)
      add_to_all(4, sums, a + k, numbers);
    else
      for (int i = 0; i < K - k; i++) add_to_all(1, sums, a + k + i, numbers + i);
  }
  for (int m = 0; m < M; m++) put(y + m * N, totals[m] + sums[m], some);
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
#if AMX_PAIRS
  amx_begin(M, V);
#endif
#if defined(BITS) && !FLOATS
  struct rounded rounded[M];
  for (int m = 0; m < M; m++) round_row(rounded + m, a + m * K);
#endif
  for (int batch = 0; batch < BATCH; batch++, a += M * K, w += (long)N * K, y += M * N) {
#if BFLOAT16
    float factors[M * A_ROW] __attribute__((aligned(64)));
    for (int m = 0; m < M; m++)
      for (int lane = 0; lane < LANES; lane += V)
        store(factors + m * A_ROW + lane, ALONG(a + m * K + lane * PER_LANE, K - lane * PER_LANE));
#define FACTORS factors
#else
#define FACTORS a
#endif
    const long first = FIRST(PIECES(N, COLUMNS)) * COLUMNS, last = MIN(N, LAST(PIECES(N, COLUMNS)) * COLUMNS);
    long n = first;
#if UNIT_SIZE || AMX_PAIRS
    for (; n < last; n += TILE) {
      vec start[TILE / V];
      EACH(v, TILE / V) start[v] = BIASES(n + v * V, N - n - v * V);
      columns(y, FACTORS, w, n, start);
    }
#elif FLOATS
    for (; n < last; n += V) columns(y + n, a, row_at(w, scales, n), BIASES(n, last - n), last - n);
#elif defined(BITS)
    for (; n < last; n += V) columns(y + n, rounded, row_at(w, scales, n), last - n);
#else
    for (; n + V <= last; n += V) columns(y + n, FACTORS, w + n * K, BIASES(n, V), 1, V, n + 2 * V <= last);
    if (n < last) columns(y + n, FACTORS, w + n * K, BIASES(n, last - n), 0, last - n, 0);
#endif
    for (int m = 0; m < M; m++)
      for (n = first; n < last; n += V) {
        const long some = last - n;
        vec value = get(y + m * N + n, some, 0);
#if BIAS && defined(BITS) && !FLOATS
        value += get(bias + n, some, 0);
#endif
        if (GELU) value = gelu(value);
#if RESIDUAL
        value += get(residual + m * N + n, some, 0);
#endif
        put(y + m * N + n, value, some);
      }
  }
#if AMX_PAIRS
  amx_end();
#endif
}
