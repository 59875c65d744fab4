// Bytes multiplied four at a time, and what must be known of them where they are rounded. A lane of `a` and one of `w` are
// four signed bytes each; those of `a` are stored SHIFT larger, for an instruction that takes them unsigned.
//
// Such an instruction has four times the speed of float multiply-adds; without one, what follows has a quarter of it: see
// `multiplies_integers`, which asks for DOT.

#if PORTABLE
#elif defined(__AVX512VNNI__)
#define DOT "vpdpbusd %2, %1, %0"
#define SHIFT 128
#define PLACE "v"
#elif defined(__AVXVNNI__)
#define DOT "%{vex%} vpdpbusd %2, %1, %0"
#define SHIFT 128
#define PLACE "x"
#elif defined(__ARM_FEATURE_DOTPROD)
#define DOT "sdot %0.4s, %1.16b, %2.16b"
#define SHIFT 0
#define PLACE "w"
#endif

typedef unsigned char bytes __attribute__((ext_vector_type(V), aligned(1)));

// In each lane, sums + the four products.
#ifdef DOT
PART ints dot4(ints sums, ints a, ints w) {
  __asm__(DOT : "+" PLACE(sums) : PLACE(a), PLACE(w));
  return sums;
}
#else
#define SHIFT 0
PART ints dot4(ints sums, ints a, ints w) {
  UNROLL for (int bits = 0; bits < 32; bits += 8) sums += (a << (24 - bits) >> 24) * (w << (24 - bits) >> 24);
  return sums;
}
#endif
