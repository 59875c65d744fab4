// c[b] = a[b] · w[b] for BATCH pairs of matrices: c is (M, N), row after row. Element (m, k) of a is a[m * AMS +
// k * AKS], element (k, n) of w is w[k * WKS + n * WNS]. Sums are float32 whatever the type of w.
//
// BIAS: bias[n] is added. GELU: it is then applied, and its derivative written to `slopes`, (M, N).
// FACTOR: c is multiplied by `factors`, (M, N). BFLOAT16: a and w are rounded as they are packed; a lane along k
// may then be a pair, see bfloat16.h. UNIT_SIZE: w, one for all a, is in tiles, see tiles.h. QUANTIZED: element
// (k, n) of w is number k of its row n, or with WNS 1 number n of its row k, see quantized.h.
//
// Method: Goto and van de Geijn, Anatomy of High-Performance Matrix Multiplication, 2008: a block of w is packed
// into a panel in the L2 cache. Rows of a, in the L1 cache, are multiplied by all of it, while a tile of c stays
// in registers.

// With more rows some compilers keep sums in memory, at half the speed.
#if V == 16
#define MOST_ROWS 12
#elif V == 8
#define MOST_ROWS 6
#else
#define MOST_ROWS 8
#endif
#define VECTORS 2
#define COLUMNS (V * VECTORS)

#define COST(rows) (M / (rows) * (rows) + (M % (rows) == 0 ? 0 : M % (rows) > MOST_ROWS / 2 ? M % (rows) : MOST_ROWS / 2))
#define BETTER(one, other) (COST(one) * 32 <= COST(other) * 33 ? (one) : (other))
enum {
#if AMX_PAIRS
  ROWS = 32,  // a tile is a square of sums: see amx.h
  DEPTH = EQUAL_PIECE(LANES, 256, V),
  PANEL = 192 * 1024 / DEPTH / COLUMNS * COLUMNS,  // a processor with AMX has an L2 cache of 2 MB
#else
  // A tile's rows: as many as the registers hold, or a few less if the last tile is then more complete.
  ROWS = BETTER(MOST_ROWS, BETTER(MOST_ROWS - 1, BETTER(MOST_ROWS - 2, MOST_ROWS - 3))),
  // A packed a whose columns are consecutive must fit in the L1 cache beside the panel's rows.
  DEPTH = AKS == 1 ? SUMMED(LANES) : EQUAL_PIECE(LANES, 128, V),
  // Columns of w at a time: they are on the stack, which for some threads has 512 kB.
  PANEL = 96 * 1024 / DEPTH / COLUMNS * COLUMNS,
#endif
  WIDTH = EQUAL_PIECE(N, PANEL, COLUMNS),
  // Rows of c at a time: they stay in the L3 cache between two pieces of the sum.
  HEIGHT = 1536 / ROWS * ROWS,
};

// Where a tile reads a and w. Small matrices are not packed. Nor is an a whose rows are contiguous (AKS 1), unless
// their distance makes them share places in the cache.
#define SMALL 8192  // floats that stay in the L1 cache
#define SIZE(rows, columns) (1L * (rows) * (columns))
#define NEAR(size) ((size) <= 512 * 1024)  // in the L2 cache, or not far from it
#define A_IN_PLACE (!BFLOAT16 && (SIZE(M, K) <= SMALL || (AKS == 1 ? AMS % 1024 : NEAR(SIZE(M, K)))))
#define K_BY_K (A_IN_PLACE && AKS != 1 && SIZE(M, K) > SMALL)
#if AMX_PAIRS && UNIT_SIZE == PER_LANE && TILE == COLUMNS && LANES % V == 0
#define W_IN_PLACE 1
#define IN_PLACE(w, k, n) (const float *)WEIGHTS_AT(w, n, k)
#define W_COLUMN LANES  // floats from one column to the next
#else
#define W_IN_PLACE (WNS == 1 && SIZE(N, K) <= SMALL && N % COLUMNS == 0 && !W_NARROW && !BFLOAT16)
#define IN_PLACE(w, k, n) (const float *)((w) + (long)(k) * WKS + (long)(n) * WNS)
#define W_COLUMN (W_IN_PLACE ? 1 : DEPTH)
#endif
#define WHOLE(numbers) (AMX_PAIRS ? UP(numbers, V * PER_LANE) : (numbers))  // numbers to pack, including zeros after the last
#if A_IN_PLACE
#define A_ROW AMS
#define A_STEP AKS
#elif AKS == 1 || AMX_PAIRS
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

