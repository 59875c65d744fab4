// One AdamW update of N numbers in place. `scalars`: the rate, 1 - beta1^t, 1 - beta2^t. First, the rate is
// multiplied by FACTOR, and g by scale[0].

// The loop becomes one instruction; older compilers have no function for the square roots of a vector.
PART vec root(vec x) {
  EACH(i, V) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

KERNEL NAME(output p, output m, output v, input g, input scalars, input scale, int slice) {
  VECTORS_AT(i) {
    const long n = LEFT(i);
    vec x = get(p + i, n, 0), gradient = get(g + i, n, 0) * scale[0];
    vec mean = BETA1 * get(m + i, n, 0) + (1 - BETA1) * gradient;
    vec square = BETA2 * get(v + i, n, 0) + (1 - BETA2) * (gradient * gradient);
    vec step = (mean / scalars[1]) / (root(square / scalars[2]) + EPSILON);
    put(p + i, x - scalars[0] * FACTOR * (step + DECAY * x), n);
    put(m + i, mean, n);
    put(v + i, square, n);
  }
}
