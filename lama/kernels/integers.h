// Products of bytes, four at a time. A lane of `a` and one of `w` are four signed bytes each. SHIFT is added to
// the bytes of `a`, for an instruction that needs them unsigned.
//
// Such an instruction has four times the speed of float multiply-adds. Two instructions that multiply 16-bit
// numbers have the speed of floats, and code without either a quarter of it. `multiplies_integers` looks for DOT.

#if PORTABLE
#elif defined(__AVX512VNNI__) && !HALVES
#define DOT "vpdpbusd %2, %1, %0"
#define SHIFT 128
#define PLACE "v"
#elif defined(__AVXVNNI__) && !HALVES
#define DOT "%{vex%} vpdpbusd %2, %1, %0"
#define SHIFT 128
#define PLACE "x"
#elif defined(__ARM_FEATURE_DOTPROD) && !HALVES
#define DOT "sdot %0.4s, %1.16b, %2.16b"
#define SHIFT 0
#define PLACE "w"
#elif V == 4 && defined(__SSE2__)
#define DOT __builtin_ia32_pmaddwd128
#elif V == 8 && defined(__AVX2__)
#define DOT __builtin_ia32_pmaddwd256
#elif V == 16 && defined(__AVX512BW__)
#define DOT __builtin_ia32_pmaddwd512
#endif

// With AMX, another instruction multiplies the bytes of 16 rows by those of 16 columns: see amx.h.
#if defined(AMX_LOAD) && defined(__AMX_INT8__) && defined(__AVX512VNNI__) && !HALVES
#define AMX_BYTES 1
#else
#define AMX_BYTES 0
#endif

typedef unsigned char bytes __attribute__((ext_vector_type(V), aligned(1)));

// sums + the four products, in each lane.
#ifdef PLACE
PART ints dot4(ints sums, ints a, ints w) {
  __asm__(DOT : "+" PLACE(sums) : PLACE(a), PLACE(w));
  return sums;
}
#elif defined(DOT)
#define SHIFT 0
typedef short pairs __attribute__((vector_size(4 * V)));
PART ints dot4(ints sums, ints a, ints w) {
  const pairs even = (pairs)DOT((pairs)a << 8 >> 8, (pairs)w << 8 >> 8), odd = (pairs)DOT((pairs)a >> 8, (pairs)w >> 8);
  return sums + (ints)even + (ints)odd;
}
#else
#define SHIFT 0
PART ints dot4(ints sums, ints a, ints w) {
  UNROLL for (int bits = 0; bits < 32; bits += 8) sums += (a << (24 - bits) >> 24) * (w << (24 - bits) >> 24);
  return sums;
}
#endif
