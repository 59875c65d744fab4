// The start of every kernel: the vector type of this machine (16, 8 or 4 floats), and functions of vectors.

#pragma clang diagnostic ignored "-Wpass-failed"  // a loop that stays rolled is slower, not wrong

#if defined(V)  // set by tests of machines with shorter vectors
#elif defined(__AVX512F__)
#define V 16
#elif defined(__AVX__)
#define V 8
#else
#define V 4
#endif
#define MIN(x, y) ((x) < (y) ? (x) : (y))
#define MAX(x, y) ((x) > (y) ? (x) : (y))
#define UP(n, unit) (((n) + (unit)-1) / (unit) * (unit))
#define PIECES(n, most) (((n) + (most)-1) / (most))
#define EQUAL_PIECE(n, most, unit) UP(PIECES(n, PIECES(n, most)), unit)
// All products, whatever their number of rows, sum pieces of this size, of numbers or groups: sums have the same bits.
#define SUMMED(n) EQUAL_PIECE(n, 192, V)
#define SUMMED_GROUPS(n) EQUAL_PIECE(n, 24, 2)
#define UNROLL _Pragma("unroll")
#define EACH(i, n) UNROLL for (int i = 0; i < (n); i++)
typedef float vec __attribute__((ext_vector_type(V), aligned(4)));
typedef int ints __attribute__((ext_vector_type(V), aligned(4)));
typedef unsigned int uints __attribute__((ext_vector_type(V), aligned(4)));
// Types of arguments, which do not overlap in memory.
typedef const float *restrict input;
typedef float *restrict output;
typedef const unsigned int *restrict uint_input;

// This slice's part of `units` equal units: FIRST to LAST - 1. `slice` is every kernel's last argument.
#define FIRST(units) ((long)(units) * slice / SLICES)
#define LAST(units) ((long)(units) * (slice + 1) / SLICES)
// The same for the vectors of N numbers: one begins at number i, with LEFT(i) numbers left in all.
#define VECTORS_AT(i) for (long i = FIRST(PIECES(N, V)) * V; i < LAST(PIECES(N, V)) * V; i += V)
#define LEFT(i) (N % V ? N - (i) : V)

// Further arguments of a kernel if `flag` is 1; none if it is 0.
#define WITH(flag, ...) WITH_VALUE(flag, __VA_ARGS__)
#define WITH_VALUE(flag, ...) WITH_##flag(__VA_ARGS__)
#define WITH_0(...)
#define WITH_1(...) , __VA_ARGS__

// Without the width, clang splits vectors of 16 floats on machines where it prefers 8. Without no_builtin it may
// call memset, which is not linked.
#define ATTRIBUTES no_builtin("memset", "memcpy"), min_vector_width(V * 32)
#define PART static inline __attribute__((always_inline, ATTRIBUTES))
#define KERNEL __attribute__((ATTRIBUTES)) void

// e^x to 1.2 units in the last place; exactly 0 below -87, e^88 above 88, NaN for NaN. With x = n ln 2 + r and
// |r| <= ln 2 / 2, e^r is the polynomial 1 + r + ... of degree 6 with the least relative error: 3e-9, found by
// Lawson's weighted least squares. 2^n is put into the exponent's bits. The sum with ROUNDER has no bits for
// fractions: its last bits are n + 127.
#define ROUNDER (12582912.0f + 127)  // 3 · 2^22
PART vec exp_vec(vec any) {
  vec x = any < -87.0f ? (vec)-87.0f : any;  // not with min and max, which would drop a NaN
  x = x > 88.0f ? (vec)88.0f : x;
  vec t = x * 1.44269504f + ROUNDER, n = t - ROUNDER;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln 2 in two parts: the first times n is exact
  vec p = 0.0013814539f;
  p = p * r + 0.0083687454f;
  p = p * r + 0.041668389f;
  p = p * r + 0.16666521f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  vec e = p * (vec)((ints)t << 23);
  return any < -87.0f ? (vec)0 : e;
}

// The natural logarithm of a normal positive number, to 2 units in the last place; NaN for NaN. With x = m 2^n and
// m near 1, log m = 2 artanh((m - 1) / (m + 1)). libm's cannot be called from code over 2 GB away from it, as with
// large models.
PART float log_of(float x) {
  union { float value; int bits; } u = {x};
  int n = (u.bits - 0x3f3504f3) >> 23;  // 0x3f3504f3 is sqrt(1/2): m is between that and sqrt(2)
  u.bits -= n * (1 << 23);
  float s = (u.value - 1) / (u.value + 1), s2 = s * s;
  float m = 2 * s + 2 * s * s2 * (1.0f / 3 + s2 * (1.0f / 5 + s2 * (1.0f / 7 + s2 * (1.0f / 9))));
  return x == x ? n * 0.693359375f + (m - n * 2.12194440e-4f) : x;
}

