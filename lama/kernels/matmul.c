// c[b] = a[b] · w[b] for BATCH pairs of matrices: c is (M, N) row by row; element (m, k) of a is a[m * AMS + k * AKS],
// element (k, n) of w is w[k * WKS + n * WNS]. Sums are kept in float32 whatever the type of w.
//
// Method: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008: blocks of a and w are copied
// into panels that fit the caches, and a tile of c stays in registers while a panel of each is read once.

#if V == 16
#define ROWS 12
#elif V == 8
#define ROWS 6
#else
#define ROWS 8
#endif
#define VECTORS 2
#define COLUMNS (V * VECTORS)
#define DEPTH 192
#define HEIGHT (ROWS * 8)
#define WIDTH (COLUMNS * (256 / COLUMNS))  // the panels are on the stack: 270 kB, and some threads have 512

#if W_IS_HALF
typedef _Float16 stored __attribute__((ext_vector_type(V), aligned(2)));
PART vec load(const WEIGHT *w) { return __builtin_convertvector(*(const stored *)w, vec); }
PART float load1(const WEIGHT *w) { return (float)*w; }
#elif W_IS_BFLOAT16
typedef unsigned short stored __attribute__((ext_vector_type(V), aligned(2)));
typedef unsigned int wide __attribute__((ext_vector_type(V)));
PART vec load(const WEIGHT *w) { return (vec)(__builtin_convertvector(*(const stored *)w, wide) << 16); }
PART float load1(const WEIGHT *w) { union { unsigned int bits; float value; } u = {(unsigned int)*w << 16}; return u.value; }
#else
PART vec load(const WEIGHT *w) { return *(const vec *)w; }
PART float load1(const WEIGHT *w) { return *w; }
#endif

#if M <= 4 && AKS == 1 && WKS == 1
// A few rows of a against w stored row by row: every weight is read once, in order, as fast as memory gives it.
#define LANES 4
PART void dots(float *restrict c, const float *restrict a, const WEIGHT *restrict w, int n, int lanes) {
  vec sums[M][LANES];
  float tails[M][LANES];
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int j = 0; j < LANES; j++) { sums[m][j] = 0; tails[m][j] = 0; }
  for (int k = 0; k + V <= K; k += V)
    UNROLL for (int j = 0; j < LANES; j++)
      if (j < lanes) {
        vec weights = load(w + (long)(n + j) * WNS + k);
        UNROLL for (int m = 0; m < M; m++) sums[m][j] += *(const vec *)(a + m * AMS + k) * weights;
      }
  for (int k = K / V * V; k < K; k++)
    UNROLL for (int j = 0; j < LANES; j++)
      if (j < lanes)
        UNROLL for (int m = 0; m < M; m++) tails[m][j] += a[m * AMS + k] * load1(w + (long)(n + j) * WNS + k);
  UNROLL for (int m = 0; m < M; m++)
    UNROLL for (int j = 0; j < LANES; j++)
      if (j < lanes) c[(long)m * N + n + j] = tails[m][j] + sum_vec(sums[m][j]);
}

KERNEL NAME(float *restrict c, const float *restrict a, const WEIGHT *restrict w, int slice) {
  for (int batch = 0; batch < BATCH; batch++, a += (long)M * K, w += (long)N * K, c += (long)M * N) {
    for (int n = FIRST(N / LANES) * LANES; n < LAST(N / LANES) * LANES; n += LANES) dots(c, a, w, n, LANES);
    if (slice == 0)
      for (int n = N / LANES * LANES; n < N; n++) dots(c, a, w, n, 1);
  }
}

#else
// One tile of c: ROWS x COLUMNS sums in registers, `depth` products each; `rows` and `columns` of them are stored.
PART void tile(float *restrict c, const float *restrict a, const float *restrict w, int depth, int rows, int columns, int add) {
  vec sums[ROWS][VECTORS];
  UNROLL for (int i = 0; i < ROWS; i++)
    UNROLL for (int j = 0; j < VECTORS; j++) sums[i][j] = 0;
  for (int k = 0; k < depth; k++) {
    vec row[VECTORS];
    UNROLL for (int j = 0; j < VECTORS; j++) row[j] = *(const vec *)(w + k * COLUMNS + j * V);
    UNROLL for (int i = 0; i < ROWS; i++)
      UNROLL for (int j = 0; j < VECTORS; j++) sums[i][j] += a[k * ROWS + i] * row[j];
  }
  if (rows == ROWS && columns == COLUMNS) {
    UNROLL for (int i = 0; i < ROWS; i++)
      UNROLL for (int j = 0; j < VECTORS; j++) {
        vec *to = (vec *)(c + (long)i * N + j * V);
        *to = add ? *to + sums[i][j] : sums[i][j];
      }
  } else {
    float out[ROWS][COLUMNS];
    UNROLL for (int i = 0; i < ROWS; i++)
      UNROLL for (int j = 0; j < VECTORS; j++) *(vec *)(out[i] + j * V) = sums[i][j];
    for (int i = 0; i < rows; i++)
      for (int j = 0; j < columns; j++) c[(long)i * N + j] = add ? c[(long)i * N + j] + out[i][j] : out[i][j];
  }
}

