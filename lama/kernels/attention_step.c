// Attention of a few new queries, T, to all keys of a cache. Each head's keys and values are read once, in
// order, for the GROUP heads of q that share them. All sums have the order of attention.c, and so the same bits.
//
// Query t sees the keys up to positions[b] + t, with a WINDOW the last WINDOW of these. z, q, k and v are as in
// attention.c, the caches as in cache.h.

#define VECTORS PIECES(D, V)  // of a row
#define M (GROUP * T)  // queries for each head of keys: all of one head of q, then those of the next
#define WIDE(i) (D % V ? D - (i) : V)  // numbers of a row from i on; V stands for any larger number
#define AHEAD (8192 / (D * (int)sizeof(KV)) + 1)  // rows are prefetched this many rows before they are needed
#define HIDDEN -3.4e38f  // as in ops.py
#define NOTHING -__builtin_inff()

PART void ask_for(const KV *row) {
  UNROLL for (int byte = 0; byte < D * (int)sizeof(KV); byte += 64) __builtin_prefetch((const char *)row + byte);
}

// Numbers i to i + V - 1 of V rows, transposed: one vector for each number. If there are only `some` rows, the last is
// repeated.
PART void transposed(vec x[V], const KV *rows, int some, int i) {
  const KV *from[V];
  if (some >= V)
    EACH(j, V) from[j] = rows + j * D + i;
  else
    EACH(j, V) from[j] = rows + MIN(j, some - 1) * D + i;
  if (WIDE(i) >= V)
    load_transposed(x, from);
  else {
    EACH(j, V) x[j] = get(from[j], WIDE(i), 0);
    transpose_vecs(x);
  }
}

KERNEL NAME(output z, KV *key_cache, KV *value_cache, input q, input k, input v, const int *restrict positions
                WITH(IN_ROWS, const int *restrict rows), int slice) {
  float scores[M][KEYS] __attribute__((aligned(64))), query[M][D];
  for (long unit = FIRST(B * KV_HEADS); unit < LAST(B * KV_HEADS); unit++) {
    const long b = unit / KV_HEADS, kv = unit % KV_HEADS, place = CACHE_ROW(b) * KV_HEADS + kv;
    const int old = MAX(0, MIN(positions[b], S - T)), end = old + T;
    const int start = WINDOW ? MAX(0, old + 1 - WINDOW) / KEYS * KEYS : 0;
    KV *keys = key_cache + place * S * D, *values = value_cache + place * S * D;
    add_rows(keys + (long)old * D, k + K_AT + b * KB + kv * KH, KT, T);
    add_rows(values + (long)old * D, v + V_AT + b * VB + kv * VH, VT, T);
    for (int m = 0; m < M; m++)
      for (int i = 0; i < D; i++) query[m][i] = SCALE * q[Q_AT + b * QB + (kv * GROUP + m / T) * QH + m % T * QT + i];
    vec sums[M][VECTORS];
    float tops[M], totals[M];
    EACH(m, M) {
      EACH(i, VECTORS) sums[m][i] = 0;
      tops[m] = NOTHING, totals[m] = 0;
    }
    for (int k0 = start; k0 < end; k0 += KEYS) {
      const int n = MIN(KEYS, end - k0);
      for (int j = 0; j < n; j += V) {
        const KV *later = keys + (long)MIN(k0 + j + AHEAD, end) * D;
        vec dots[M];
        EACH(m, M) dots[m] = 0;
        for (int i = 0; i < D; i += V) {
          vec x[V];
          transposed(x, keys + (long)(k0 + j) * D, n - j, i);
          EACH(c, V) if (D % V == 0 || i + c < D) {
            if ((i + c) * 64 < V * D * (int)sizeof(KV)) __builtin_prefetch((const char *)later + (i + c) * 64);
            EACH(m, M) dots[m] += query[m][i + c] * x[c];
          }
        }
        EACH(m, M) store(scores[m] + j, dots[m]);
      }
      float scales[M];
      for (int m = 0; m < M; m++) {
        // The query sees keys `first` to `seen` - 1 of the block.
        const int t = m % T, seen = MIN(n, old + t + 1 - k0), first = WINDOW ? old + t + 1 - WINDOW - k0 : 0;
        vec most = NOTHING, total = 0;
        for (int j = 0; j < n; j += V) {
          vec x = (ints)each_from(0) < seen - j ? load(scores[m] + j) : (vec)NOTHING;
          if (WINDOW) x = (ints)each_from(0) >= first - j ? x : (vec)NOTHING;
          store(scores[m] + j, x);
          most = __builtin_elementwise_max(most, x);
        }
        const float before = tops[m];
        float top = max_vec(most);
        top = before > top ? before : top;
        if (WINDOW) top = top > HIDDEN ? top : HIDDEN;
        for (int j = 0; j < n; j += V) {
          vec e = exp_vec(load(scores[m] + j) - top);
          total += e;
          store(scores[m] + j, e);
        }
        scales[m] = k0 > start ? exp_vec((vec)(before - top))[0] : 0;
        totals[m] = (k0 > start ? totals[m] * scales[m] : 0) + sum_vec(total);
        tops[m] = top;
      }
      EACH(m, M) EACH(i, VECTORS) sums[m][i] = scales[m] * sums[m][i];
      for (int j = 0; j < n; j++) {
        if (k0 + j + AHEAD < end) ask_for(values + (long)(k0 + j + AHEAD) * D);
        EACH(i, VECTORS) {
          vec value = get(values + (long)(k0 + j) * D + i * V, WIDE(i * V), 0);
          EACH(m, M) sums[m][i] += scores[m][j] * value;
        }
      }
    }
    EACH(m, M) EACH(i, VECTORS) {
      put(z + ((b * T + m % T) * H + kv * GROUP + m / T) * D + i * V, sums[m][i] * (1 / totals[m]), D - i * V);
    }
  }
}