#if !AMX_PAIRS
// Product k of each of a tile's sums. Data in the L2 cache is prefetched AHEAD steps before: the panel's rows, and
// columns of a that are read there.
#define AHEAD 6
PART void step(const int rows, vec sums[ROWS][VECTORS], input a, input w, int k) {
  vec row[VECTORS];
  EACH(j, VECTORS) {
    row[j] = load(w + k * W_STEP + j * V);
    if (!W_IN_PLACE) __builtin_prefetch(w + (k + AHEAD) * W_STEP + j * V);
  }
  if (K_BY_K) {
    __builtin_prefetch(a + (long)(k + AHEAD) * A_STEP);
    __builtin_prefetch(a + (long)(k + AHEAD) * A_STEP + ROWS - 1);
  }
  EACH(i, rows) {
    vec x = a[(long)i * A_ROW + k * A_STEP];
    EACH(j, VECTORS) sums[i][j] = MULTIPLY_ADD(sums[i][j], x, row[j]);
  }
}
#endif

// Turn complete sums into `rows` rows of c, `columns` of each. The sums are not read from c: it is slow to read and
// write in turn at equal offsets in two pages, as rows of c and of `slopes` have.
PART void finish(output c, output slopes, input factors, input sums, int rows, int columns) {
  for (int i = 0; i < rows; i++, c += N, slopes += N, factors += N)
    UNROLL for (int j = 0; j < COLUMNS; j += V) {
      int n = columns - j;
      if (n <= 0) break;
      vec x = load(sums + i * COLUMNS + j);
#if GELU
      vec slope, y = gelu_and_slope(x, &slope);
      put(slopes + j, slope, n);
#else
      vec y = x * get(factors + j, n, 0);
#endif
      put(c + j, y, n);
    }
}

#if AMX_PAIRS
// One tile of c: ROWS x COLUMNS sums, `depth` products each; `rows` x `columns` of them are written. Unless `add`, the
// sums of every row begin with `start`. Rows of c and of the other inputs of `finish` are prefetched.
#define NEXT (NEAR(SIZE(M, N)) ? 0 : COLUMNS)
PART void tile(output c, output slopes, input factors, input a, input w, const float *start, int depth, int rows, int columns, int add, int finishes) {
  float square[ROWS * COLUMNS] __attribute__((aligned(64)));
  const int is_whole = rows == ROWS && columns == COLUMNS;
  if (add && !is_whole)
    for (int i = 0; i < rows; i++)
      EACH(j, VECTORS) store(square + i * COLUMNS + j * V, get(c + (long)i * N + j * V, columns - j * V, 0));
  if (!add) amx_load(start, 0, ROWS);
  else if (is_whole) amx_load(c, 4L * N, ROWS);
  else amx_load(square, 4 * COLUMNS, ROWS);
  for (int k = 0; k < depth; k += V) {
    for (int i = k / 4; i < MIN(rows, k / 4 + 4); i++)
      EACH(j, VECTORS) {
        const long at = (long)i * N + NEXT + j * V;
        __builtin_prefetch(c + at, 1);
        if (GELU && finishes) __builtin_prefetch(slopes + at, 1);
        if (FACTOR && finishes) __builtin_prefetch(factors + at);
      }
    AMX_PRODUCTS("tdpbf16ps", a + k, 4L * A_ROW, w + k * COLUMNS, 4L * COLUMNS, ROWS);
  }
  if (is_whole && !finishes) {
    amx_store(c, 4L * N, ROWS);
    return;
  }
  amx_store(square, 4 * COLUMNS, ROWS);
  if (finishes)
    finish(c, slopes, factors, square, rows, columns);
  else
    for (int i = 0; i < rows; i++)
      EACH(j, VECTORS) if (columns > j * V) put(c + (long)i * N + j * V, load(square + i * COLUMNS + j * V), columns - j * V);
}
#else
// One tile of c: rows x COLUMNS sums in registers, `depth` products each; `columns` of a row are written. The rows
// of c and of the other inputs of `finish` are prefetched one by one: all at once would delay those of the panel.
// If c is large, the rows of the next tile are prefetched.
#define STEPS 4
#define EVERY (NEAR(SIZE(M, N)) || DEPTH < 2 * ROWS * STEPS ? STEPS : DEPTH / ROWS / STEPS * STEPS)
#define NEXT (NEAR(SIZE(M, N)) ? 0 : COLUMNS)
PART void tile_of(const int rows, output c, output slopes, input factors, input a, input w,
                  const float *bias, int depth, int columns, int add, int finishes) {
  vec sums[ROWS][VECTORS];
  EACH(i, rows) EACH(j, VECTORS) sums[i][j] = 0;
  int k = 0;
  for (; k + STEPS <= depth; k += STEPS) {
    if (k % EVERY == 0 && k / EVERY < rows)
      EACH(j, VECTORS) {
        long at = (long)(k / EVERY) * N + NEXT + j * V;
        __builtin_prefetch(c + at, 1);
        if (GELU && finishes) __builtin_prefetch(slopes + at, 1);
        if (FACTOR && finishes) __builtin_prefetch(factors + at);
      }
    EACH(i, STEPS) step(rows, sums, a, w, k + i);
  }
  for (; k < depth; k++) step(rows, sums, a, w, k);
  if (columns == COLUMNS) {
    EACH(i, rows) EACH(j, VECTORS) {
      float *to = c + (long)i * N + j * V;
      sums[i][j] += add ? load(to) : BIAS ? load(bias + j * V) : (vec)0;
      if (!finishes) store(to, sums[i][j]);
    }
  } else {
    EACH(i, rows) EACH(j, VECTORS) {
      int n = MIN(V, columns - j * V);
      float *to = c + (long)i * N + j * V;
      for (int v = 0; v < n; v++) sums[i][j][v] += add ? to[v] : BIAS ? bias[j * V + v] : 0;
      if (!finishes) for (int v = 0; v < n; v++) to[v] = sums[i][j][v];
    }
  }
  if (finishes) {
    float complete[ROWS * COLUMNS];
    EACH(i, rows) EACH(j, VECTORS) store(complete + i * COLUMNS + j * V, sums[i][j]);
    finish(c, slopes, factors, complete, rows, columns);
  }
}

