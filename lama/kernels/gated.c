// f(x) · up for N numbers, and its gradients. With GATE 1, f is SiLU, x · σ(x); with 2, GELU's tanh approximation.

#if GATE == 1
PART vec gate_and_slope(vec x, vec *slope) {
  vec s = 1 / (1 + exp_vec(-x));
  *slope = s + x * s * (1 - s);
  return x * s;
}
#else
#define gate_and_slope gelu_and_slope
#endif

#if BACKWARD
KERNEL NAME(output dx, output dup, input x, input up, input dy, int slice) {
  VECTORS_AT(i) {
    vec slope, gate = gate_and_slope(get(x + i, LEFT(i), 0), &slope), grad = get(dy + i, LEFT(i), 0);
    put(dx + i, grad * slope * get(up + i, LEFT(i), 0), LEFT(i));
    put(dup + i, grad * gate, LEFT(i));
  }
}
#else
KERNEL NAME(output y, input x, input up, int slice) {
  VECTORS_AT(i) {
    vec slope;
    put(y + i, gate_and_slope(get(x + i, LEFT(i), 0), &slope) * get(up + i, LEFT(i), 0), LEFT(i));
  }
}
#endif
