// The peak speed of this core: multiply-adds in registers, REPEATS times, of floats, with INTEGERS of bytes, with
// BFLOAT16 of bfloat16. The sums are written so that no compiler removes the work, followed by the operations of a
// round.

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

KERNEL NAME(output y, input x, int slice) {
  VALUES sums[SUMS];
  vec a = load(x), b = load(x + V);
  EACH(i, SUMS) sums[i] = i;
  for (long n = 0; n < REPEATS; n++) EACH(i, SUMS) sums[i] = ADD(sums[i], a, b);
  VALUES sum = 0;
  EACH(i, SUMS) sum += sums[i];
  y += 32 * slice;
  store(y, (vec)sum);
  y[16] = 2 * V * SUMS * PRODUCTS;
}