// The last rows of c may be fewer than a tile has.
PART void tile(output c, output slopes, input factors, input a, input w, const float *bias, int depth, int rows, int columns, int add, int finishes) {
  if (rows == ROWS)
    tile_of(ROWS, c, slopes, factors, a, w, bias, depth, columns, add, finishes);
  else
    tile_of(M % ROWS, c, slopes, factors, a, w, bias, depth, columns, add, finishes);
}
#endif

#if !QUANTIZED
// Transpose V columns of w, V lanes long, into rows COLUMNS apart.
PART void transpose(output to, const WEIGHT *restrict w) {
  const WEIGHT *from[V];
  vec x[V];
#if BFLOAT16
  EACH(i, V) x[i] = ALONG(w + (long)i * WNS, V * PER_LANE);
  transpose_vecs(x);
#else
  EACH(i, V) from[i] = w + (long)i * WNS;
  load_transposed(x, from);
#endif
  EACH(i, V) store(to + i * COLUMNS, x[i]);
}
#endif

// Pack `width` columns of w from column n0 on, `numbers` of each from k0 on: COLUMNS columns together, lane after lane,
// with zeros after the last column. Memory is read in its order: jumps between distant rows are slow.
#if QUANTIZED
#define PLACE(k, n) ((n) / COLUMNS * COLUMNS * DEPTH + (k) * COLUMNS + (n) % COLUMNS)
// Pack V columns or, with WNS 1, V rows, of which only `some` may exist.
PART void pack_some(output to, struct row row, int at, int last, int first, const int some) {
#if WNS == 1
  for (int n = 0; n < last; n += V) {
    vec x[V];
    for (int i = 0; i < V; i += 4) four_numbers(x + i, row, at + n + i, some);
    transpose_vecs(x);
    for (int i = 0; i < some; i++) store(to + PLACE(first + i, n), x[i]);
  }
#else
  for (int k = 0; k < last; k += 4) {
    vec x[4];
    four_numbers(x, row, at + k, some);
    EACH(i, 4) store(to + PLACE(k + i, first), x[i]);
  }
#endif
}
#endif
PART void pack_w(output to, const WEIGHT *restrict w, const unsigned char *restrict scales, int k0, int n0, int numbers, int width) {
#if QUANTIZED
  const int rows = WNS == 1 ? numbers : UP(width, COLUMNS), last = WNS == 1 ? UP(width, COLUMNS) : numbers;
  for (int first = 0; first < rows; first += V) {
    const int some = (WNS == 1 ? numbers : width) - first;
    struct row row = row_at(w, scales, (WNS == 1 ? k0 : n0) + first);
    if (some >= V && row.width == TILE) {  // so that the compiler knows both as constants
      row.width = TILE;
      pack_some(to, row, WNS == 1 ? n0 : k0, last, first, V);
    } else
      pack_some(to, row, WNS == 1 ? n0 : k0, last, first, MIN(V, MAX(0, some)));
  }
#elif UNIT_SIZE
  for (int n = 0; n < UP(width, COLUMNS); n += V) {
    float *at = to + n / COLUMNS * COLUMNS * DEPTH + n % COLUMNS;
    const WEIGHT *from = WEIGHTS_AT(w, n0 + n, k0);
    for (int k = 0; k < WHOLE(numbers); k += UNIT_SIZE, from += TILE * UNIT_SIZE) {
      vec lanes[UNIT_LANES];
      EACH(i, UNIT_LANES) lanes[i] = 0;
      if (n < width && k < numbers) unit_at(lanes, from);
      EACH(i, UNIT_LANES) store(at + (k / PER_LANE + i) * COLUMNS, lanes[i]);
    }
  }
#else
  w += (long)k0 * WKS + (long)n0 * WNS;
#if WNS == 1
  for (int k = 0; k < WHOLE(numbers); k += PER_LANE)
    for (int n = 0; n < UP(width, COLUMNS); n += V)
      store(to + n / COLUMNS * COLUMNS * DEPTH + k / PER_LANE * COLUMNS + n % COLUMNS,
            k < numbers ? ACROSS(w + (long)k * WKS + n, WKS, numbers - k, width - n) : (vec)0);
#else
  for (int n = 0; n < width; n += COLUMNS, to += COLUMNS * DEPTH, w += COLUMNS * WNS) {
    int columns = MIN(COLUMNS, width - n), done = 0;
    if (columns == COLUMNS)
      for (; done + V * PER_LANE <= numbers; done += V * PER_LANE)
        for (int j = 0; j < COLUMNS; j += V) transpose(to + done / PER_LANE * COLUMNS + j, w + (long)j * WNS + done);
    for (int j = 0; j < COLUMNS; j++)
      for (int k = done; k < WHOLE(numbers); k += PER_LANE)
        to[k / PER_LANE * COLUMNS + j] = j < columns && k < numbers ? ACROSS(w + (long)j * WNS + k, 1, numbers - k, 1)[0] : 0;
  }
#endif
#endif
}

