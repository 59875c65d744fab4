// Attention of a few new queries, T, to all keys of a cache: each head's keys and values are read once, in
// order.
//
// Query t sees the keys up to positions[b] + t. z, q, k and v are as in attention.c, the caches as in cache.h.

#define VECTORS PIECES(D, V)  // of a row
#define LANES 4  // rows at a time
#define AHEAD (4096 / (D * (int)sizeof(KV)) + 1)  // rows: memory is asked for them before they are needed

PART void ask_for(const KV *row) {
  UNROLL for (int byte = 0; byte < D * (int)sizeof(KV); byte += 64) __builtin_prefetch((const char *)row + byte);
}

#define PIECE(row, i) get((row) + (i), D - (i), 0)

// scores[t][j] of `lanes` keys.
PART void score(output scores, const vec (*q)[VECTORS], const KV *keys, int lanes) {
  vec sums[T][LANES];
  EACH(t, T) EACH(j, LANES) sums[t][j] = 0;
  EACH(i, VECTORS) EACH(j, LANES)
      if (j < lanes) {
        vec key = PIECE(keys + j * D, i * V);
        EACH(t, T) sums[t][j] += q[t][i] * key;
      }
  EACH(t, T) EACH(j, LANES) if (j < lanes) scores[t * S + j] = sum_vec(sums[t][j]);
}

KERNEL NAME(output z, KV *key_cache, KV *value_cache, input q, input k, input v, const int *restrict positions
                WITH(IN_ROWS, const int *restrict rows), int slice) {
  float scores[T * S] __attribute__((aligned(64)));
  for (long head = FIRST(B * H); head < LAST(B * H); head++) {
    const long b = head / H, h = head % H, place = CACHE_ROW(b) * H + h;
    const int old = MAX(0, MIN(positions[b], S - T));
    KV *keys = key_cache + place * S * D, *values = value_cache + place * S * D;
    add_rows(keys + (long)old * D, k + K_AT + b * KB + h * KH, KT, T);
    add_rows(values + (long)old * D, v + V_AT + b * VB + h * VH, VT, T);
    vec query[T][VECTORS], sums[T][VECTORS];
    EACH(t, T) EACH(i, VECTORS) {
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
      scales[t] = 1 / exp_row(scores + t * S, scores + t * S, old + t + 1);
      for (j = old + t + 1; j < old + T; j++) scores[t * S + j] = 0;
    }
    for (j = 0; j < old + T; j++) {
      if (j + AHEAD < old + T) ask_for(values + (long)(j + AHEAD) * D);
      EACH(i, VECTORS) {
        vec value = PIECE(values + (long)j * D, i * V);
        EACH(t, T) sums[t][i] += scores[t * S + j] * value;
      }
    }
    EACH(t, T) EACH(i, VECTORS) {
      put(z + ((b * T + t) * H + h) * D + i * V, sums[t][i] * scales[t], D - i * V);
    }
  }
}
