// TOKENS rows of D floats out of, or into, the ROWS rows of a table. A token that is not in the table is a row of zeros.

#if BACKWARD
// Row t of dw is the sum of the rows of dy whose token is t, in their order; a slice has some of the columns.
KERNEL NAME(float *restrict dw, const int *restrict tokens, const float *restrict dy, int slice) {
  for (long i = 0; i < ROWS; i++)
    for (int j = FIRST(D); j < LAST(D); j++) dw[i * D + j] = 0;
  for (long i = 0; i < TOKENS; i++)
    if (tokens[i] >= 0 && tokens[i] < ROWS)
      for (int j = FIRST(D); j < LAST(D); j++) dw[(long)tokens[i] * D + j] += dy[i * D + j];
}
#else
KERNEL NAME(float *restrict y, const int *restrict tokens, const float *restrict w, int slice) {
  for (long i = FIRST(TOKENS); i < LAST(TOKENS); i++)
    for (int j = 0; j < D; j++) y[i * D + j] = tokens[i] >= 0 && tokens[i] < ROWS ? w[(long)tokens[i] * D + j] : 0;
}
#endif
