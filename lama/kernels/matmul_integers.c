// c = finish(a · wᵀ): a, (M, K), has been rounded by round.c, and w, (N, K), is quantised: see quantized.h.
// Integers are multiplied, and their sums over each group of 32 are scaled: c = Σ (scale of a · scale of w · Σ
// products). With minima, Σ (minimum of w · sum of a) is added. `finish` adds the bias, applies GELU and adds
// the residual, (M, N).
//
// Method: the part of w for some columns of c is packed into a panel in the L1 cache. All rows of a are
// multiplied by it, while the sums of a tile of c are in registers.

#define VECTORS 2
#define COLUMNS (V * VECTORS)
#define ALL ((K + 31) / 32)  // groups
enum {
#if AMX_BYTES
  ROWS = 16,
#elif V == 8
  ROWS = 3,  // of a tile, whose sums of integers and of floats must fit in registers
#else
  ROWS = 6,
#endif
  DEPTH = SUMMED_GROUPS(ALL),  // groups of a panel
};

struct panel {
  ints words[DEPTH * 8][VECTORS];  // four bytes of each column
  ints start[DEPTH][VECTORS];      // the initial value of a group's sums, which cancels SHIFT
  vec scales[DEPTH][VECTORS];
#if MINIMA
  vec minima[DEPTH][VECTORS];
#endif
} __attribute__((aligned(64)));

// Pack `columns` rows of w from row n on, `depth` groups of each from group `first` on; zeros after the last row. Words
// of 4-bit weights become two words, the first with the weights at even places; without minima, 8 is subtracted.
PART void pack(struct panel *restrict to, const unsigned char *restrict w, const unsigned char *restrict scales, long n, int first, int depth, int columns) {
  for (int j = 0; j < VECTORS; j++) {
    const int some = MIN(V, columns - j * V);
    const struct row row = row_at(w, scales, some > 0 ? n + j * V : n);
    for (int k = 0; k < depth * BITS; k++) {
      const uints words = words_at(row, first * BITS + k, some);
#if BITS == 8
      to->words[k][j] = (ints)words;
#else
      EACH(half, 2) {
        const uints four = words >> 4 * half & 0x0f0f0f0f;
        to->words[2 * k + half][j] = (ints)(MINIMA ? four : (four + 0x78787878) ^ 0x80808080);
      }
#endif
    }
    for (int g = 0; g < depth; g++) {
      ints sum = 0;
      if (SHIFT) EACH(k, 8) sum = dot4(sum, (ints)0x01010101, to->words[8 * g + k][j]);
      to->start[g][j] = sum * -SHIFT;
      to->scales[g][j] = scales_at(row, first + g, some);
#if MINIMA
      to->minima[g][j] = minima_at(row, first + g, some);
#endif
    }
  }
}

