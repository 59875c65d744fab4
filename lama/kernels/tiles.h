// A matrix of half precision in tiles of TILE interleaved rows: unit 0 of each row, then unit 1, up to UNITS; a unit is
// UNIT_SIZE numbers. Without UNIT_SIZE, rows of K numbers are consecutive. See tiles.py.

#if UNIT_SIZE
// The start of the unit that has number k of row n.
#define WEIGHTS_AT(w, n, k) ((w) + (((long)(n) / TILE * UNITS + (k) / UNIT_SIZE) * TILE + (n) % TILE) * UNIT_SIZE)
#define UNIT_LANES (UNIT_SIZE / PER_LANE)

// The lanes (see bfloat16.h) that one unit of V rows holds.
PART OVERLOADED void unit_at(vec lanes[UNIT_LANES], const _Float16 *w) { lanes[0] = load(w); }
PART OVERLOADED void unit_at(vec lanes[UNIT_LANES], const unsigned short *w) {
  const uints pairs = *(const uints *)w;
  lanes[0] = (vec)(UNIT_LANES == 1 ? pairs : pairs << 16);
  lanes[UNIT_LANES - 1] = (vec)(UNIT_LANES == 1 ? pairs : pairs & 0xffff0000);
}
#endif
