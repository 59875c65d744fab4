// Activations rounded to 8 bits, like quantised weights: a group, 32 numbers of a row, shares a scale, the largest
// magnitude / 127. A group with infinite numbers or NaN gets a scale that is not finite, so that they remain.

// 1.5 · 2^23: for |x| < 2^22, the lowest bits of x + UNIT are the nearest whole number.
#define UNIT 12582912.0f

// Round a group to steps of its scale, plus UNIT; numbers after the first `left` count as 0. Returns the scale.
PART float round_group(vec steps[32 / V], input x, int left) {
  uints most = 0;  // the largest bits of a magnitude; those of NaN are larger than all others
  EACH(i, 32 / V) {
    steps[i] = get(x + i * V, left - i * V, 0);
    most = __builtin_elementwise_max(most, (uints)steps[i] & 0x7fffffff);
  }
  union { unsigned int bits; float value; } largest = {FOLD(MOST, most)};
  float scale = largest.value * (float)(1 / 127.0), inverse = scale > 1e-30f ? 1 / scale : 0;
  EACH(i, 32 / V) {
    // A separate statement: in one expression with the sum, the product would not be rounded.
    vec places = steps[i] * inverse;
    steps[i] = places + UNIT;
  }
  return scale;
}

// The 32 numbers of a rounded group, as floats.
PART void rounded_group(output to, input x, int left) {
  vec steps[32 / V];
  float scale = round_group(steps, x, left);
  EACH(i, 32 / V) store(to + i * V, (steps[i] - UNIT) * scale);
}

// Write a group of bytes in the order of the products. For weights of 4 bits, each eight bytes begin with those at even
// places.
#ifdef BITS
typedef unsigned char group_of_bytes __attribute__((ext_vector_type(32), aligned(1)));
PART void store_group(unsigned char *to, const unsigned char *group) {
  group_of_bytes x = *(const group_of_bytes *)group;
  if (BITS == 4)
    x = __builtin_shufflevector(x, x, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 16, 18, 20, 22, 17, 19, 21, 23, 24, 26, 28, 30, 25, 27, 29, 31);
  *(group_of_bytes *)to = x;
}
#endif
