// Rotate B x T tokens of H heads: of a head's D numbers, i and i + R are rotated by angle i of the token's position.
// Row p of the table has R cosines, then R sines. Element (b, h, t, i) of x is x[X_AT + b * XB + h * XH + t * XT +
// i]; y is (B, H, T, D). With AT, row b's tokens are at consecutive positions from positions[b]; with AT_EACH, at
// positions (B, T); else at positions from 0.
//
// BACKWARD: dy has the layout of y, and dx that of x, with ROW numbers for each token.

#if BACKWARD
KERNEL NAME(output dx, input dy, input table WITH(AT, const int *restrict positions), int slice) {
#else
KERNEL NAME(output y, input x, input table WITH(AT, const int *restrict positions), int slice) {
#endif
  for (long unit = FIRST(B * T); unit < LAST(B * T); unit++) {
    const long b = unit / T, t = unit % T;
#if AT
    const long p = MAX(0, MIN(AT_EACH ? positions[unit] : positions[b] + t, LENGTH - 1));
#else
    const long p = t;
#endif
    const float *cos = table + p * 2 * R, *sin = cos + R;
#if BACKWARD
    if (ROW > H * D)
      for (int i = 0; i < ROW; i += V) put(dx + unit * ROW + i, (vec)0, ROW - i);
#endif
    for (long h = 0; h < H; h++) {
#if BACKWARD
      const float *from = dy + ((b * H + h) * T + t) * D;
      float *to = dx + X_AT + b * XB + h * XH + t * XT;
#else
      const float *from = x + X_AT + b * XB + h * XH + t * XT;
      float *to = y + ((b * H + h) * T + t) * D;
#endif
      for (int i = 0; i < R; i += V) {
        vec first = get(from + i, R - i, 0), second = get(from + R + i, R - i, 0);
        vec c = get(cos + i, R - i, 0), s = get(sin + i, R - i, 0);
        if (BACKWARD) s = -s;
        put(to + i, first * c - second * s, R - i);
        put(to + R + i, second * c + first * s, R - i);
      }
      for (int i = 2 * R; i < D; i += V) put(to + i, get(from + i, D - i, 0), D - i);
    }
  }
}
