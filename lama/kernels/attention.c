// z = softmax(q kᵀ · SCALE) v for B x H heads, and its gradients, with scores and pattern in blocks. There are T
// queries and S keys of D numbers each, and values of E numbers. Element (b, h, t, i) of q is q[Q_AT + b * QB +
// h * QH + t * QT + i]; k and v likewise, with one head for each GROUP heads of q. z is (B, T, H, E). `stats`
// (B, H, T, 2) has the largest score of each row and the sum of its exponentials.
//
// CAUSAL: query t sees the keys up to offset + t, offset >= 0. With a WINDOW it sees only the last WINDOW of
// these; with STARTS only those from starts[b, t] on, `starts` (B, T), which never decreases with t. PADDING: a
// query sees only the keys where `padding` (B, S) is true; not with WINDOW or STARTS. A query that sees nothing
// gets the mean of all values. DROP: dropout of the pattern, as in dropout.c.
//
// CACHED: the keys and values are in two caches, see cache.h, and `offset` is positions[b].
//
// BFLOAT16: the factors of all five products are rounded as they are packed. A lane may then be a pair of numbers:
// see bfloat16.h and amx.h. The softmax and all sums are float32.
//
// Method: Dao et al., FlashAttention, 2022: for each block of keys, each query's largest score so far and its sum
// are updated.

#if AMX_PAIRS
#define MOST_ROWS 32
#elif V == 16
#define MOST_ROWS 12
#elif V == 8
#define MOST_ROWS 6
#else
#define MOST_ROWS 8
#endif
// The number of lanes of n numbers: a whole number of vectors, or n for floats.
#define LANES_OF(n) (BFLOAT16 ? UP(n, V * PER_LANE) / PER_LANE : (n))
#define ALIGNED __attribute__((aligned(64)))
#define HIDDEN -3.4e38f  // as in ops.py
#define NOTHING -__builtin_inff()  // the score of a key that does not exist

enum {
  // Queries of a tile: as many as the registers hold, or a few less to make tiles equal.
  ROWS = AMX_PAIRS ? MOST_ROWS : UP(PIECES(T, PIECES(T, MOST_ROWS)), PER_LANE),
  COLUMNS = 2 * V,                         // keys, or numbers of a key, of a tile
  UNIT = BFLOAT16 ? COLUMNS : V,           // numbers that are packed together
  DP = UP(D, UNIT), EP = UP(E, UNIT),
  // Lanes of a key and of a value, and of a packed row of each.
  DL = LANES_OF(D), EL = LANES_OF(E), DW = DP / PER_LANE, EW = EP / PER_LANE,
  // The number of keys that fit in the L2 cache, and whose scores fit on the stack.
  IN_CACHE = BACKWARD ? MIN(8192 / MAX(DP, EP), 512) : 16384 / MAX(DP, EP),
  MOST_KEYS = MAX(COLUMNS, IN_CACHE / COLUMNS * COLUMNS),
#if !CACHED
  KEYS = EQUAL_PIECE(S, MOST_KEYS, COLUMNS),  // of a block
#endif
  SKIPS = CAUSAL && !PADDING,  // whether keys that a query does not see are skipped
};

// The lanes of sums over n keys or queries.
#define DEEP(n) (BFLOAT16 ? UP(n, UNIT) / PER_LANE : (n))

