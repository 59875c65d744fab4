// c[b] = a[b] · w[b] for BATCH pairs of matrices: c is (M, N) row by row; element (m, k) of a is a[m * AMS + k * AKS],
// element (k, n) of w is w[k * WKS + n * WNS]. With BIAS, bias[n] is added. Sums are kept in float32 whatever the type of w.
//
// Method: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008: a block of w is copied into a
// panel that the second cache holds; rows of a, in the first, meet all of it; a tile of c stays in registers meanwhile.

// With more rows than these some compilations keep sums in memory, at half the speed.
#if V == 16
#define MOST_ROWS 12
#elif V == 8
#define MOST_ROWS 6
#else
#define MOST_ROWS 8
#endif
#define VECTORS 2
#define COLUMNS (V * VECTORS)

#define UP(n, unit) (((n) + (unit)-1) / (unit) * (unit))
#define PIECES(n, most) (((n) + (most)-1) / (most))
#define COST(rows) (M / (rows) * (rows) + (M % (rows) == 0 ? 0 : M % (rows) > MOST_ROWS / 2 ? M % (rows) : MOST_ROWS / 2))
#define BETTER(one, other) (COST(one) * 32 <= COST(other) * 33 ? (one) : (other))
enum {
  // A tile's rows: as many as the registers hold, or a few less where that leaves a better rest.
  ROWS = BETTER(MOST_ROWS, BETTER(MOST_ROWS - 1, BETTER(MOST_ROWS - 2, MOST_ROWS - 3))),
  DEPTH = UP(PIECES(K, PIECES(K, 128)), V),        // the sum in equal pieces
  PANEL = 96 * 1024 / DEPTH / COLUMNS * COLUMNS,   // columns of w at a time: on the stack, and some threads have 512 kB
  WIDTH = UP(PIECES(N, PIECES(N, PANEL)), COLUMNS),
};

#if BIAS
#define ARGUMENTS float *restrict c, const float *restrict a, const WEIGHT *restrict w, const float *restrict bias, int slice
PART float bias_of(const float *bias, long n) { return bias[n]; }
PART vec biases_of(const float *bias, long n) { return *(const vec *)(bias + n); }
#else
#define ARGUMENTS float *restrict c, const float *restrict a, const WEIGHT *restrict w, int slice
PART float bias_of(const float *bias, long n) { return 0; }
PART vec biases_of(const float *bias, long n) { return 0; }
#endif

// Where a tile finds a and w. What is small stays where it is. What is stored row by row along the sum (a with AKS 1) does,
// too, unless its rows are so far apart that they fall on one another in the cache: then they are copied closer.
#define SMALL 8192  // floats that stay in the first cache
#define A_IN_PLACE (M * K <= SMALL || (AKS == 1 && AMS % 512))
#define W_IN_PLACE (WNS == 1 && N * K <= SMALL && N % COLUMNS == 0 && !W_NARROW)
#if A_IN_PLACE
#define A_ROW AMS
#define A_STEP AKS
#elif AKS == 1
#define A_ROW (DEPTH + V)  // not a power of two
#define A_STEP 1
#else
#define A_ROW 1
#define A_STEP ROWS
#endif
#if W_IN_PLACE
#define W_STEP WKS
#else
#define W_STEP COLUMNS
#endif

// The k-th product of each of a tile's sums. The panel's rows come from the second cache: they are asked for AHEAD of time.
#define AHEAD 6
PART void step(const int rows, vec sums[ROWS][VECTORS], const float *restrict a, const float *restrict w, int k) {
  vec row[VECTORS];
  UNROLL for (int j = 0; j < VECTORS; j++) {
    row[j] = *(const vec *)(w + k * W_STEP + j * V);
    if (!W_IN_PLACE) __builtin_prefetch(w + (k + AHEAD) * W_STEP + j * V);
  }
  UNROLL for (int i = 0; i < rows; i++)
    UNROLL for (int j = 0; j < VECTORS; j++) sums[i][j] += a[(long)i * A_ROW + k * A_STEP] * row[j];
}

