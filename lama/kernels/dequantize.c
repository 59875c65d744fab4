// Convert a quantised matrix, D_OUT x K, to float32.
KERNEL NAME(output y, const unsigned char *restrict w, const unsigned char *restrict scales, int slice) {
  for (long i = FIRST(D_OUT); i < LAST(D_OUT); i++) unpack(y + i * K, row_at(w, scales, i));
}