// One tile of c: rows x COLUMNS sums of `depth` groups, of which `columns` columns are written. Its rows of c are
// prefetched.
PART void tile_of(const int rows, output c, const unsigned char *restrict a, input scales, const float *sums_of_a,
                  const struct panel *restrict w, const float *bias, const float *residual, int depth, int columns, int first, int last) {
  vec sums[ROWS][VECTORS];
#if AMX_BYTES
  EACH(j, VECTORS) {
    vec added[ROWS];
    ints dots[2][ROWS] __attribute__((aligned(64)));
    EACH(i, rows) added[i] = 0;
    // The sums of a group are scaled while the next group's are being computed.
    for (int g = 0; g <= depth; g++) {
      if (g < depth) {
        AMX_LOAD(&w->start[g][j], 0, 0);
        AMX_LOAD(a + 32 * g, ALL * 32, 4);
        AMX_LOAD(&w->words[8 * g][j], sizeof(w->words[0]), 6);
        AMX_MULTIPLY("tdpbusd", 4, 6, 0);
        AMX_STORE(dots[g % 2], sizeof(ints), 0);
      }
      if (!g) continue;
      const int scaled = g - 1;
      EACH(i, rows) added[i] += __builtin_convertvector(dots[scaled % 2][i], vec) * (w->scales[scaled][j] * scales[i * ALL + scaled]);
#if MINIMA
      EACH(i, rows) added[i] += w->minima[scaled][j] * sums_of_a[i * ALL + scaled];
#endif
    }
    EACH(i, rows) sums[i][j] = added[i];
  }
#else
  EACH(i, rows) EACH(j, VECTORS) sums[i][j] = 0;
  for (int g = 0; g < depth; g++) {
    if (g < rows) EACH(j, VECTORS) {
      __builtin_prefetch(c + (long)g * N + j * V, 1);
      if (RESIDUAL && last) __builtin_prefetch(residual + (long)g * N + j * V);
    }
    ints dots[ROWS][VECTORS];
    EACH(i, rows) EACH(j, VECTORS) dots[i][j] = w->start[g][j];
    EACH(k, 8) EACH(i, rows) {
      ints four = *(const int *)(a + (long)i * ALL * 32 + 32 * g + 4 * k);
      EACH(j, VECTORS) dots[i][j] = dot4(dots[i][j], four, w->words[8 * g + k][j]);
    }
    EACH(i, rows) EACH(j, VECTORS)
        sums[i][j] += __builtin_convertvector(dots[i][j], vec) * (w->scales[g][j] * scales[i * ALL + g]);
#if MINIMA
    EACH(i, rows) EACH(j, VECTORS) sums[i][j] += w->minima[g][j] * sums_of_a[i * ALL + g];
#endif
  }
#endif
  vec out[ROWS][VECTORS];
  EACH(i, rows) EACH(j, VECTORS) out[i][j] = sums[i][j];
  for (int i = 0; i < rows; i++)
    for (int j = 0, some; j < VECTORS && (some = MIN(V, columns - j * V)) > 0; j++) {
      float *to = c + (long)i * N + j * V;
      vec value = out[i][j];
      if (!first) value += get(to, some, 0);
      if (last) {
        if (BIAS) value += get(bias + j * V, some, 0);
        if (GELU) value = gelu(value);
        const float *from = residual + (long)i * N + j * V;
        if (RESIDUAL) value += get(from, some, 0);
      }
      put(to, value, some);
    }
}

// c is divided into PARTS_M x PARTS_N parts of whole tiles; a slice computes some of them. `a` itself is an input
// only because it has a gradient.
KERNEL NAME(output c, input a, const unsigned char *restrict w, const unsigned char *restrict scales WITH(BIAS, input bias)
                WITH(RESIDUAL, input residual), const unsigned char *restrict rounded, input rounded_scales
                WITH(MINIMA, input rounded_sums), int slice) {
#if !MINIMA
  const float *rounded_sums = 0;
#endif
#if !BIAS
  const float *bias = 0;
#endif
#if !RESIDUAL
  const float *residual = 0;
#endif
  struct panel panel;
  const long strips = PIECES(M, ROWS), blocks = PIECES(N, COLUMNS);
  for (long part = FIRST(PARTS_M * PARTS_N); part < LAST(PARTS_M * PARTS_N); part++) {
    const long m_first = strips * (part / PARTS_N) / PARTS_M * ROWS, m_last = MIN(M, strips * (part / PARTS_N + 1) / PARTS_M * ROWS);
    const long n_first = blocks * (part % PARTS_N) / PARTS_N * COLUMNS, n_last = MIN(N, blocks * (part % PARTS_N + 1) / PARTS_N * COLUMNS);
    for (int g = 0; g < ALL; g += DEPTH)
      for (long n = n_first; n < n_last; n += COLUMNS) {
        const int depth = MIN(DEPTH, ALL - g), columns = MIN(COLUMNS, N - n), last = g + DEPTH >= ALL;
        pack(&panel, w, scales, n, g, depth, columns);
        for (long m = m_first; m < m_last; m += ROWS) {
          float *to = c + m * N + n;
          const unsigned char *from = rounded + (m * ALL + g) * 32;
          const float *from_scales = rounded_scales + m * ALL + g, *sums = MINIMA ? rounded_sums + m * ALL + g : rounded_sums;
          const float *more = RESIDUAL ? residual + m * N + n : residual, *biases = BIAS ? bias + n : bias;
#if AMX_BYTES
          if (m == m_first || m + ROWS > M) amx_begin(MIN(ROWS, M - m), 8);
#endif
          if (m + ROWS <= M)
            tile_of(ROWS, to, from, from_scales, sums, &panel, biases, more, depth, columns, g == 0, last);
          else
            tile_of(M % ROWS, to, from, from_scales, sums, &panel, biases, more, depth, columns, g == 0, last);
        }
      }
  }
#if AMX_BYTES
  amx_end();
#endif
}