// c + a · w, or a · w without `add`: ROWS rows of c, c_row apart, of vectors · V columns; each sum has `depth`
// lanes. Lane k of row i of a is a[i * a_row + k * a_step]; lane k of V columns of w is at w + k * w_step.
#if AMX_PAIRS
PART void tile(const int vectors, const int add, output c, const int c_row, input a, const int a_row,
               const int a_step, input w, const int w_step, int depth) {
  if (add) amx_load(c, 4 * c_row, ROWS);
  else amx_clear();
  for (int k = 0; k < depth; k += V) AMX_PRODUCTS("tdpbf16ps", a + k, 4 * a_row, w + k * w_step, 4 * w_step, ROWS);
  amx_store(c, 4 * c_row, ROWS);
}
#else
PART void tile(const int vectors, const int add, output c, const int c_row, input a, const int a_row,
               const int a_step, input w, const int w_step, int depth) {
  vec sums[ROWS][2];
  EACH(i, ROWS) EACH(j, vectors) sums[i][j] = add ? load(c + i * c_row + j * V) : (vec)0;
  for (int k = 0; k < depth; k++) {
    vec row[2];
    EACH(j, vectors) row[j] = load(w + k * w_step + j * V);
    EACH(i, ROWS) EACH(j, vectors) sums[i][j] = MULTIPLY_ADD(sums[i][j], (vec)a[i * a_row + k * a_step], row[j]);
  }
  EACH(i, ROWS) EACH(j, vectors) store(c + i * c_row + j * V, sums[i][j]);
}
#endif

// The same for more columns, a whole number of vectors; blocks of 2 V columns are w_next apart in w.
PART void product(const int add, output c, const int c_row, input a, const int a_row, const int a_step,
                  input w, const int w_step, const int w_next, int depth, int columns) {
  for (; columns >= COLUMNS; columns -= COLUMNS, c += COLUMNS, w += w_next) tile(2, add, c, c_row, a, a_row, a_step, w, w_step, depth);
  if (columns) tile(1, add, c, c_row, a, a_row, a_step, w, w_step, depth);
}

// Pack n rows of `width` numbers, `stride` apart, as columns: COLUMNS of them together, lane after lane. The last unit
// is padded with zeros.
PART void pack_columns(output to, const KV *restrict from, long stride, int n, const int width) {
  const int lanes = LANES_OF(width);
  for (int row = 0; row < UP(n, UNIT); row += V)
    for (int i = 0; i < width; i += V * PER_LANE) {
      vec x[V];
      if (row + V <= n)
        EACH(j, V) x[j] = ALONG(from + (row + j) * stride + i, width - i);
      else
        EACH(j, V) x[j] = row + j < n ? ALONG(from + (row + j) * stride + i, width - i) : (vec)0;
      transpose_vecs(x);
      const int lane = i / PER_LANE;
      float *first = to + (row / COLUMNS * lanes + lane) * COLUMNS + row % COLUMNS;
      EACH(j, V) if (lane + j < lanes) store(first + j * COLUMNS, x[j]);
    }
}

// Pack n rows of `width` numbers, `stride` apart, as lanes across rows; padded with zeros to whole units and `all` rows.
PART void pack_across(output to, const int to_row, const KV *restrict from, long stride, int n, int all, const int width) {
  for (int row = 0; row < all; row += PER_LANE)
    for (int i = 0; i < width; i += V)
      store(to + row / PER_LANE * to_row + i, row < n ? ACROSS(from + row * stride + i, stride, n - row, width - i) : (vec)0);
}

// Pack n float32 rows as lanes along rows, padded with zeros to `all` rows. Only floats are multiplied by `scale`.
PART void pack_along(output to, const int to_row, input from, long stride, int n, int all, int width, float scale) {
  for (int row = 0; row < all; row++)
    for (int i = 0; i < width; i += V * PER_LANE) {
      vec x = row < n ? ALONG(from + row * stride + i, width - i) : (vec)0;
      store(to + row * to_row + i / PER_LANE, BFLOAT16 ? x : scale * x);
    }
}

#if BACKWARD && BFLOAT16
// Pack n float32 rows, padded with zeros to `all`, transposed: row i of the result has number i of each, in lanes across
// rows.
PART void pack_transposed(output to, const int to_row, input from, long stride, int n, int all, const int width) {
  for (int row = 0; row < all; row += V * PER_LANE)
    for (int i = 0; i < width; i += V) {
      vec x[V];
      EACH(j, V) {
        const int at = row + j * PER_LANE;
        x[j] = at < n ? ACROSS(from + at * stride + i, stride, n - at, width - i) : (vec)0;
      }
      transpose_vecs(x);
      EACH(j, V) store(to + (i + j) * to_row + row / PER_LANE, x[j]);
    }
}

