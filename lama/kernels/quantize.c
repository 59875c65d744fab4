// Convert the D_OUT x K matrix x to integers of BITS bits and a scale for each group of 32, in the layout of
// quantized.h: see ops.quantize. A slice converts some of the rows.

// The nearest integer, for |x| < 2^22: a sum with 1.5 · 2^23 has no bits for fractions.
PART vec nearest(vec x) { return x + 12582912.0f - 12582912.0f; }
PART vec within(vec x, float least, float most) {
  return __builtin_elementwise_min(__builtin_elementwise_max(x, (vec)least), (vec)most);
}

PART float inverse(float x) { return x == 0 ? 0 : 1 / x; }

PART _Float16 scale_of_group(input x) {
  float most = x[0], least = x[0];
  for (int i = 1; i < 32; i++) {
    most = x[i] > most ? x[i] : most;
    least = x[i] < least ? x[i] : least;
  }
#if BITS == 8
  return (_Float16)((most > -least ? most : -least) / 127);
#else
  const float candidates[] = {CANDIDATES}, extreme = inverse(most > -least ? most : least);
  float best = -1, scale = 0;
  for (int c = 0; c < (int)(sizeof(candidates) / sizeof(float)); c++) {
    vec xq = 0, qq = 0;
    UNROLL for (int i = 0; i < 32; i += V) {
      vec q = within(nearest(load(x + i) * (-candidates[c] * extreme)), -8, 7);
      xq += load(x + i) * q;
      qq += q * q;
    }
    float sum = sum_vec(xq), squares = sum_vec(qq) < 1 ? 1 : sum_vec(qq);
    if (sum * sum / squares > best) {
      best = sum * sum / squares;
      scale = sum / squares;
    }
  }
  return (_Float16)scale;
#endif
}

KERNEL NAME(unsigned char *restrict values, unsigned char *restrict scales, input x, int slice) {
  for (long n = FIRST(D_OUT); n < LAST(D_OUT); n++) {
    const struct row row = row_at(values, scales, n);
    unsigned int *words = (unsigned int *)row.words;
    _Float16 *halves = (_Float16 *)row.pairs;
    for (int g = 0; g < GROUPS; g++) {
      float group[32], rounded[32];
      for (int i = 0; i < 32; i++) group[i] = 32 * g + i < K ? x[n * K + 32 * g + i] : 0;
      _Float16 scale = scale_of_group(group);
      UNROLL for (int i = 0; i < 32; i += V)
        store(rounded + i, within(nearest(load(group + i) * inverse((float)scale)), BITS == 8 ? -127 : -8, BITS == 8 ? 127 : 7));
      for (int k = 0; k < BITS; k++) {
        unsigned int word = 0;
        for (int i = 0; i < 32 / BITS; i++)
          word |= ((unsigned int)((int)rounded[32 / BITS * k + i] + (BITS == 8 ? 0 : LEAST)) & ((1 << BITS) - 1)) << BITS * i;
        words[(g * BITS + k) * row.width] = word;
      }
      halves[g * row.width] = scale;
    }
  }
}
