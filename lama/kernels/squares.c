// sums[i] = before[i] + the sum of squares of part i of the N numbers x. The PARTS parts do not depend on the number
// of slices. before[i] is added last, so that sums of several tensors may also be computed separately.

KERNEL NAME(output sums, input before, input x, int slice) {
  for (int part = FIRST(PARTS); part < LAST(PARTS); part++) {
    long i = (long)N * part / PARTS, last = (long)N * (part + 1) / PARTS;
    vec four[4] = {0, 0, 0, 0};
    for (; i + 4 * V <= last; i += 4 * V)
      EACH(j, 4) four[j] += load(x + i + j * V) * load(x + i + j * V);
    float rest = 0;
    for (; i < last; i++) rest += x[i] * x[i];
    sums[part] = before[part] + (sum_vec(four[0] + four[1] + (four[2] + four[3])) + rest);
  }
}