// Write n columns of `from`, KEYS apart, times `scale`, as rows of `width` numbers, `stride` apart.
PART void unpack_columns(output to, long stride, input from, int n, const int width, float scale) {
  for (int row = 0; row < n; row += V)
    for (int i = 0; i < width; i += V) {
      vec x[V];
      EACH(j, V) x[j] = scale * load(from + (i + j) * KEYS + row);
      transpose_vecs(x);
      for (int j = 0; j < MIN(V, n - row); j++) put(to + (row + j) * stride + i, x[j], width - i);
    }
}
#endif

// Write n rows of whole vectors, times scale[row], as rows of `width` numbers, `stride` apart; with `add`, add
// them instead.
PART void unpack(output to, long stride, input from, int n, const int width, int add, const float *scale) {
  for (int row = 0; row < n; row++)
    for (int i = 0; i < width; i += V) {
      float *x = to + row * stride + i;
      vec value = load(from + row * UP(width, UNIT) + i) * scale[row];
      put(x, add ? get(x, width - i, 0) + value : value, width - i);
    }
}

// Prefetch n rows of `width` numbers, `stride` apart, to be read later or, with `write` 1, written.
#define ASK_FOR(write, from, stride, n, width) \
  for (int row = 0; row < (n); row++) \
    UNROLL for (int i = 0; i < (width); i += 64 / (int)sizeof(*(from))) __builtin_prefetch((from) + row * (stride) + i, write, 2)

// The number of keys that query t sees in the block of n keys from k0 on.
PART int seen_by(long t, long offset, long k0, int n) {
  long seen = SKIPS ? MIN(n, offset + t + 1 - k0) : n;
  return seen < 0 ? 0 : (int)seen;
}

// The first key that query t sees, and the first block of keys for a tile that begins with t; `starts` are its row's.
PART long first_seen(const int *starts, long t, long offset) {
  long first = WINDOW ? MAX(0, offset + t + 1 - WINDOW) : 0;
  return STARTS ? MAX(first, MIN(starts[MIN(t, T - 1)], offset + t)) : first;
}
PART long first_block(const int *starts, long t, long offset) { return first_seen(starts, t, offset) / KEYS * KEYS; }

#if PADDING
// Which of the V keys from k0 + j on a query at position `place` sees, given its row's padding.
PART ints seen_at(const unsigned char *padding, long k0, int j, int n, long place) {
  ints seen = 0;
  for (int i = 0; i < V && j + i < n; i++) seen[i] = padding[k0 + j + i] && (!CAUSAL || k0 + j + i <= place) ? -1 : 0;
  return seen;
}
#endif

#if DROP
// Which of the V numbers from column j on, in row t of head `head`, dropout keeps.
PART ints survives(uints seed, const unsigned int *key, long head, long t, long j) {
  unsigned int first = key[1] * ((unsigned int)H * T * S) + (unsigned int)((head * T + t) * S + j);
  return (ints)(hash_of(each_from(first), seed) >= THRESHOLD);
}
#else
#define DROP_SCALE 1.0f
#endif

// Float queries were scaled before the product, so that their scores are already scaled.
#define SCORES(x) (load(x) * (BFLOAT16 ? SCALE : 1))

