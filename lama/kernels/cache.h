// Two caches (., KV_HEADS, S, D) of type KV. Row b, or with IN_ROWS row rows[b], already holds positions[b] keys and
// values of each head. The T new ones, at k and v, are first written after these.

// The keys of a block, whose exponentials are summed first. Their number does not depend on S, unless S is smaller.
enum { KEYS = MIN(MAX(2 * V, 16384 / UP(D, V) / (2 * V) * (2 * V)), UP(S, 2 * V)) };

#if IN_ROWS
#define CACHE_ROW(b) (long)rows[b]
#else
#define CACHE_ROW(b) (b)
#endif

PART void add_rows(KV *restrict to, input from, long stride, long n) {
  for (long row = 0; row < n; row++, to += D, from += stride)
    for (int i = 0; i < D; i += V) put(to + i, get(from + i, D - i, 0), D - i);
}