// Pack `rows` rows of a from row m on, `numbers` of each. They are packed row after row if they are so in memory or for
// AMX, else lane after lane.
PART void pack_a(output to, input a, int numbers, int m, int rows) {
#if AKS == 1
  for (int i = 0; i < rows; i++)
    for (int k = 0; k < numbers; k += V * PER_LANE)
      store(to + i * A_ROW + k / PER_LANE, ALONG(a + (long)i * AMS + k, numbers - k));
#elif AMX_PAIRS
  for (int k = 0; k < numbers; k += V * PER_LANE)
    EACH(half, ROWS / V) {
      vec x[V];
      const float *from = a + (long)k * AKS + half * V;
      EACH(i, V) {
        const int left = numbers - k - i * PER_LANE;
        x[i] = left > 0 ? ACROSS(from + (long)i * PER_LANE * AKS, AKS, left, M - m - half * V) : (vec)0;
      }
      transpose_vecs(x);
      EACH(i, V) store(to + (half * V + i) * A_ROW + k / PER_LANE, x[i]);
    }
#else
  // This may write more than ROWS numbers of a lane; the next lane overwrites them.
  for (int k = 0; k < numbers; k += PER_LANE)
    for (int i = 0; i < ROWS; i += V)
      store(to + k / PER_LANE * ROWS + i, ACROSS(a + (long)k * AKS + i, AKS, numbers - k, M - m - i));
#endif
}

// Prefetch one of `shares` parts of a strip of a.
PART void prefetch_a(const float *a, int numbers, int share, int shares) {
#if AKS == 1
  for (int k = numbers / 16 * share / shares * 16; k < numbers / 16 * (share + 1) / shares * 16; k += 16)
    EACH(i, ROWS) __builtin_prefetch(a + (long)i * AMS + k);
#else
  for (int k = numbers * share / shares; k < numbers * (share + 1) / shares; k++) {
    __builtin_prefetch(a + (long)k * AKS);
    __builtin_prefetch(a + (long)k * AKS + ROWS - 1);
  }
#endif
}

