// REPEATS times some floating-point operations that depend on nothing but registers: how fast this core can multiply
// and add. The sums are stored so that no compiler leaves the work out, and behind them the operations of a round.

#define SUMS 12

KERNEL NAME(float *restrict y, const float *restrict x) {
  vec sums[SUMS], a = *(const vec *)x, b = *(const vec *)(x + V);
  UNROLL for (int i = 0; i < SUMS; i++) sums[i] = i;
  for (long n = 0; n < REPEATS; n++) UNROLL for (int i = 0; i < SUMS; i++) sums[i] = sums[i] * a + b;
  vec sum = 0;
  UNROLL for (int i = 0; i < SUMS; i++) sum += sums[i];
  *(vec *)y = sum;
  y[16] = 2 * V * SUMS;
}
