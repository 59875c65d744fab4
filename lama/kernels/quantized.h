// D_OUT rows of K quantised weights, of BITS bits each, in ROW_BYTES bytes, with GROUPS scales. See quantized.py.
// TILE rows are interleaved: first word 0 of each, then word 1 of each. The last tile may have fewer rows.

#define LEAST (MINIMA ? 0 : 8)  // is added to an integer before it is stored in 4 bits
// The words of values and the pairs of bytes of scales in a row.
#define ROW_WORDS (ROW_BYTES / 4)
#define ROW_PAIRS (BLOCKS ? GROUPS / 8 * 10 : GROUPS * (1 + MINIMA))

// Pointers to the first units of a row of a tile; its unit i is at i * width.
struct row {
  const unsigned int *words;
  const unsigned short *pairs;
  int width;
};

PART struct row row_at(const unsigned char *w, const unsigned char *scales, long n) {
  const long first = n / TILE * TILE;
  return (struct row){(const unsigned int *)w + first * ROW_WORDS + n % TILE,
                      (const unsigned short *)scales + first * ROW_PAIRS + n % TILE, (int)MIN(TILE, D_OUT - first)};
}

// Unit i of the `some` rows from this one on, at most V, all of one tile; zeros after them.
PART uints words_at(struct row row, long i, int some) {
  const unsigned int *from = row.words + i * row.width;
  if (some >= V) return *(const uints *)from;
  uints words = 0;
  for (int j = 0; j < some; j++) words[j] = from[j];
  return words;
}
PART uints pairs_at(struct row row, long i, int some) {
  const unsigned short *from = row.pairs + i * row.width;
  if (some >= V) return __builtin_convertvector(*(const shorts *)from, uints);
  uints pairs = 0;
  for (int j = 0; j < some; j++) pairs[j] = from[j];
  return pairs;
}
PART vec halves_at(struct row row, long i, int some) { return get((const _Float16 *)(row.pairs + i * row.width), some, 0); }

// The scales and minima of group g of these rows.
#if BLOCKS
PART vec bytes_at(struct row row, long i, int g, int some) {
  return __builtin_convertvector(pairs_at(row, i + g % 8 / 2, some) >> 8 * (g % 2) & 255, vec);
}
PART vec scales_at(struct row row, int g, int some) {
  return halves_at(row, g / 8 * 10, some) * bytes_at(row, g / 8 * 10 + 2, g, some);
}
PART vec minima_at(struct row row, int g, int some) {
  return -halves_at(row, g / 8 * 10 + 1, some) * bytes_at(row, g / 8 * 10 + 6, g, some);
}
#else
PART vec scales_at(struct row row, int g, int some) { return halves_at(row, g, some); }
PART vec minima_at(struct row row, int g, int some) { return halves_at(row, GROUPS + g, some); }
#endif

// Numbers k to k + 3 of `some` rows of one tile, at most V; k is a multiple of 4.
PART void four_numbers(vec numbers[4], struct row row, int k, int some) {
  const uints words = words_at(row, k * BITS / 32, some);
  const vec scales = scales_at(row, k / 32, some);
  EACH(i, 4) {
    const int bit = (k + i) * BITS % 32;
    numbers[i] = scales * __builtin_convertvector(BITS == 8 ? (ints)(words << (24 - bit)) >> 24 : (ints)(words >> bit & 15) - LEAST, vec);
#if MINIMA
    numbers[i] += minima_at(row, k / 32, some);
#endif
  }
}

// Convert a row to float32.
PART void unpack(output y, struct row row) {
  for (int k = 0; k < K; k += 4) {
    vec numbers[4];
    four_numbers(numbers, row, k, 1);
    for (int i = 0; i < MIN(4, K - k); i++) y[k + i] = numbers[i][0];
  }
}

#if FEW_ROWS  // the rest is for the products of matvec.c with M rounded rows
#define ADDED (BITS == 8 ? SHIFT : LEAST)  // added to each weight

// A row of x, rounded to signed bytes.
struct rounded {
  int words[GROUPS * 8];
  int starts[GROUPS];     // the initial value of a group's integer sum, which cancels ADDED
  float scales[GROUPS], sums[GROUPS];
} __attribute__((aligned(64)));

PART void round_row(struct rounded *restrict to, input a) {
  for (int g = 0; g < GROUPS; g++) {
    vec steps[32 / V], sums = 0;
    unsigned char group[32];
    to->scales[g] = round_group(steps, a + 32 * g, K - 32 * g);
    EACH(i, 32 / V) {
      *(bytes *)(group + i * V) = __builtin_convertvector((uints)steps[i], bytes);
      sums += steps[i] - UNIT;
    }
    const float sum = sum_vec(sums);
    to->sums[g] = sum * to->scales[g];
    to->starts[g] = (int)sum * -ADDED;
    store_group((unsigned char *)(to->words + 8 * g), group);
  }
}

#define ALL PIECES(K, 32)
#define DEPTH SUMMED_GROUPS(ALL)
#define AHEAD 4096  // weights are prefetched this many bytes before they are needed

#define ROWS MIN(M, 8)  // rows of x whose sums the registers hold
// `some` columns of y, at most V, from one tile. The sums have the order of matmul_integers.c.
PART void columns_of(const int rows, output y, const struct rounded *x, struct row row, const int some) {
  vec totals[ROWS], sums[ROWS];
  EACH(m, rows) totals[m] = sums[m] = 0;
  for (int g = 0; g < GROUPS; g++) {
    if (g % DEPTH == 0) EACH(m, rows) {
      totals[m] += sums[m];
      sums[m] = 0;
    }
    ints dots[ROWS];
    EACH(m, rows) dots[m] = x[m].starts[g];
    EACH(k, BITS) {
      if (k * V % TILE == 0) __builtin_prefetch((const char *)(row.words + (g * BITS + k) * row.width) + AHEAD);
      const uints words = words_at(row, g * BITS + k, some);
#if BITS == 8
      EACH(m, rows) dots[m] = dot4(dots[m], (ints)(SHIFT ? words ^ 0x80808080 : words), (ints)x[m].words[8 * g + k]);
#else
      EACH(m, rows) dots[m] = dot4(dots[m], (ints)(words & 0x0f0f0f0f), (ints)x[m].words[8 * g + 2 * k]);
      EACH(m, rows) dots[m] = dot4(dots[m], (ints)(words >> 4 & 0x0f0f0f0f), (ints)x[m].words[8 * g + 2 * k + 1]);
#endif
    }
    const vec scales = scales_at(row, g, some);
    EACH(m, rows) sums[m] += __builtin_convertvector(dots[m], vec) * (scales * x[m].scales[g]);
#if MINIMA
    const vec minima = minima_at(row, g, some);
    EACH(m, rows) sums[m] += minima * x[m].sums[g];
#endif
  }
  EACH(m, rows) put(y + m * N, totals[m] + sums[m], some);
}
// The same for all M rows, ROWS at a time: after the first time, the tile is in the L1 cache.
PART void columns_of_all(output y, const struct rounded *x, struct row row, const int some) {
  for (int m = 0; m + ROWS <= M; m += ROWS) columns_of(ROWS, y + m * N, x + m, row, some);
  if (M % ROWS) columns_of(M % ROWS, y + M / ROWS * ROWS * N, x + M / ROWS * ROWS, row, some);
}
// The same, so that the compiler knows the width of a whole tile as a constant.
PART void columns(output y, const struct rounded *x, struct row row, int some) {
  if (row.width == TILE && some >= V) {
    row.width = TILE;
    columns_of_all(y, x, row, V);
  } else
    columns_of_all(y, x, row, some);
}
#endif
