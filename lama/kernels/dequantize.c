// A quantised matrix of ROWS x K in float32.
KERNEL NAME(output y, const unsigned char *restrict w, const scale_type *restrict scales, int slice) {
  for (long i = FIRST(ROWS); i < LAST(ROWS); i++) unpack(y + i * K, w + i * ROW_BYTES, scales + i * SCALES);
}
