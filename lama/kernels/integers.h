// Products of bytes, four at a time. A lane of `a` and one of `w` are four signed bytes each; the bytes of
// `a` have SHIFT added, for an instruction that takes them unsigned.
//
// Such an instruction has four times the speed of float multiply-adds; the code without it has a quarter of
// it. `multiplies_integers` looks for DOT.

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

// sums + the four products, in each lane.
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
