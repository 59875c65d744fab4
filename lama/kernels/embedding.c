// Read TOKENS rows of D numbers from a table of ROWS rows, or add such rows to its gradient. A token outside the
// table gets a row of zeros.
//
// POSITIONS: to each row of LENGTH tokens, consecutive rows of a second table are added. With CACHED, those of
// batch row b begin at row positions[b], else at row 0.

#if GRADIENT_OF_TOKENS
// Row t of dw is the sum of the rows of dy whose token is t, in order. With ADD they are added to dw. A slice computes
// some of the columns.
KERNEL NAME(output dw, const int *restrict tokens, input dy, int slice) {
  for (long i = 0; !ADD && i < ROWS; i++)
    for (int j = FIRST(D); j < LAST(D); j++) dw[i * D + j] = 0;
  for (long i = 0; i < TOKENS; i++)
    if (tokens[i] >= 0 && tokens[i] < ROWS)
      for (int j = FIRST(D); j < LAST(D); j++) dw[(long)tokens[i] * D + j] += dy[i * D + j];
}
#elif GRADIENT_OF_POSITIONS
// Row t of dp is the sum of the rows t, t + LENGTH, ... of dy; zeros from row LENGTH on.
KERNEL NAME(output dp, input dy, int slice) {
  for (long row = FIRST(POSITIONS); row < LAST(POSITIONS); row++)
    for (int j = 0; j < D; j += V) {
      vec sum = 0;
      if (row < LENGTH)
        for (long i = row; i < TOKENS; i += LENGTH) sum += get(dy + i * D + j, D - j, 0);
      put(dp + row * D + j, sum, D - j);
    }
}
#else
KERNEL NAME(output y, const int *restrict tokens, const WEIGHT *restrict w,
#ifdef BITS  // the table is quantised, see quantized.h
            const unsigned char *restrict scales,
#endif
#if POSITIONS
            const POSITION_WEIGHT *restrict p,
#endif
#if CACHED
            const int *restrict positions,
#endif
            int slice) {
  for (long i = FIRST(TOKENS); i < LAST(TOKENS); i++) {
    const int known = tokens[i] >= 0 && tokens[i] < ROWS;
    const long token = known ? tokens[i] : 0;
#ifdef BITS
    float row[D];
    unpack(row, row_at(w, scales, token));
#elif UNIT_SIZE  // the table is in tiles, see tiles.h
    float row[D];
    for (int j = 0; j < D; j++) row[j] = load1(WEIGHTS_AT(w, token, j) + j % UNIT_SIZE);
#else
    const WEIGHT *row = w + token * D;
#endif
#if CACHED
    const long position = positions[i / LENGTH], at = position < 0 ? 0 : MIN(position, (long)POSITIONS - LENGTH);
#else
    const long at = 0;
#endif
    for (int j = 0; j < D; j += V) {
      vec x = known ? get(row + j, D - j, 0) : (vec)0;
#if POSITIONS
      x += get(p + (at + i % LENGTH) * D + j, D - j, 0);
#endif
      put(y + i * D + j, x, D - j);
    }
  }
}
#endif
