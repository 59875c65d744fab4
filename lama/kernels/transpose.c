// Transpose `count` consecutive matrices of rows x columns words, of 2 or 4 bytes each. Rows of the results are
// `stride` words apart.
//
// Tiles of whole cache lines are read, then written. Rows that are a multiple of 4 kB apart share few places in the
// cache: numpy's loops over single columns lose most of the lines that they read.

#define SIDE (64 / (int)sizeof(WORD))  // words in a cache line
#define MIN(x, y) ((x) < (y) ? (x) : (y))

__attribute__((no_builtin("memset", "memcpy"))) void NAME(WORD *restrict out, const WORD *restrict in, long count,
                                                          long rows, long columns, long stride) {
  for (; count > 0; count--, in += rows * columns, out += columns * stride)
    for (long c = 0; c < columns; c += SIDE)
      for (long r = 0; r < rows; r += SIDE) {
        int height = (int)MIN(SIDE, rows - r), width = (int)MIN(SIDE, columns - c);
        if (height == SIDE && width == SIDE) {
          WORD tile[SIDE][SIDE];
          for (int i = 0; i < SIDE; i++)
            for (int j = 0; j < SIDE; j++) tile[i][j] = in[(r + i) * columns + c + j];
          for (int j = 0; j < SIDE; j++)
            for (int i = 0; i < SIDE; i++) out[(c + j) * stride + r + i] = tile[i][j];
        } else
          for (int j = 0; j < width; j++)
            for (int i = 0; i < height; i++) out[(c + j) * stride + r + i] = in[(r + i) * columns + c + j];
      }
}