#if !BACKWARD
KERNEL NAME(output z, output stats WITH(CACHED, KV *key_cache, KV *value_cache), input q, input k, input v
                WITH(CACHED, const int *restrict positions) WITH(IN_ROWS, const int *restrict rows)
                WITH(PADDING, const unsigned char *restrict padding) WITH(STARTS, const int *restrict starts)
                WITH(DROP, uint_input key), int slice) {
  float kt[KEYS * DL] ALIGNED, vs[KEYS / PER_LANE * EP] ALIGNED, qs[ROWS * DW] ALIGNED, s[ROWS * KEYS] ALIGNED, zs[ROWS * EP] ALIGNED, scales[ROWS];
#if BFLOAT16
  float es[ROWS * KEYS / PER_LANE] ALIGNED;
#endif
#if CACHED
  const long tiles = PIECES(T, ROWS), k_row = D, v_row = D;
#else
  const long offset = OFFSET, keys = S, tiles = PIECES(T, ROWS), k_row = KT, v_row = VT;
#endif
#if DROP
  uints seed = seed_of(key, SITE);
#endif
#if AMX_PAIRS
  amx_begin(ROWS, V);
#endif
  for (long unit = FIRST(B * H * PARTS); unit < LAST(B * H * PARTS); unit++) {
    long head = unit / PARTS, b = head / H, h = head % H, kv = h / GROUP;
    long first = tiles * (unit % PARTS) / PARTS, last = tiles * (unit % PARTS + 1) / PARTS;
    const float *q_here = q + Q_AT + b * QB + h * QH;
#if CACHED
    const long offset = MAX(0, MIN(positions[b], S - T)), keys = offset + T, place = (CACHE_ROW(b) * KV_HEADS + kv) * S;
    const KV *k_here = key_cache + place * D, *v_here = value_cache + place * D;
    // Parts of one head write the same numbers to the same places.
    add_rows(key_cache + (place + offset) * D, k + K_AT + b * KB + kv * KH, KT, MIN(T, last * ROWS));
    add_rows(value_cache + (place + offset) * D, v + V_AT + b * VB + kv * VH, VT, MIN(T, last * ROWS));
#else
    const KV *k_here = k + K_AT + b * KB + kv * KH, *v_here = v + V_AT + b * VB + kv * VH;
#endif
#if PADDING
    const unsigned char *pads = padding + b * S;
#endif
#if STARTS
    const int *row_starts = starts + b * T;
#else
    const int *row_starts = 0;
#endif
    for (long k0 = first_block(row_starts, first * ROWS, offset); k0 < (SKIPS ? MIN(keys, offset + MIN(T, last * ROWS)) : keys); k0 += KEYS) {
      int n = MIN(KEYS, keys - k0);
      pack_columns(kt, k_here + k0 * k_row, k_row, n, D);
      pack_across(vs, EP, v_here + k0 * v_row, v_row, n, BFLOAT16 ? UP(n, UNIT) : n, E);
#if !CACHED
      // The next block's keys and values are prefetched, some rows with each tile.
      long next = k0 + KEYS < keys ? unit : MIN(unit + 1, LAST(B * H * PARTS) - 1), next_k0 = next == unit ? k0 + KEYS : 0, asked = 0;
      const KV *next_k = k + K_AT + next / PARTS / H * KB + next / PARTS % H / GROUP * KH + next_k0 * KT;
      const KV *next_v = v + V_AT + next / PARTS / H * VB + next / PARTS % H / GROUP * VH + next_k0 * VT;
      long wanted = next_k0 < keys ? MIN(KEYS, keys - next_k0) : 0;
#endif
      for (long t = first * ROWS; t < MIN(T, last * ROWS); t += ROWS) {
        int rows = MIN(ROWS, T - t), most = seen_by(t + rows - 1, offset, k0, n), started = k0 > first_block(row_starts, t, offset);
        if (!most || first_seen(row_starts, t, offset) >= k0 + n) continue;
        float *z_here = z + ((b * T + t) * H + h) * E, *state = stats + (head * T + t) * 2;
        ASK_FOR(1, z_here, (long)H * E, rows, E);
        ASK_FOR(0, q_here + (t + ROWS) * QT, QT, MIN(ROWS, T - t - ROWS), D);
#if !CACHED
        int asks = MIN(ROWS, wanted - asked);
        ASK_FOR(0, next_k + asked * KT, KT, asks, D);
        ASK_FOR(0, next_v + asked * VT, VT, asks, E);
        asked += asks;
#endif
        pack_along(qs, DW, q_here + t * QT, QT, rows, ROWS, D, SCALE);
        product(0, s, KEYS, qs, DW, 1, kt, COLUMNS, COLUMNS * DL, DL, UP(most, UNIT));
        for (int r = 0; r < rows; r++) {
          float *row = s + r * KEYS;
          int seen = seen_by(t + r, offset, k0, n);
          vec tops = NOTHING, sums = 0;
          for (int j = 0; j < UP(most, UNIT); j += V) {
            vec x = SCORES(row + j);
#if PADDING
            x = seen_at(pads, k0, j, n, offset + t + r) ? x : (vec)HIDDEN;
#endif
            x = (ints)each_from(0) < seen - j ? x : (vec)NOTHING;
#if WINDOW || STARTS
            x = (ints)each_from(0) >= (int)(first_seen(row_starts, t + r, offset) - k0) - j ? x : (vec)NOTHING;
#endif
            store(row + j, x);
            tops = __builtin_elementwise_max(tops, x);
          }
          float before = started ? state[2 * r] : NOTHING, top = max_vec(tops);
          top = before > top ? before : top;
#if WINDOW || STARTS
          top = top > HIDDEN ? top : HIDDEN;  // a query may not have seen a key yet
#endif
          for (int j = 0; j < UP(most, UNIT); j += V) {
            vec e = exp_vec(load(row + j) - top);
            sums += e;
#if DROP
            e = survives(seed, key, head, t + r, k0 + j) ? e : (vec)0;
#endif
            store(row + j, e);
          }
          scales[r] = started ? exp_vec((vec)(before - top))[0] : 0;
          state[2 * r] = top;
          state[2 * r + 1] = (started ? state[2 * r + 1] * scales[r] : 0) + sum_vec(sums);
        }
        for (int r = 0; r < rows; r++)
          for (int i = 0; i < EP; i += V)
            store(zs + r * EP + i, !started ? (vec)0 : scales[r] * get(z_here + (long)r * H * E + i, E - i, 0));
#if BFLOAT16
        pack_along(es, KEYS / PER_LANE, s, KEYS, ROWS, ROWS, UP(most, UNIT), 1);
        product(1, zs, EP, es, KEYS / PER_LANE, 1, vs, EP, COLUMNS, DEEP(most), EP);
#else
        product(1, zs, EP, s, KEYS, 1, vs, EP, COLUMNS, most, EP);
#endif
        int end = k0 + KEYS >= (SKIPS ? MIN(keys, offset + t + rows) : keys);
        for (int r = 0; r < rows; r++) scales[r] = end ? DROP_SCALE / state[2 * r + 1] : 1;
        unpack(z_here, (long)H * E, zs, rows, E, 0, scales);
      }
    }
  }
#if AMX_PAIRS
  amx_end();
#endif
}