// One tile of c: rows x COLUMNS sums in registers, `depth` products each; `columns` of them are stored. The rows of c are
// asked for one by one on the way: all at once they would hold up the panel's.
#define STEPS 4
PART void tile_of(const int rows, float *restrict c, const float *restrict a, const float *restrict w, const float *bias, int depth,
                  int columns, int add) {
  vec sums[ROWS][VECTORS];
  UNROLL for (int i = 0; i < rows; i++)
    UNROLL for (int j = 0; j < VECTORS; j++) sums[i][j] = 0;
  int k = 0;
  for (; k + STEPS <= depth; k += STEPS) {
    if (k / STEPS < rows) UNROLL for (int j = 0; j < VECTORS; j++) __builtin_prefetch(c + (long)(k / STEPS) * N + j * V, 1);
    UNROLL for (int i = 0; i < STEPS; i++) step(rows, sums, a, w, k + i);
  }
  for (; k < depth; k++) step(rows, sums, a, w, k);
  if (columns == COLUMNS) {
    UNROLL for (int i = 0; i < rows; i++)
      UNROLL for (int j = 0; j < VECTORS; j++) {
        vec *to = (vec *)(c + (long)i * N + j * V);
        *to = sums[i][j] + (add ? *to : biases_of(bias, j * V));
      }
  } else {
    UNROLL for (int i = 0; i < rows; i++) {
      float out[COLUMNS];
      UNROLL for (int j = 0; j < VECTORS; j++) *(vec *)(out + j * V) = sums[i][j];
      for (int j = 0; j < columns; j++) c[(long)i * N + j] = out[j] + (add ? c[(long)i * N + j] : bias_of(bias, j));
    }
  }
}

// The last rows of c may be fewer than a tile has.
PART void tile(float *restrict c, const float *restrict a, const float *restrict w, const float *bias, int depth, int rows, int columns,
               int add) {
  if (rows == ROWS)
    tile_of(ROWS, c, a, w, bias, depth, columns, add);
  else
    tile_of(M % ROWS, c, a, w, bias, depth, columns, add);
}

// V columns of w, V long, to rows COLUMNS apart.
PART void transpose(float *restrict to, const WEIGHT *restrict w) {
  vec x[V];
  UNROLL for (int i = 0; i < V; i++) x[i] = load(w + (long)i * WNS);
  transpose_vecs(x);
  UNROLL for (int i = 0; i < V; i++) *(vec *)(to + i * COLUMNS) = x[i];
}

// `width` columns of w, COLUMNS at a time (those past the last are zeros), each k by k. Where memory has them k by k it is
// read in that order: rows far apart are slow to come.
PART void pack_w(float *restrict to, const WEIGHT *restrict w, int depth, int width) {
#if WNS == 1
  for (int k = 0; k < depth; k++)
    for (int n = 0; n < width; n += COLUMNS) {
      float *row = to + n * DEPTH + k * COLUMNS;
      if (n + COLUMNS <= width)
        UNROLL for (int j = 0; j < VECTORS; j++) *(vec *)(row + j * V) = load(w + (long)k * WKS + n + j * V);
      else
        for (int j = 0; j < COLUMNS; j++) row[j] = n + j < width ? load1(w + (long)k * WKS + n + j) : 0;
    }
#else
  for (int n = 0; n < width; n += COLUMNS, to += COLUMNS * DEPTH, w += COLUMNS * WNS) {
    int columns = MIN(COLUMNS, width - n), done = 0;
    if (columns == COLUMNS)
      for (; done + V <= depth; done += V)
        for (int j = 0; j < COLUMNS; j += V) transpose(to + done * COLUMNS + j, w + (long)j * WNS + done);
    for (int j = 0; j < COLUMNS; j++)
      for (int k = done; k < depth; k++) to[k * COLUMNS + j] = j < columns ? load1(w + (long)j * WNS + k) : 0;
  }
#endif
}