// Combine the halves of a vector until one number is left.
#if V == 16
#define FOLD(combine, x) combine(combine(combine(combine(x))))
#elif V == 8
#define FOLD(combine, x) combine(combine(combine(x)))
#else
#define FOLD(combine, x) combine(combine(x))
#endif
#define SUM(x) ((x).lo + (x).hi)
#define MOST(x) __builtin_elementwise_max((x).lo, (x).hi)
PART float sum_vec(vec x) { return FOLD(SUM, x); }
PART float max_vec(vec x) { return FOLD(MOST, x); }

// Transpose a square of V vectors, its rows.
#if V == 16
#define ROUNDS(x, y) ROUND(x, y) ROUND(y, x) ROUND(x, y) ROUND(y, x)
#define LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif V == 8
#define ROUNDS(x, y) ROUND(x, y) ROUND(y, x) ROUND(x, y)
#define LOW 0, 8, 1, 9, 2, 10, 3, 11
#define HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define ROUNDS(x, y) ROUND(x, y) ROUND(y, x)
#define LOW 0, 4, 1, 5
#define HIGH 2, 6, 3, 7
#endif
#define ROUND(from, to) \
  EACH(i, V / 2) { \
    to[2 * i] = __builtin_shufflevector(from[i], from[i + V / 2], LOW); \
    to[2 * i + 1] = __builtin_shufflevector(from[i], from[i + V / 2], HIGH); \
  }
PART void transpose_vecs(vec x[V]) {
  vec y[V];
  ROUNDS(x, y)  // after the last round, element (i, j) is at (j, i)
  if (V == 8) EACH(i, V) x[i] = y[i];
}

// Hash of element index i, uniform in [0, 2^32): decides what dropout drops. The formula is in ops.dropout;
// both must agree in every bit.
PART uints mix(uints x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}
PART uints seed_of(const unsigned int *key, unsigned int site) { return mix((uints)(key[0] + site * 0x9e3779b9u)); }
PART uints hash_of(uints i, uints seed) { return mix(mix(i ^ seed) + seed); }

PART uints each_from(unsigned int i) {
  uints place;
  EACH(j, V) place[j] = i + j;
  return place;
}

// With DROPOUT, as in dropout.c: x times SCALE, or 0 for the dropped elements. The first of x is element i.
#if DROPOUT
#define SEED uints seed = seed_of(key, site[0])
#define DROPPED(x, i) (hash_of(each_from(key[1] * ROW + (unsigned int)(i)), seed) >= THRESHOLD ? (x) * SCALE : (vec)0)
#else
#define SEED
#define DROPPED(x, i) (x)
#endif

// Read numbers of any type as floats.
#define OVERLOADED __attribute__((overloadable))
typedef _Float16 halves __attribute__((ext_vector_type(V), aligned(2)));
// bfloat16: a float's upper half.
typedef unsigned short shorts __attribute__((ext_vector_type(V), aligned(2)));
PART OVERLOADED vec load(const float *x) { return *(const vec *)x; }
PART OVERLOADED vec load(const _Float16 *x) { return __builtin_convertvector(*(const halves *)x, vec); }
PART OVERLOADED vec load(const unsigned short *x) { return (vec)(__builtin_convertvector(*(const shorts *)x, uints) << 16); }
typedef float four __attribute__((ext_vector_type(4), aligned(4)));
typedef _Float16 four_halves __attribute__((ext_vector_type(4), aligned(2)));
typedef unsigned short four_shorts __attribute__((ext_vector_type(4), aligned(2)));
typedef unsigned int four_uints __attribute__((ext_vector_type(4), aligned(4)));
PART OVERLOADED four load4(const float *x) { return *(const four *)x; }
PART OVERLOADED four load4(const _Float16 *x) { return __builtin_convertvector(*(const four_halves *)x, four); }
PART OVERLOADED four load4(const unsigned short *x) { return (four)(__builtin_convertvector(*(const four_shorts *)x, four_uints) << 16); }
PART OVERLOADED float load1(const float *x) { return *x; }
PART OVERLOADED float load1(const _Float16 *x) { return (float)*x; }
PART OVERLOADED float load1(const unsigned short *x) { union { unsigned int bits; float value; } u = {(unsigned int)*x << 16}; return u.value; }

