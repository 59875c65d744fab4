// Attention of a few new queries, T, to all keys of a cache: each head's keys and values are read once, in
// order.
//
// The caches (ROWS, H, S, D), of type KV, hold positions[b] keys and values of each head in row b, or, with
// IN_ROWS, in row rows[b]. The T new ones, at k and v, are written behind these first; query t sees the keys
// up to positions[b] + t. z, q, k and v are as in attention.c.

#if IN_ROWS
#define ROWS_ARGUMENT , const int *restrict rows
#define CACHE_ROW(b) (long)rows[b]
#else
#define ROWS_ARGUMENT
#define CACHE_ROW(b) (b)
#endif
#define VECTORS PIECES(D, V)  // of a row
#define LANES 4  // rows at a time
#define AHEAD (4096 / (D * (int)sizeof(KV)) + 1)  // rows: memory is asked for them before they are needed

PART void ask_for(const KV *row) {
  UNROLL for (int byte = 0; byte < D * (int)sizeof(KV); byte += 64) __builtin_prefetch((const char *)row + byte);
}

#define PIECE(row, i) get((row) + (i), MIN(V, D - (i)), 0)

PART void add_rows(KV *restrict to, const float *restrict from, long stride) {
  for (long row = 0; row < T; row++, to += D, from += stride)
    for (int i = 0; i < D; i += V)
      if (i + V <= D)
        store(to + i, load(from + i));
      else
        store_some(to + i, load_some(from + i, D - i, 0), D - i);
}

// scores[t][j] of `lanes` keys.
PART void score(float *restrict scores, const vec (*q)[VECTORS], const KV *keys, int lanes) {
  vec sums[T][LANES];
  UNROLL for (int t = 0; t < T; t++)
    UNROLL for (int j = 0; j < LANES; j++) sums[t][j] = 0;
  UNROLL for (int i = 0; i < VECTORS; i++)
    UNROLL for (int j = 0; j < LANES; j++)
      if (j < lanes) {
        vec key = PIECE(keys + j * D, i * V);
        UNROLL for (int t = 0; t < T; t++) sums[t][j] += q[t][i] * key;
      }
  UNROLL for (int t = 0; t < T; t++)
    UNROLL for (int j = 0; j < LANES; j++)
      if (j < lanes) scores[t * S + j] = sum_vec(sums[t][j]);
}

// The first n scores to their exponentials, the rest to 0; returns 1 / their sum.
PART float softmax(float *scores, int n) {
  vec tops = scores[0], sums = 0;
  int j = 0;
  for (; j + V <= n; j += V) tops = __builtin_elementwise_max(tops, load(scores + j));
  if (j < n) tops = __builtin_elementwise_max(tops, load_some(scores + j, n - j, scores[0]));
  float top = max_vec(tops);
  for (j = 0; j + V <= n; j += V) {
    vec e = exp_vec(load(scores + j) - top);
    store(scores + j, e);
    sums += e;
  }
  if (j < n) {
    vec e = exp_vec(load_some(scores + j, n - j, -__builtin_inff()) - top);
    store_some(scores + j, e, n - j);
    sums += e;
  }
  return 1 / sum_vec(sums);
}

KERNEL NAME(float *restrict z, KV *key_cache, KV *value_cache, const float *restrict q, const float *restrict k, const float *restrict v,
            const int *restrict positions ROWS_ARGUMENT, int slice) {
  float scores[T * S] __attribute__((aligned(64)));
  for (long head = FIRST(B * H); head < LAST(B * H); head++) {
    const long b = head / H, h = head % H, place = CACHE_ROW(b) * H + h;
    const int old = MAX(0, MIN(positions[b], S - T));
    KV *keys = key_cache + place * S * D, *values = value_cache + place * S * D;
    add_rows(keys + (long)old * D, k + K_AT + b * KB + h * KH, KT);
    add_rows(values + (long)old * D, v + V_AT + b * VB + h * VH, VT);
    vec query[T][VECTORS], sums[T][VECTORS];
    UNROLL for (int t = 0; t < T; t++)
      UNROLL for (int i = 0; i < VECTORS; i++) {
        query[t][i] = PIECE(q + Q_AT + b * QB + h * QH + t * QT, i * V) * SCALE;
        sums[t][i] = 0;
      }
    int j = 0;
    for (; j + LANES <= old + T; j += LANES) {
      for (int i = j + AHEAD; i < MIN(j + AHEAD + LANES, old + T); i++) ask_for(keys + (long)i * D);
      score(scores + j, query, keys + (long)j * D, LANES);
    }
    for (; j < old + T; j++) score(scores + j, query, keys + (long)j * D, 1);
    float scales[T];
    for (int t = 0; t < T; t++) {
      scales[t] = softmax(scores + t * S, old + t + 1);
      for (j = old + t + 1; j < old + T; j++) scores[t * S + j] = 0;
    }
    for (j = 0; j < old + T; j++) {
      if (j + AHEAD < old + T) ask_for(values + (long)(j + AHEAD) * D);
      UNROLL for (int i = 0; i < VECTORS; i++) {
        vec value = PIECE(values + (long)j * D, i * V);
        UNROLL for (int t = 0; t < T; t++) sums[t][i] += scores[t * S + j] * value;
      }
    }
    UNROLL for (int t = 0; t < T; t++)
      UNROLL for (int i = 0; i < VECTORS; i++) {
        float *to = z + ((b * T + t) * H + h) * D + i * V;
        put(to, sums[t][i] * scales[t], MIN(V, D - i * V));
      }
  }
}