// `rows` rows of a: row by row if they are stored so, else k by k. The m-th of a is the first of them.
PART void pack_a(float *restrict to, const float *restrict a, int depth, int m, int rows) {
#if AKS == 1
  for (int i = 0; i < rows; i++) {
    int k = 0;
    for (; k + V <= depth; k += V) *(vec *)(to + i * A_ROW + k) = *(const vec *)(a + (long)i * AMS + k);
    for (; k < depth; k++) to[i * A_ROW + k] = a[(long)i * AMS + k];
  }
#else
  for (int k = 0; k < depth; k++)
    if (ROWS <= V && m + V <= M)
      *(vec *)(to + k * ROWS) = *(const vec *)(a + (long)k * AKS);  // more than a tile's rows: the next k writes over the rest
    else
      for (int i = 0; i < rows; i++) to[k * ROWS + i] = a[(long)k * AKS + i];
#endif
}

// One of `shares` parts of a strip of a, asked for from memory before it is needed.
PART void prefetch_a(const float *a, int depth, int share, int shares) {
#if AKS == 1
  for (int k = depth / 16 * share / shares * 16; k < depth / 16 * (share + 1) / shares * 16; k += 16)
    UNROLL for (int i = 0; i < ROWS; i++) __builtin_prefetch(a + (long)i * AMS + k);
#else
  for (int k = depth * share / shares; k < depth * (share + 1) / shares; k++) {
    __builtin_prefetch(a + (long)k * AKS);
    __builtin_prefetch(a + (long)k * AKS + ROWS - 1);
  }
#endif
}

// The part of c from (m_first, n_first) to before (m_last, n_last).
PART void part(float *restrict c, const float *restrict a, const WEIGHT *restrict w, const float *bias, int m_first, int m_last,
               int n_first, int n_last) {
  float panel_a[A_IN_PLACE ? 1 : ROWS * (DEPTH + V)] __attribute__((aligned(64)));
  float panel_w[W_IN_PLACE ? 1 : WIDTH * DEPTH] __attribute__((aligned(64)));
  for (int n0 = n_first; n0 < n_last; n0 += WIDTH) {
    int width = MIN(WIDTH, n_last - n0);
    for (int k0 = 0; k0 < K; k0 += DEPTH) {
      int depth = MIN(DEPTH, K - k0);
      const WEIGHT *ws = w + (long)k0 * WKS + (long)n0 * WNS;
      if (!W_IN_PLACE) pack_w(panel_w, ws, depth, width);
      for (int m = m_first; m < m_last; m += ROWS) {
        int rows = MIN(ROWS, m_last - m);
        const float *strip = a + (long)m * AMS + (long)k0 * AKS;
        if (!A_IN_PLACE) pack_a(panel_a, strip, depth, m, rows);
        for (int n = 0; n < width; n += COLUMNS) {
          if (M * K > SMALL && m + 2 * ROWS <= m_last) prefetch_a(strip + (long)ROWS * AMS, depth, n / COLUMNS, PIECES(width, COLUMNS));
          tile(c + (long)m * N + n0 + n, A_IN_PLACE ? strip : panel_a, W_IN_PLACE ? (const float *)ws + n : panel_w + n * DEPTH,
               BIAS ? bias + n0 + n : bias, depth, rows, MIN(COLUMNS, width - n), k0 > 0);
        }
      }
    }
  }
}

// Each c[b] is PARTS_M x PARTS_N parts of whole tiles; a slice has some of all these.
KERNEL NAME(ARGUMENTS) {
#if !BIAS
  const float *bias = 0;
#endif
  const long rows = (M + ROWS - 1) / ROWS, columns = (N + COLUMNS - 1) / COLUMNS;
  for (long i = FIRST(BATCH * PARTS_M * PARTS_N); i < LAST(BATCH * PARTS_M * PARTS_N); i++) {
    long batch = i / (PARTS_M * PARTS_N), m = i / PARTS_N % PARTS_M, n = i % PARTS_N;
    part(c + batch * M * N, a + batch * M * K, w + batch * K * N, bias, rows * m / PARTS_M * ROWS,
         MIN(M, rows * (m + 1) / PARTS_M * ROWS),
         columns * n / PARTS_N * COLUMNS, MIN(N, columns * (n + 1) / PARTS_N * COLUMNS));
  }
}
