// Convert 4-bit weights from GGUF's blocks to lama's order. From byte AT on, a block of SIZE bytes has groups of
// WIDTH bytes: WIDTH weights in their lower halves, then as many in their upper halves. In lama's order consecutive
// weights share a byte, the first in its lower half. The blocks of a row are consecutive; rows of the result are
// `stride` bytes apart.

typedef unsigned short pair __attribute__((aligned(1), may_alias));

__attribute__((no_builtin("memset", "memcpy"))) void NAME(unsigned char *restrict out,
                                                          const unsigned char *restrict in, long rows, long blocks,
                                                          long stride) {
  for (long row = 0; row < rows; row++) {
    unsigned char *to = out + row * stride;
    for (long block = 0; block < blocks; block++, in += SIZE)
      for (int at = AT; at < SIZE; at += WIDTH, to += WIDTH)
        for (int i = 0; i < WIDTH / 2; i++) {
          int both = ((const pair *)(in + at))[i];
          to[i] = (both & 15) | (both >> 4 & 0xf0);
          to[WIDTH / 2 + i] = (both >> 4 & 15) | (both >> 8 & 0xf0);
        }
  }
}