// COLUMNS columns of w (those past `columns` are zeros), k by k.
PART void pack_w(float *restrict to, const WEIGHT *restrict w, int depth, int columns) {
#if WNS == 1
  for (int k = 0; k < depth; k++) {
    if (columns == COLUMNS)
      UNROLL for (int j = 0; j < VECTORS; j++) *(vec *)(to + k * COLUMNS + j * V) = load(w + (long)k * WKS + j * V);
    else
      for (int j = 0; j < COLUMNS; j++) to[k * COLUMNS + j] = j < columns ? load1(w + (long)k * WKS + j) : 0;
  }
#else
  for (int j = 0; j < COLUMNS; j++)
    for (int k = 0; k < depth; k++) to[k * COLUMNS + j] = j < columns ? load1(w + (long)j * WNS + (long)k * WKS) : 0;
#endif
}

// ROWS rows of a (those past `rows` are zeros), k by k.
PART void pack_a(float *restrict to, const float *restrict a, int depth, int rows) {
#if AMS == 1
  for (int k = 0; k < depth; k++)
    for (int i = 0; i < ROWS; i++) to[k * ROWS + i] = i < rows ? a[(long)k * AKS + i] : 0;
#else
  for (int i = 0; i < ROWS; i++)
    for (int k = 0; k < depth; k++) to[k * ROWS + i] = i < rows ? a[(long)i * AMS + (long)k * AKS] : 0;
#endif
}

// The part of c from (m_first, n_first) to before (m_last, n_last).
PART void part(float *restrict c, const float *restrict a, const WEIGHT *restrict w, int m_first, int m_last, int n_first, int n_last) {
  float panels_a[HEIGHT * DEPTH], panels_w[DEPTH * WIDTH];
  for (int k0 = 0; k0 < K; k0 += DEPTH) {
    int depth = MIN(DEPTH, K - k0);
    for (int n0 = n_first; n0 < n_last; n0 += WIDTH) {
      int width = MIN(WIDTH, n_last - n0);
      for (int n = 0; n < width; n += COLUMNS)
        pack_w(panels_w + n * DEPTH, w + (long)k0 * WKS + (long)(n0 + n) * WNS, depth, MIN(COLUMNS, width - n));
      for (int m0 = m_first; m0 < m_last; m0 += HEIGHT) {
        int height = MIN(HEIGHT, m_last - m0);
        for (int m = 0; m < height; m += ROWS)
          pack_a(panels_a + m * DEPTH, a + (long)(m0 + m) * AMS + (long)k0 * AKS, depth, MIN(ROWS, height - m));
        for (int n = 0; n < width; n += COLUMNS)
          for (int m = 0; m < height; m += ROWS)
            tile(c + (long)(m0 + m) * N + n0 + n, panels_a + m * DEPTH, panels_w + n * DEPTH, depth, MIN(ROWS, height - m),
                 MIN(COLUMNS, width - n), k0 > 0);
      }
    }
  }
}

// Each c[b] is PARTS_M x PARTS_N parts of whole tiles; a slice has some of all these.
KERNEL NAME(float *restrict c, const float *restrict a, const WEIGHT *restrict w, int slice) {
  const long rows = (M + ROWS - 1) / ROWS, columns = (N + COLUMNS - 1) / COLUMNS;
  for (long i = FIRST(BATCH * PARTS_M * PARTS_N); i < LAST(BATCH * PARTS_M * PARTS_N); i++) {
    long batch = i / (PARTS_M * PARTS_N), m = i / PARTS_N % PARTS_M, n = i % PARTS_N;
    part(c + batch * M * N, a + batch * M * K, w + batch * K * N, rows * m / PARTS_M * ROWS, MIN(M, rows * (m + 1) / PARTS_M * ROWS),
         columns * n / PARTS_N * COLUMNS, MIN(N, columns * (n + 1) / PARTS_N * COLUMNS));
  }
}
#endif
