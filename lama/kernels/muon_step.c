// Muon's step of SLOTS matrices of N numbers, in place: p = p - scalars[0] (STEP u + DECAY p). Matrix i of the
// PARAMETERS is at place i of PLACES; its direction u is matrix i of `stack`.

KERNEL NAME(PARAMETERS, input stack, input scalars, int slice) {
  float *parameters[] = {PLACES};
  for (int slot = 0; slot < SLOTS; slot++) {
    float *p = parameters[slot];
    const float *u = stack + (long)slot * N;
    VECTORS_AT(i) {
      vec x = get(p + i, LEFT(i), 0);
      put(p + i, x - scalars[0] * (STEP * get(u + i, LEFT(i), 0) + DECAY * x), LEFT(i));
    }
  }
}
