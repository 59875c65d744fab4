// Rows of quantised weights: K of them, of BITS each, in ROW_BYTES, with GROUPS scales. See quantized.py.

#define LEAST (MINIMA ? 0 : 8)  // what 4 bits hold is larger by this than the integer

// Of a row's scales and minima.
#if BLOCKS
typedef unsigned char scale_type;
#define SCALES (GROUPS / 8 * 20)
PART float scale_at(const scale_type *scales, int g) {
  return load1((const _Float16 *)(scales + g / 8 * 20)) * scales[g / 8 * 20 + 4 + g % 8];
}
PART float minimum_at(const scale_type *scales, int g) {
  return -load1((const _Float16 *)(scales + g / 8 * 20 + 2)) * scales[g / 8 * 20 + 12 + g % 8];
}
#else
typedef _Float16 scale_type;
#define SCALES (GROUPS * (1 + MINIMA))
PART float scale_at(const scale_type *scales, int g) { return load1(scales + g); }
PART float minimum_at(const scale_type *scales, int g) { return MINIMA ? load1(scales + GROUPS * MINIMA + g) : 0; }
#endif

// A row in float32.
PART void unpack(output y, const unsigned char *restrict w, const scale_type *restrict scales) {
  for (int k = 0; k < K; k += 32) {
    float scale = scale_at(scales, k / 32), minimum = minimum_at(scales, k / 32), values[32];
    for (int i = 0; i < 32; i++)
      values[i] = scale * (BITS == 8 ? (signed char)w[k + i] : (w[(k + i) / 2] >> (i % 2 * 4) & 15) - LEAST) + minimum;
    for (int i = 0; i < MIN(32, K - k); i++) y[k + i] = values[i];
  }
}

#if FEW_ROWS  // what follows is for matvec.c's products with M rows
#define ADDED (BITS == 8 ? SHIFT : LEAST)  // to each weight

// Half precision to float32, V at a time; the last V overlap those before where V does not divide them.
PART void widen(output to, const _Float16 *restrict halves) {
  const int rest = GROUPS % V;
  for (int i = 0; i + V <= GROUPS; i += V) store(to + i, load(halves + i));
  if (rest && GROUPS > V)
    store(to + GROUPS - V, load(halves + GROUPS - V));
  else
    for (int i = GROUPS - rest; i < GROUPS; i++) to[i] = load1(halves + i);
}

// A row's scales and minima in float32.
PART void widen_all(output to, output minima, const scale_type *restrict scales) {
#if BLOCKS
  for (int g = 0; g < GROUPS; g += 8, scales += 20) {
    const float d = load1((const _Float16 *)scales), dmin = -load1((const _Float16 *)(scales + 2));
    UNROLL for (int i = 0; i < 8; i++) to[g + i] = d * scales[4 + i];
    UNROLL for (int i = 0; i < 8; i++) minima[g + i] = dmin * scales[12 + i];
  }
#else
  widen(to, scales);
  if (MINIMA) widen(minima, scales + GROUPS * MINIMA);
#endif
}

// A row of x, rounded to signed bytes.
struct rounded {
  int words[GROUPS * 8];  // in the order in which `columns` takes weights
  int starts[GROUPS];     // of a group's integer sum: removes what is added to the weights
  float scales[GROUPS], sums[GROUPS];
} __attribute__((aligned(64)));

typedef unsigned char group_of_bytes __attribute__((ext_vector_type(32), aligned(1)));

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
    group_of_bytes x = *(group_of_bytes *)group;
#if BITS == 4  // of eight numbers, first those of even places
    x = __builtin_shufflevector(x, x, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 16, 18, 20, 22, 17, 19, 21, 23, 24, 26, 28, 30, 25, 27, 29, 31);
#endif
    *(group_of_bytes *)(to->words + 8 * g) = x;
  }
}

#define WORDS BITS  // of four bytes, a group's
#define TOGETHER MAX(1, V / WORDS)  // groups
#define ALL PIECES(K, 32)
#define DEPTH SUMMED_GROUPS(ALL)

// V columns of y, or with `all` 0 only `some`: V rows of w at a time are transposed in registers. The sums are
// those of matmul_integers.c in its order. With `more`, prefetches the V rows that follow.
PART void columns(output y, const struct rounded *x, const unsigned char *restrict w, const scale_type *restrict scales,
                  const int all, int some, int more) {
  float widened[2][V][UP(GROUPS, V)] __attribute__((aligned(64)));
  vec factors[1 + MINIMA][UP(GROUPS, V)];
  for (int i = 0; i < V; i++) widen_all(widened[0][i], widened[1][i], scales + (all ? i : MIN(i, some - 1)) * SCALES);
  EACH(kind, 1 + MINIMA) for (int g = 0; g < GROUPS; g += V) {
    EACH(i, V) factors[kind][g + i] = load(widened[kind][i] + g);
    transpose_vecs(factors[kind] + g);
  }
  vec totals[M], sums[M];
  EACH(m, M) totals[m] = sums[m] = 0;
  for (int g = 0; g < GROUPS; g += TOGETHER) {
    vec four[WORDS * TOGETHER];
    if (more) UNROLL for (int byte = 0; byte < V * WORDS * TOGETHER * 4; byte += 64)
      __builtin_prefetch(w + (V * ROW_BYTES + V * WORDS * 4 * g) + byte, 0, 2);
    EACH(part, WORDS * TOGETHER / V) {
      EACH(i, V) four[part * V + i] = load((const float *)(w + (all ? i : MIN(i, some - 1)) * ROW_BYTES) + WORDS * g + part * V);
      transpose_vecs(four + part * V);
    }
    EACH(j, TOGETHER) {
      if ((g + j) % DEPTH == 0) EACH(m, M) {
        totals[m] += sums[m];
        sums[m] = 0;
      }
      ints dots[M];
      EACH(m, M) dots[m] = x[m].starts[g + j];
      EACH(k, WORDS) {
        const uints words = (uints)four[j * WORDS + k];
#if BITS == 8
        EACH(m, M) dots[m] = dot4(dots[m], (ints)(SHIFT ? words ^ 0x80808080 : words), (ints)x[m].words[8 * (g + j) + k]);
#else
        EACH(m, M) dots[m] = dot4(dots[m], (ints)(words & 0x0f0f0f0f), (ints)x[m].words[8 * (g + j) + 2 * k]);
        EACH(m, M) dots[m] = dot4(dots[m], (ints)(words >> 4 & 0x0f0f0f0f), (ints)x[m].words[8 * (g + j) + 2 * k + 1]);
#endif
      }
      EACH(m, M) sums[m] += __builtin_convertvector(dots[m], vec) * (factors[0][g + j] * x[m].scales[g + j]);
#if MINIMA
      EACH(m, M) sums[m] += factors[1][g + j] * x[m].sums[g + j];
#endif
    }
  }
  EACH(m, M) put(y + m * N, totals[m] + sums[m], all ? V : some);
}
#endif
