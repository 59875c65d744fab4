// The peak speed of this core: multiply-adds in registers, REPEATS times, of floats or, with INTEGERS, of
// bytes. The sums are written so that no compiler removes the work, followed by the operations of a round.

#define SUMS 12

#if INTEGERS
#define VALUES ints
#define MULTIPLY_ADD(sum, a, b) dot4(sum, (ints)a, (ints)b)
#define EACH 4  // products a lane
#else
#define VALUES vec
#define MULTIPLY_ADD(sum, a, b) sum * a + b
#define EACH 1
#endif

KERNEL NAME(float *restrict y, const float *restrict x, int slice) {
  VALUES sums[SUMS];
  vec a = *(const vec *)x, b = *(const vec *)(x + V);
  UNROLL for (int i = 0; i < SUMS; i++) sums[i] = i;
  for (long n = 0; n < REPEATS; n++) UNROLL for (int i = 0; i < SUMS; i++) sums[i] = MULTIPLY_ADD(sums[i], a, b);
  VALUES sum = 0;
  UNROLL for (int i = 0; i < SUMS; i++) sum += sums[i];
  y += 32 * slice;
  *(vec *)y = (vec)sum;
  y[16] = 2 * V * SUMS * EACH;
}
