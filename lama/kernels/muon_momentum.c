// Muon's momentum of SLOTS matrices of N numbers, in place, and the matrices to orthogonalise. With g a matrix
// of GRADIENTS times scale[0]: m = BETA m + (1 - BETA) g, x = (1 - BETA) g + BETA m. x is then divided by its
// Frobenius norm. Each matrix belongs to one slice, so that sums do not depend on the number of threads.

KERNEL NAME(output stack, output momentum, GRADIENTS, input scale, int slice) {
  const float *gradients[] = {PLACES};
  for (int slot = FIRST(SLOTS); slot < LAST(SLOTS); slot++) {
    const float *g = gradients[slot];
    float *m = momentum + (long)slot * N, *x = stack + (long)slot * N;
    vec squares = 0;
    for (long i = 0; i < N; i += V) {
      vec new = (1 - BETA) * scale[0] * get(g + i, LEFT(i), 0), mean = BETA * get(m + i, LEFT(i), 0) + new;
      vec ahead = new + BETA * mean;
      put(m + i, mean, LEFT(i));
      put(x + i, ahead, LEFT(i));
      squares += ahead * ahead;
    }
    const float factor = 1 / (__builtin_sqrtf(sum_vec(squares)) + EPSILON);
    for (long i = 0; i < N; i += V) put(x + i, factor * get(x + i, LEFT(i), 0), LEFT(i));
  }
}