#else
// With p the pattern, dp = dz vᵀ (with p's dropout) and ds = p · (dp − Σ dz·z): dv = pᵀ dz, dk = dsᵀ q, dq =
// ds k.
enum {
  BLOCK = MAX(ROWS, MIN(T, AMX_PAIRS ? 64 : 48) / ROWS * ROWS),  // queries
  WIDTH = KEYS + UP(ROWS, V),         // of a row of the pattern, with room for a tile that exceeds the block
  // With BFLOAT16, dk and dv are computed transposed: the numbers of their rows, and of lanes of queries.
  DR = UP(UP(D, ROWS), COLUMNS), ER = UP(UP(E, ROWS), COLUMNS), QL = UP(BLOCK, UNIT) / PER_LANE,
};
KERNEL NAME(OUTPUTS, input q, input k, input v, input z, input dz, input stats
                WITH(PADDING, const unsigned char *restrict padding) WITH(STARTS, const int *restrict starts)
                WITH(DROP, uint_input key), int slice) {
  float kt[KEYS * DL] ALIGNED, vt[KEYS * EL] ALIGNED, ks[KEYS / PER_LANE * DP] ALIGNED;
  float qs[BLOCK * DW] ALIGNED, dzs[BLOCK * EW] ALIGNED, dqs[ROWS * DP] ALIGNED, scales[ROWS];
#if BFLOAT16
  float p[ROWS * WIDTH] ALIGNED, ds[ROWS * WIDTH] ALIGNED, dks[DR * KEYS] ALIGNED, dvs[ER * KEYS] ALIGNED;
  float qt[DR * QL] ALIGNED, dzt[ER * QL] ALIGNED;  // for sums over queries
  float across[2][QL * KEYS] ALIGNED, along[ROWS * KEYS / PER_LANE] ALIGNED;  // p and ds; ds
#else
  float p[BLOCK * WIDTH] ALIGNED, ds[BLOCK * WIDTH] ALIGNED, dks[(KEYS + ROWS) * DP] ALIGNED, dvs[(KEYS + ROWS) * EP] ALIGNED;
  float ones[KEYS];
  for (int i = 0; i < KEYS; i++) ones[i] = 1;
#endif
  const long offset = OFFSET, keys = S;
  for (int i = 0; i < ROWS; i++) scales[i] = SCALE;
#if DROP
  uints seed = seed_of(key, SITE);
#endif
#if AMX_PAIRS
  amx_begin(ROWS, V);
#endif
  for (long unit = FIRST(B * KV_HEADS); unit < LAST(B * KV_HEADS); unit++) {
    long b = unit / KV_HEADS, kv = unit % KV_HEADS, k_at = K_AT + b * KB + kv * KH, v_at = V_AT + b * VB + kv * VH;
#if PADDING
    const unsigned char *pads = padding + b * S;
#endif
#if STARTS
    const int *row_starts = starts + b * T;
#else
    const int *row_starts = 0;
#endif
    for (long k0 = 0; k0 < keys; k0 += KEYS) {
      int n = MIN(KEYS, keys - k0);
      pack_columns(kt, k + k_at + k0 * KT, KT, n, D);
      pack_columns(vt, v + v_at + k0 * VT, VT, n, E);
      pack_across(ks, DP, k + k_at + k0 * KT, KT, n, BFLOAT16 ? UP(n, UNIT) : n, D);
      for (int i = 0; i < (BFLOAT16 ? DR * KEYS : n * DP); i += V) store(dks + i, 0);
      for (int i = 0; i < (BFLOAT16 ? ER * KEYS : n * EP); i += V) store(dvs + i, 0);
      // Some rows of the next block's keys and values, and of this one's gradients, are prefetched with each
      // tile.
      long next = k0 + KEYS < keys ? unit : MIN(unit + 1, LAST(B * KV_HEADS) - 1), next_k0 = next == unit ? k0 + KEYS : 0, asked = 0;
      const float *next_k = k + K_AT + next / KV_HEADS * KB + next % KV_HEADS * KH + next_k0 * KT;
      const float *next_v = v + V_AT + next / KV_HEADS * VB + next % KV_HEADS * VH + next_k0 * VT;
      long wanted = next_k0 < keys ? MIN(KEYS, keys - next_k0) : 0;
      // Queries before `start` see none of these keys.
      long start = SKIPS && k0 > offset ? (k0 - offset) / ROWS * ROWS : 0;
      for (long h = kv * GROUP; h < (kv + 1) * GROUP; h++)
      for (long t0 = start; t0 < T; t0 += BLOCK) {
        if (first_seen(row_starts, t0, offset) >= k0 + n) break;  // nor do the queries after it
        long head = b * H + h, q_at = Q_AT + b * QB + h * QH;
        int queries = MIN(BLOCK, T - t0), all = UP(queries, ROWS);
        const float *dz_here = dz + ((b * T + t0) * H + h) * E, *z_here = z + ((b * T + t0) * H + h) * E;
        pack_along(qs, DW, q + q_at + t0 * QT, QT, queries, all, D, SCALE);
        pack_along(dzs, EW, dz_here, (long)H * E, queries, all, E, 1);
#if BFLOAT16
        pack_transposed(qt, QL, q + q_at + t0 * QT, QT, queries, all, D);
        pack_transposed(dzt, QL, dz_here, (long)H * E, queries, all, E);
#endif
        for (int r0 = 0; r0 < queries; r0 += ROWS) {
          int rows = MIN(ROWS, queries - r0), most = seen_by(t0 + r0 + rows - 1, offset, k0, n);
          if (!most) continue;
#if BFLOAT16
          float *ps_here = p, *ds_here = ds, *p_across = across[0] + r0 / PER_LANE * KEYS, *ds_across = across[1] + r0 / PER_LANE * KEYS;
#else
          float *ps_here = p + r0 * WIDTH, *ds_here = ds + r0 * WIDTH;
#endif
          if (first_seen(row_starts, t0 + r0, offset) >= k0 + n) {  // no key is seen: the products below must read zeros
#if BFLOAT16
            for (int i = 0; i < ROWS / PER_LANE * KEYS; i++) p_across[i] = ds_across[i] = 0;
#else
            for (int i = 0; i < ROWS * WIDTH; i++) ps_here[i] = ds_here[i] = 0;
#endif
            continue;
          }
          int asks = MIN(ROWS, wanted - asked), later = MIN(ROWS, T - t0 - r0 - BLOCK);
          ASK_FOR(0, next_k + asked * KT, KT, asks, D);
          ASK_FOR(0, next_v + asked * VT, VT, asks, E);
          ASK_FOR(1, DK + k_at + (k0 + asked) * KT, KT, MIN(asks, n - asked), D);
          ASK_FOR(1, DV + v_at + (k0 + asked) * VT, VT, MIN(asks, n - asked), E);
          asked += asks;
          ASK_FOR(0, q + q_at + (t0 + r0 + BLOCK) * QT, QT, later, D);
          ASK_FOR(0, dz_here + (long)(r0 + BLOCK) * H * E, (long)H * E, later, E);
          ASK_FOR(0, z_here + (long)(r0 + BLOCK) * H * E, (long)H * E, later, E);
          ASK_FOR(1, DQ + q_at + (t0 + r0) * QT, QT, rows, D);
          product(0, ps_here, WIDTH, qs + r0 * DW, DW, 1, kt, COLUMNS, COLUMNS * DL, DL, UP(most, UNIT));
          product(0, ds_here, WIDTH, dzs + r0 * EW, EW, 1, vt, COLUMNS, COLUMNS * EL, EL, UP(most, UNIT));
          for (int r = r0; r < r0 + ROWS; r++) {
            float *ps = ps_here + (r - r0) * WIDTH, *dss = ds_here + (r - r0) * WIDTH, top = 0, scale = 0, mean = 0;
            int seen = 0;
            if (r < queries) {
              const float *state = stats + (head * T + t0 + r) * 2;
              vec sums = 0;
              for (int i = 0; i < E; i += V) {
                const long at = (long)r * H * E + i;
                sums += FACTOR_OF(get(dz_here + at, E - i, 0)) * get(z_here + at, E - i, 0);
              }
              mean = sum_vec(sums), top = state[0], scale = 1 / state[1], seen = seen_by(t0 + r, offset, k0, n);
            }
            for (int j = 0; j < UP(most, UNIT); j += V) {
              vec x = SCORES(ps + j), dp = load(dss + j);
#if PADDING
              ints visible = seen_at(pads, k0, j, n, offset + t0 + r);
              x = visible ? x : (vec)HIDDEN;
#endif
              x = (ints)each_from(0) < seen - j ? x : (vec)NOTHING;
#if WINDOW || STARTS
              x = (ints)each_from(0) >= (int)(first_seen(row_starts, t0 + r, offset) - k0) - j ? x : (vec)NOTHING;
#endif
              vec pattern = exp_vec(x - top) * scale, dropped = pattern;
#if DROP
              ints keep = survives(seed, key, head, t0 + r, k0 + j);
              dropped = keep ? pattern * DROP_SCALE : (vec)0;
              dp = keep ? dp * DROP_SCALE : (vec)0;
#endif
              vec d = pattern * (dp - mean);
#if PADDING
              d = visible ? d : (vec)0;
#endif
              store(ps + j, dropped);
              store(dss + j, d);
            }
#if !BFLOAT16
            for (int j = UP(most, V); j < UP(most, V) + ROWS; j += V) store(ps + j, 0), store(dss + j, 0);
#endif
          }
#if BFLOAT16
          pack_across(p_across, KEYS, ps_here, WIDTH, ROWS, ROWS, UP(most, UNIT));
          pack_across(ds_across, KEYS, ds_here, WIDTH, ROWS, ROWS, UP(most, UNIT));
          pack_along(along, KEYS / PER_LANE, ds_here, WIDTH, ROWS, ROWS, UP(most, UNIT), 1);
          product(0, dqs, DP, along, KEYS / PER_LANE, 1, ks, DP, COLUMNS, DEEP(most), DP);
#else
          product(0, dqs, DP, ds_here, WIDTH, 1, ks, DP, COLUMNS, most, DP);
#endif
          unpack(DQ + q_at + (t0 + r0) * QT, QT, dqs, rows, D, k0 > first_block(row_starts, t0 + r0, offset), scales);
        }
#if BFLOAT16
        for (int m = 0; m < n; m += COLUMNS) {
          // The first query that sees one of these keys, and its tile.
          int first = SKIPS && k0 + m > offset + t0 ? k0 + m - offset - t0 : 0;
          if (first >= queries) break;
          first = first / ROWS * ROWS;
          const int lane = first / PER_LANE, at = lane * KEYS + m, lanes = (all - first) / PER_LANE;
          for (int i = 0; i < E; i += ROWS) product(1, dvs + i * KEYS + m, KEYS, dzt + i * QL + lane, QL, 1, across[0] + at, KEYS, COLUMNS, lanes, COLUMNS);
          for (int i = 0; i < D; i += ROWS) product(1, dks + i * KEYS + m, KEYS, qt + i * QL + lane, QL, 1, across[1] + at, KEYS, COLUMNS, lanes, COLUMNS);
        }
#else
        for (int m = 0; m < n; m += ROWS) {  // the first query that sees one of these keys
          int first = SKIPS && k0 + m > offset + t0 ? k0 + m - offset - t0 : 0;
          if (first >= queries) break;
          product(1, dvs + m * EP, EP, p + m + first * WIDTH, 1, WIDTH, dzs + first * EP, EP, COLUMNS, queries - first, EP);
          product(1, dks + m * DP, DP, ds + m + first * WIDTH, 1, WIDTH, qs + first * DP, DP, COLUMNS, queries - first, DP);
        }
#endif
      }
#if BFLOAT16
      unpack_columns(DK + k_at + k0 * KT, KT, dks, n, D, SCALE);
      unpack_columns(DV + v_at + k0 * VT, VT, dvs, n, E, 1);
#else
      unpack(DK + k_at + k0 * KT, KT, dks, n, D, 0, ones);
      unpack(DV + v_at + k0 * VT, VT, dvs, n, E, 0, ones);
#endif
    }
  }
#if AMX_PAIRS
  amx_end();
#endif
}
#endif