// Transpose a square whose rows are the V numbers at from[0], from[1], ... Each vector is loaded with four numbers from
// each of V / 4 rows. Then only squares of 4 x 4 are to be transposed: half of the work of transpose_vecs.
#define FOUR(row) load4(from[row] + column)
#define PAIR(row) __builtin_shufflevector(FOUR(row), FOUR(row + 4), 0, 1, 2, 3, 4, 5, 6, 7)
#if V == 16
#define QUARTERS(row) __builtin_shufflevector(PAIR(row), PAIR(row + 8), 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#define IN_QUARTERS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4, a + 8, b + 8, c + 8, d + 8, a + 12, b + 12, c + 12, d + 12
#elif V == 8
#define QUARTERS(row) PAIR(row)
#define IN_QUARTERS(a, b, c, d) a, b, c, d, a + 4, b + 4, c + 4, d + 4
#else
#define QUARTERS(row) FOUR(row)
#define IN_QUARTERS(a, b, c, d) a, b, c, d
#endif
#define LOAD_TRANSPOSED(type) \
  PART OVERLOADED void load_transposed(vec x[V], const type *const from[V]) { \
    UNROLL for (int column = 0; column < V; column += 4) { \
      const vec a = QUARTERS(0), b = QUARTERS(1), c = QUARTERS(2), d = QUARTERS(3); \
      const vec ab = __builtin_shufflevector(a, b, IN_QUARTERS(0, V, 1, V + 1)), ab2 = __builtin_shufflevector(a, b, IN_QUARTERS(2, V + 2, 3, V + 3)); \
      const vec cd = __builtin_shufflevector(c, d, IN_QUARTERS(0, V, 1, V + 1)), cd2 = __builtin_shufflevector(c, d, IN_QUARTERS(2, V + 2, 3, V + 3)); \
      x[column] = __builtin_shufflevector(ab, cd, IN_QUARTERS(0, 1, V, V + 1)); \
      x[column + 1] = __builtin_shufflevector(ab, cd, IN_QUARTERS(2, 3, V + 2, V + 3)); \
      x[column + 2] = __builtin_shufflevector(ab2, cd2, IN_QUARTERS(0, 1, V, V + 1)); \
      x[column + 3] = __builtin_shufflevector(ab2, cd2, IN_QUARTERS(2, 3, V + 2, V + 3)); \
    } \
  }
LOAD_TRANSPOSED(float)
LOAD_TRANSPOSED(_Float16)
LOAD_TRANSPOSED(unsigned short)

// Read the first n numbers at x, at most V, with `rest` in the other places.
#define GET(type) \
  PART OVERLOADED vec get(const type *x, long n, float rest) { \
    if (n >= V) return load(x); \
    vec value = rest; \
    for (int i = 0; i < n; i++) value[i] = load1(x + i); \
    return value; \
  }
GET(float)
GET(_Float16)
GET(unsigned short)

// Write floats as numbers of any type, rounded to nearest.
PART uints bfloat16_bits(vec x) {
  uints bits = (uints)x;
  return x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40;
}
PART OVERLOADED void store(float *x, vec value) { *(vec *)x = value; }
PART OVERLOADED void store(_Float16 *x, vec value) { *(halves *)x = __builtin_convertvector(value, halves); }
PART OVERLOADED void store(unsigned short *x, vec value) { *(shorts *)x = __builtin_convertvector(bfloat16_bits(value), shorts); }
// Write only the first n numbers, at most V.
#define PUT(type) \
  PART OVERLOADED void put(type *x, vec value, long n) { \
    type all[V]; \
    if (n >= V) { \
      store(x, value); \
      return; \
    } \
    store(all, value); \
    for (int i = 0; i < n; i++) x[i] = all[i]; \
  }
PUT(float)
PUT(_Float16)
PUT(unsigned short)

// The mean of a row of n floats, and 1 / its standard deviation.
PART float mean_of(const float *x, int n) {
  vec sums = 0;
  for (int i = 0; i < n; i += V) sums += get(x + i, n - i, 0);
  return sum_vec(sums) / n;
}

PART float scale_of(const float *x, int n, float mean, float epsilon) {
  vec sums = 0;
  for (int i = 0; i < n; i += V) {
    vec d = get(x + i, n - i, mean) - mean;
    sums += d * d;
  }
  return 1 / __builtin_sqrtf(sum_vec(sums) / n + epsilon);
}

PART float most_of(const float *x, int n) {
  vec most = x[0];
  int i = 0;
  for (; i + V <= n; i += V) most = __builtin_elementwise_max(most, load(x + i));
  if (i < n) most = __builtin_elementwise_max(most, get(x + i, n - i, x[0]));
  return max_vec(most);
}

// Write exp(x - the largest x) for n floats; returns the sum.
PART float exp_row(float *to, const float *x, int n) {
  const float top = most_of(x, n);
  vec sums = 0;
  int i = 0;
  for (; i + V <= n; i += V) {
    vec e = exp_vec(load(x + i) - top);
    store(to + i, e);
    sums += e;
  }
  if (i < n) {  // not in the loop: here the compiler knows n - i
    vec e = exp_vec(get(x + i, n - i, -__builtin_inff()) - top);
    put(to + i, e, n - i);
    sums += e;
  }
  return sum_vec(sums);
}

// GELU's tanh approximation is x · σ(2u) with u = √(2/π) (x + 0.044715 x³), since (1 + tanh u) / 2 = σ(2u).
#define GELU_SCALE 0.7978845608f
#define GELU_CUBIC 0.044715f
PART vec gelu_gate(vec x) { return 1 / (1 + exp_vec(-2 * GELU_SCALE * x * (1 + GELU_CUBIC * x * x))); }
PART vec gelu(vec x) { return x * gelu_gate(x); }
PART vec gelu_and_slope(vec x, vec *slope) {
  vec s = gelu_gate(x);
  *slope = s + x * s * (1 - s) * 2 * GELU_SCALE * (1 + 3 * GELU_CUBIC * x * x);
  return x * s;
}
