// Round ROWS rows of K floats to signed bytes, with a scale for each group: see rounding.h. A row's last group is
// padded with zeros. With FLOATS, the rounded numbers are written as floats, else as bytes, for products with weights
// of BITS bits. With SUMS, the sum of each group is written too.

#define GROUPS ((K + 31) / 32)

#if FLOATS
KERNEL NAME(output y, input x, int slice) {
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++)
    for (int g = 0; g < GROUPS; g++) {
      float group[32];
      rounded_group(group, x + row * K + 32 * g, K - 32 * g);
      for (int i = 0; i < MIN(32, K - 32 * g); i++) y[row * K + 32 * g + i] = group[i];
    }
}
#else
KERNEL NAME(unsigned char *restrict values, output scales WITH(SUMS, output sums), input x, int slice) {
  for (long row = FIRST(ROWS); row < LAST(ROWS); row++)
    for (int g = 0; g < GROUPS; g++) {
      vec steps[32 / V];
      unsigned char group[32];
      scales[row * GROUPS + g] = round_group(steps, x + row * K + 32 * g, K - 32 * g);
      EACH(i, 32 / V) *(bytes *)(group + i * V) = __builtin_convertvector((uints)steps[i] + SHIFT, bytes);
      store_group(values + (row * GROUPS + g) * 32, group);
#if SUMS
      vec sum = 0;
      EACH(i, 32 / V) sum += steps[i] - UNIT;
      sums[row * GROUPS + g] = sum_vec(sum) * scales[row * GROUPS + g];
#endif
    }
}
#endif
