// ROWS rows of K floats as signed bytes, with a scale for each 32 of them, a group, as quantised weights have: scale = the group's
// largest magnitude / 127. A row's last group is filled with zeros. What is not finite stays so: its scale is not.
// With FLOATS, the numbers that these stand for.

#define GROUPS ((K + 31) / 32)

PART vec nearest(vec x) { return x + 12582912.0f; }  // 1.5 · 2^23: for |x| < 2^22 what is left of x are the lowest bits

#if FLOATS
KERNEL NAME(float *restrict y, const float *restrict x, int slice) {
#else
KERNEL NAME(unsigned char *restrict values, float *restrict scales, const float *restrict x, int slice) {
#endif
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++)
    for (int g = 0; g < GROUPS; g++) {
      vec group[32 / V];
      uints most = 0;  // of the magnitudes' bits, among which those of NaN are largest
      UNROLL for (int i = 0; i < 32 / V; i++) {
        const int k = 32 * g + i * V, some = K % 32 == 0 ? V : MIN(V, K - k);
        group[i] = some == V ? load(x + row * K + k) : load_some(x + row * K + k, some, 0);
        most = __builtin_elementwise_max(most, (uints)group[i] & 0x7fffffff);
      }
      union { unsigned int bits; float value; } largest = {FOLD(MOST, most)};
      float scale = largest.value * (float)(1 / 127.0), inverse = scale > 1e-30f ? 1 / scale : 0;
      UNROLL for (int i = 0; i < 32 / V; i++) {
        vec places = group[i] * inverse, rounded = nearest(places);
#if FLOATS
        vec value = (rounded - 12582912.0f) * scale;
        const int k = 32 * g + i * V, some = K % 32 == 0 ? V : MIN(V, K - k);
        if (some == V)
          store(y + row * K + k, value);
        else
          store_some(y + row * K + k, value, some);
#else
        *(bytes *)(values + (row * GROUPS + g) * 32 + i * V) = __builtin_convertvector((uints)rounded + SHIFT, bytes);
#endif
      }
#if !FLOATS
      scales[row * GROUPS + g] = scale;
#endif
    }
}
