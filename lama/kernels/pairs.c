// Weights of 4 bits in GGUF's blocks as lama holds them. A block of SIZE bytes has, from byte AT on, WIDTH bytes
// with as many weights in their lower halves and then as many in their upper ones, and again to its end. Here
// neighbours share a byte, the first in the lower half. The blocks of a row follow one another; rows of the
// result are `stride` bytes apart.

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
