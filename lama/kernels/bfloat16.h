// Products of factors that are rounded to bfloat16 if BFLOAT16 is 1, else of floats without rounding.
//
// An instruction that multiplies pairs of bfloat16 has twice the speed of float multiply-adds. It may round
// between the two products, and treat numbers below 2^-126 as 0. `multiplies_bfloat16` looks for DOT2. Without
// it the rounded numbers are multiplied as floats. With AMX_PAIRS, see amx.h, another instruction multiplies 16
// pairs of 16 rows by those of 16 columns; the pairs are packed in the same way.

#if PORTABLE
#elif defined(__AVX512BF16__)
#define DOT2 "vdpbf16ps %2, %1, %0"
#define ROUND2 "vcvtne2ps2bf16 %1, %2, %0"
#define REGISTER "v"
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define DOT2 "bfdot %0.4s, %1.8h, %2.8h"
#define REGISTER "w"
#endif

#ifdef DOT2
// A lane's pair is in the 32 bits of a float, the first number in the lower half.
typedef unsigned short both __attribute__((ext_vector_type(2 * V), aligned(2)));

// sums + both products, in each lane.
PART vec dot2(vec sums, vec a, vec w) {
  __asm__(DOT2 : "+" REGISTER(sums) : REGISTER(a), REGISTER(w));
  return sums;
}

// Round 2 V numbers to nearest, as pairs: of consecutive numbers; of the numbers at the same index.
PART vec pairs_along(vec first, vec second) {
#ifdef ROUND2
  vec pairs;
  __asm__(ROUND2 : "=" REGISTER(pairs) : REGISTER(first), REGISTER(second));
  return pairs;
#else
  unsigned short rounded[2 * V];
  store(rounded, first);
  store(rounded + V, second);
  return (vec)*(const both *)rounded;
#endif
}
PART vec pairs_across(vec lower, vec upper) {
  both x = (both)pairs_along(lower, upper);
  return (vec)__builtin_shufflevector(x, x, LOW, HIGH);
}

// Read the first n numbers at x, 2 V if n is larger, as pairs, with zeros in the other places.
#define GET_PAIRS(type) \
  PART OVERLOADED vec get_pairs(const type *x, long n) { return pairs_along(get(x, n, 0), get(x + V, n - V, 0)); }
GET_PAIRS(float)
GET_PAIRS(_Float16)
PART OVERLOADED vec get_pairs(const unsigned short *x, long n) {
  return n >= 2 * V ? (vec)*(const both *)x : pairs_along(get(x, n, 0), get(x + V, n - V, 0));
}
#endif

#if BFLOAT16 && defined(DOT2) && defined(AMX_LOAD)
#define AMX_PAIRS 1
#else
#define AMX_PAIRS 0
#endif

// A sum of K products in lanes of PER_LANE numbers. ALONG: V lanes of one row, of which `numbers` numbers are left.
// ACROSS: one lane of each of V rows, or of the `some` that exist; its numbers are `step` apart.
#define LANES PIECES(K, PER_LANE)
#if BFLOAT16 && defined(DOT2)
#define PER_LANE 2
#define MULTIPLY_ADD(sums, a, w) dot2(sums, a, w)
#define ALONG(x, numbers) get_pairs(x, numbers)
#define ACROSS(x, step, numbers, some) pairs_across(get(x, some, 0), (numbers) > 1 ? get((x) + (step), some, 0) : (vec)0)
#else
#define PER_LANE 1
#define MULTIPLY_ADD(sums, a, w) ((sums) + (a) * (w))
#define ALONG(x, numbers) FACTOR_OF(get(x, numbers, 0))
#define ACROSS(x, step, numbers, some) FACTOR_OF(get(x, some, 0))
#endif
// A factor that is not packed in lanes.
#define FACTOR_OF(x) (BFLOAT16 ? (vec)(bfloat16_bits(x) << 16) : (x))