// Compute rows m_first to m_last - 1 of c, columns n_first to n_last - 1.
PART void part(output c, output slopes, input factors, input a,
               const WEIGHT *restrict w, const unsigned char *restrict scales, input bias, int m_first, int m_last, int n_first, int n_last) {
  float panel_a[A_IN_PLACE ? 1 : ROWS * (DEPTH + V)] __attribute__((aligned(64)));
  float panel_w[W_IN_PLACE ? 1 : WIDTH * DEPTH] __attribute__((aligned(64)));
  float start[AMX_PAIRS ? WIDTH : 1] __attribute__((aligned(64)));  // the value that the sums of each column begin with
  for (int n0 = n_first; n0 < n_last; n0 += WIDTH) {
    int width = MIN(WIDTH, n_last - n0);
    if (AMX_PAIRS)
      for (int n = 0; n < WIDTH; n += V) store(start + n, BIAS ? get(bias + n0 + n, width - n, 0) : (vec)0);
    for (int k0 = 0; k0 < K; k0 += DEPTH * PER_LANE) {
      int numbers = MIN(DEPTH * PER_LANE, K - k0), depth = PIECES(numbers, PER_LANE);
      int finishes = (GELU || FACTOR) && k0 + numbers == K;
      if (!W_IN_PLACE) pack_w(panel_w, w, scales, k0, n0, numbers, width);
      const float *ws = W_IN_PLACE ? IN_PLACE(w, k0, n0) : panel_w;
      for (int m = m_first; m < m_last; m += ROWS) {
        int rows = MIN(ROWS, m_last - m);
        const float *strip = a + (long)m * AMS + (long)k0 * AKS;
        if (!A_IN_PLACE) pack_a(panel_a, strip, numbers, m, rows);
        for (int n = 0; n < width; n += COLUMNS) {
          if (SIZE(M, K) > SMALL && !K_BY_K && m + 2 * ROWS <= m_last)
            prefetch_a(strip + (long)ROWS * AMS, numbers, n / COLUMNS, PIECES(width, COLUMNS));
          long at = (long)m * N + n0 + n;
          tile(c + at, slopes + at, factors + at, A_IN_PLACE ? strip : panel_a, ws + (long)n * W_COLUMN,
               AMX_PAIRS ? start + n : BIAS ? bias + n0 + n : bias, depth, rows, MIN(COLUMNS, width - n), k0 > 0, finishes);
        }
      }
    }
  }
}

// Each c[b] is divided into PARTS_M x PARTS_N parts of whole tiles; a slice computes some of them.
KERNEL NAME(output c WITH(GELU, output slopes), input a, const WEIGHT *restrict w
                WITH(QUANTIZED, const unsigned char *restrict scales) WITH(BIAS, input bias)
                WITH(FACTOR, input factors), int slice) {
#if !QUANTIZED
  const unsigned char *scales = 0;
#endif
#if !BIAS
  const float *bias = 0;
#endif
#if !GELU
  float *slopes = 0;
#endif
#if !FACTOR
  const float *factors = 0;
#endif
#if AMX_PAIRS
  amx_begin(ROWS, V);
#endif
  const long rows = (M + ROWS - 1) / ROWS, columns = (N + COLUMNS - 1) / COLUMNS;
  for (long i = FIRST(BATCH * PARTS_M * PARTS_N); i < LAST(BATCH * PARTS_M * PARTS_N); i++) {
    long batch = i / (PARTS_M * PARTS_N), m = i / PARTS_N % PARTS_M, n = i % PARTS_N, here = batch * M * N;
    int m_last = MIN(M, rows * (m + 1) / PARTS_M * ROWS), n_last = MIN(N, columns * (n + 1) / PARTS_N * COLUMNS);
    for (int m_first = rows * m / PARTS_M * ROWS; m_first < m_last; m_first += HEIGHT)
      part(c + here, slopes + here, factors + here, a + batch * M * K, w + batch * K * N, scales, bias, m_first,
           MIN(m_last, m_first + HEIGHT), columns * n / PARTS_N * COLUMNS, n_last);
  }
#if AMX_PAIRS
  amx_end();
#endif
}
