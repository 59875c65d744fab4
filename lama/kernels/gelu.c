// GELU of N numbers, or its gradient.

#if BACKWARD
KERNEL NAME(output dx, input x, input dy, int slice) {
  VECTORS_AT(i) {
    vec slope;
    gelu_and_slope(get(x + i, LEFT(i), 0), &slope);
    put(dx + i, get(dy + i, LEFT(i), 0) * slope, LEFT(i));
  }
}
#else
KERNEL NAME(output y, input x, int slice) {
  VECTORS_AT(i) put(y + i, gelu(get(x + i, LEFT(i), 0)), LEFT(i));
}
#endif
