// Rows of quantised weights: K of them, of BITS each, in ROW_BYTES, with GROUPS scales. See quantized.py.

#define LINES (ROW_BYTES / 64)
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
#define FAR 4096  // bytes

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

// A row of x is arranged as LINES times X_LINE numbers; with minima, the sums of its groups follow.
#define X_SUMS (LINES * X_LINE)
#define X_ROW (X_SUMS + (MINIMA ? UP(GROUPS, V) : 0))

#if BITS == 8
// A line is two groups; x is rounded.
typedef signed char bytes __attribute__((ext_vector_type(V), aligned(1)));
#define X_LINE 64

PART void arrange(output x, input a) {
  for (int g = 0; g < X_ROW - X_SUMS; g++) x[X_SUMS + g] = 0;
  for (int k = 0; k < X_SUMS; k += 32) {
    rounded_group(x + k, a + k, K - k);
    if (MINIMA) EACH(i, 32) x[X_SUMS + k / 32] += x[k + i];
  }
}

PART void add_line(vec sums[M], const unsigned char *restrict w, input scales, input x) {
  EACH(g, 2) {
    vec products[M];
    EACH(i, 32 / V) {
      vec weights = __builtin_convertvector(*(const bytes *)(w + 32 * g + i * V), vec);
      EACH(m, M) {
        vec some = load(x + m * X_ROW + 32 * g + i * V);
        products[m] = i ? products[m] + weights * some : weights * some;
      }
    }
    EACH(m, M) sums[m] += products[m] * scales[g];
  }
}
#else
// A line is 16 words of eight weights, four words a group. What a weight has in memory, n, is put into the
// upper bits of a float's fraction: 1 + n / 16. x is arranged for that: rounded, 16 times as large, first the
// numbers for the first weights of the 16 words, and so on. Before all these are 16 sums that remove the 1
// and, without minima, the 8.
#define X_LINE (9 * 16)

PART void arrange(output x, input a) {
  float *sums = x + X_SUMS;
  for (int g = 0; g < X_ROW - X_SUMS; g++) sums[g] = 0;
  for (int k = 0; k < LINES * 128; k += 128, x += X_LINE)
    for (int g = 0; g < 4; g++) {
      float group[32];
      rounded_group(group, a + k + 32 * g, K - k - 32 * g);
      for (int word = 0; word < 4; word++) {
        float sum = 0;
        for (int place = 0; place < 8; place++) {
          float value = group[word * 8 + place] * 16;
          x[(1 + place) * 16 + 4 * g + word] = value;
          sum += value;
        }
        x[4 * g + word] = -(1 + LEAST / 16.0f) * sum;
        if (MINIMA) sums[k / 32 + g] += sum * (1 / 16.0f);
      }
    }
}

#if V == 16
#define FOUR_EACH 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3
#elif V == 8
#define FOUR_EACH 0, 0, 0, 0, 1, 1, 1, 1
#else
#define FOUR_EACH 0, 0, 0, 0
#endif
typedef float few __attribute__((ext_vector_type(V / 4 > 1 ? V / 4 : 2), aligned(4)));

PART void add_line(vec sums[M], const unsigned char *restrict w, input scales, input x) {
  UNROLL for (int i = 0; i < 16; i += V) {
    uints words = *(const uints *)(w + 4 * i);
    vec products[M];
    EACH(m, M) products[m] = load(x + m * X_ROW + i);
    EACH(place, 8) {
      uints bits = place < 5 ? words << (19 - 4 * place) : words >> (4 * place - 19);
      vec weights = (vec)((bits & 0x780000) | 0x3f800000);
      EACH(m, M) products[m] += weights * load(x + m * X_ROW + (1 + place) * 16 + i);
    }
    few some = *(const few *)(scales + i / 4);
    EACH(m, M) sums[m] += products[m] * __builtin_shufflevector(some, some, FOUR_EACH);
  }
}
#endif

// The products of one row of w with all rows of x, which are arranged; written N apart. Prefetches the next
// rows.
PART void quantized_dots(output y, input x, const unsigned char *restrict w, const scale_type *restrict scales) {
  vec sums[M];
  float widened[GROUPS + 2] __attribute__((aligned(64))), minima[UP(GROUPS, V)] __attribute__((aligned(64)));
  for (int g = GROUPS; g < UP(GROUPS, V); g++) minima[g] = 0;
  widen_all(widened, minima, scales);
  EACH(m, M) sums[m] = 0;
  for (int i = 0; i < LINES; i++) {
    __builtin_prefetch(w + 64 * i + FAR);
    add_line(sums, w + 64 * i, widened + i * (GROUPS / LINES), x + i * X_LINE);
  }
  for (int g = 0; MINIMA && g < GROUPS; g += V)
    EACH(m, M) sums[m] += load(minima + g) * load(x + m * X_ROW + X_SUMS + g);
  EACH(m, M) y[m * N] = sum_vec(sums[m]);
}
#endif
