// Attention of a few new queries, T, to all keys of a cache: each head's keys and values are read once, in
// order, for the GROUP heads of q that it serves.
//
// Query t sees the keys up to positions[b] + t, with a WINDOW the last WINDOW of these. z, q, k and v are as in
// attention.c, the caches as in cache.h.

#define VECTORS PIECES(D, V)  // of a row
#define LANES 4  // rows at a time
#define M (GROUP * T)  // queries for each head of keys: those of one head of q, then of the next
#define AHEAD (4096 / (D * (int)sizeof(KV)) + 1)  // rows: memory is asked for them before they are needed

PART void ask_for(const KV *row) {
  UNROLL for (int byte = 0; byte < D * (int)sizeof(KV); byte += 64) __builtin_prefetch((const char *)row + byte);
}

#define PIECE(row, i) get((row) + (i), D - (i), 0)

// scores[m][j] of `lanes` keys.
PART void score(output scores, const vec (*q)[VECTORS], const KV *keys, int lanes) {
  vec sums[M][LANES];
  EACH(m, M) EACH(j, LANES) sums[m][j] = 0;
  EACH(i, VECTORS) EACH(j, LANES)
      if (j < lanes) {
        vec key = PIECE(keys + j * D, i * V);
        EACH(m, M) sums[m][j] += q[m][i] * key;
      }
  EACH(m, M) EACH(j, LANES) if (j < lanes) scores[m * S + j] = sum_vec(sums[m][j]);
}

KERNEL NAME(output z, KV *key_cache, KV *value_cache, input q, input k, input v, const int *restrict positions
                WITH(IN_ROWS, const int *restrict rows), int slice) {
  float scores[M * S] __attribute__((aligned(64)));
  for (long unit = FIRST(B * KV_HEADS); unit < LAST(B * KV_HEADS); unit++) {
    const long b = unit / KV_HEADS, kv = unit % KV_HEADS, place = CACHE_ROW(b) * KV_HEADS + kv;
    const int old = MAX(0, MIN(positions[b], S - T)), start = WINDOW ? MAX(0, old + 1 - WINDOW) : 0;
    KV *keys = key_cache + place * S * D, *values = value_cache + place * S * D;
    add_rows(keys + (long)old * D, k + K_AT + b * KB + kv * KH, KT, T);
    add_rows(values + (long)old * D, v + V_AT + b * VB + kv * VH, VT, T);
    vec query[M][VECTORS], sums[M][VECTORS];
    EACH(m, M) EACH(i, VECTORS) {
      query[m][i] = PIECE(q + Q_AT + b * QB + (kv * GROUP + m / T) * QH + m % T * QT, i * V) * SCALE;
      sums[m][i] = 0;
    }
    int j = start;
    for (; j + LANES <= old + T; j += LANES) {
      for (int i = j + AHEAD; i < MIN(j + AHEAD + LANES, old + T); i++) ask_for(keys + (long)i * D);
      score(scores + j, query, keys + (long)j * D, LANES);
    }
    for (; j < old + T; j++) score(scores + j, query, keys + (long)j * D, 1);
    float scales[M];
    for (int m = 0; m < M; m++) {
      const int t = m % T, first = WINDOW ? MAX(start, old + t + 1 - WINDOW) : 0;
      float *row = scores + m * S;
      scales[m] = 1 / exp_row(row + first, row + first, old + t + 1 - first);
      for (j = start; j < first; j++) row[j] = 0;
      for (j = old + t + 1; j < old + T; j++) row[j] = 0;
    }
    for (j = start; j < old + T; j++) {
      if (j + AHEAD < old + T) ask_for(values + (long)(j + AHEAD) * D);
      EACH(i, VECTORS) {
        vec value = PIECE(values + (long)j * D, i * V);
        EACH(m, M) sums[m][i] += scores[m * S + j] * value;
      }
    }
    EACH(m, M) EACH(i, VECTORS) {
      put(z + ((b * T + m % T) * H + kv * GROUP + m / T) * D + i * V, sums[m][i] * scales[m], D - i * V);
    }
  }
}
