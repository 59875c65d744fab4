// The peak speed of this core: multiply-adds in registers, REPEATS rounds of them. They are of floats, with INTEGERS of
// bytes, with BFLOAT16 of bfloat16; with AMX, of squares of the last two, see amx.h. The sums are written, so that no
// compiler removes the work, and then the number of operations of a round.

#define SUMS 12

#if INTEGERS
#define VALUES ints
#define ADD(sum, a, b) dot4(sum, (ints)a, (ints)b)
#define PRODUCTS 4  // products a lane
#elif BFLOAT16
#define VALUES vec
#define ADD(sum, a, b) dot2(sum, a, b)
#define PRODUCTS 2
#else
#define VALUES vec
#define ADD(sum, a, b) sum * a + b
#define PRODUCTS 1
#endif

#if INTEGERS && AMX_BYTES
#define SQUARES "tdpbusd"
#elif AMX_PAIRS
#define SQUARES "tdpbf16ps"
#endif

KERNEL NAME(output y, input x, int slice) {
#ifdef SQUARES
  float square[32 * 32];
  for (int i = 0; i < 32 * 32; i += V) store(square + i, 0);  // not = {0}, for which compilers may call memset
  amx_begin(32, 16);
  amx_load(square, 128, 32);
  AMX_LOAD(square, 64, 4);
  AMX_LOAD(square, 64, 5);
  AMX_LOAD(square, 64, 6);
  AMX_LOAD(square, 64, 7);
  for (long n = 0; n < REPEATS; n++) {
    AMX_MULTIPLY(SQUARES, 4, 6, 0);
    AMX_MULTIPLY(SQUARES, 4, 7, 1);
    AMX_MULTIPLY(SQUARES, 5, 6, 2);
    AMX_MULTIPLY(SQUARES, 5, 7, 3);
  }
  amx_store(square, 128, 32);
  amx_end();
  y += 32 * slice;
  store(y, load(square));
  y[16] = 2 * 32 * 32 * 16 * PRODUCTS;
#else
  VALUES sums[SUMS];
  vec a = load(x), b = load(x + V);
  EACH(i, SUMS) sums[i] = i;
  for (long n = 0; n < REPEATS; n++) EACH(i, SUMS) sums[i] = ADD(sums[i], a, b);
  VALUES sum = 0;
  EACH(i, SUMS) sum += sums[i];
  y += 32 * slice;
  store(y, (vec)sum);
  y[16] = 2 * V * SUMS * PRODUCTS;
#endif
}
