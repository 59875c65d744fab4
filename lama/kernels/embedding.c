// TOKENS rows of D numbers out of, or into, the ROWS rows of a table. A token that is not in the table is a row of zeros.
//
// POSITIONS: the rows of another table, as many, are added, LENGTH tokens at a time: its row *position and those after it,
// where CACHED, else its first.

#if GRADIENT_OF_TOKENS
// Row t of dw is the sum of the rows of dy whose token is t, in their order; a slice has some of the columns.
KERNEL NAME(float *restrict dw, const int *restrict tokens, const float *restrict dy, int slice) {
  for (long i = 0; i < ROWS; i++)
    for (int j = FIRST(D); j < LAST(D); j++) dw[i * D + j] = 0;
  for (long i = 0; i < TOKENS; i++)
    if (tokens[i] >= 0 && tokens[i] < ROWS)
      for (int j = FIRST(D); j < LAST(D); j++) dw[(long)tokens[i] * D + j] += dy[i * D + j];
}
#elif GRADIENT_OF_POSITIONS
// Row t of dp is the sum of the rows t, t + LENGTH, ... of dy; zeros from row LENGTH on.
KERNEL NAME(float *restrict dp, const float *restrict dy, int slice) {
  for (long row = FIRST(POSITIONS); row < LAST(POSITIONS); row++)
    for (int j = 0; j < D; j += V) {
      vec sum = 0;
      if (row < LENGTH)
        for (long i = row; i < TOKENS; i += LENGTH) sum += j + V <= D ? load(dy + i * D + j) : load_some(dy + i * D + j, D - j, 0);
      if (j + V <= D)
        store(dp + row * D + j, sum);
      else
        store_some(dp + row * D + j, sum, D - j);
    }
}
#else
#ifdef BITS  // of a quantised table, see quantized.h
#define TABLE const WEIGHT *restrict w, const _Float16 *restrict scales
#else
#define TABLE const WEIGHT *restrict w
#endif
#if CACHED
KERNEL NAME(float *restrict y, const int *restrict tokens, TABLE, const POSITION_WEIGHT *restrict p,
            const int *restrict position, int slice) {
  const long last = POSITIONS - LENGTH, at = position[0] < 0 ? 0 : MIN(position[0], last);
#elif POSITIONS
KERNEL NAME(float *restrict y, const int *restrict tokens, TABLE, const POSITION_WEIGHT *restrict p, int slice) {
  const long at = 0;
#else
KERNEL NAME(float *restrict y, const int *restrict tokens, TABLE, int slice) {
#endif
  for (long i = FIRST(TOKENS); i < LAST(TOKENS); i++) {
    const int known = tokens[i] >= 0 && tokens[i] < ROWS;
    const long token = known ? tokens[i] : 0;
#ifdef BITS
    float row[D];
    unpack(row, w + token * ROW_BYTES, scales + token * GROUPS);
#else
    const WEIGHT *row = w + token * D;
#endif
    for (int j = 0; j < D; j += V) {
      vec x = !known ? (vec)0 : j + V <= D ? load(row + j) : load_some(row + j, D - j, 0);
#if POSITIONS
      const POSITION_WEIGHT *place = p + (at + i % LENGTH) * D + j;
      x += j + V <= D ? load(place) : load_some(place, D - j, 0);
#endif
      if (j + V <= D)
        store(y + i * D + j, x);
      else
        store_some(y + i * D + j, x, D - j);
    }
  }
}
#endif
