// A matrix of half precision in tiles: TILE rows side by side, of each a unit of UNIT_SIZE numbers, then the next of
// UNITS. Without UNIT_SIZE, rows of K numbers follow one another. See tiles.py.

#if UNIT_SIZE
// Where the unit begins that has number k of row n.
#define WEIGHTS_AT(w, n, k) ((w) + (((long)(n) / TILE * UNITS + (k) / UNIT_SIZE) * TILE + (n) % TILE) * UNIT_SIZE)
#define UNIT_LANES (UNIT_SIZE / PER_LANE)

// The lanes of a sum, see bfloat16.h, that V rows have in one unit.
PART OVERLOADED void unit_at(vec lanes[UNIT_LANES], const _Float16 *w) { lanes[0] = load(w); }
PART OVERLOADED void unit_at(vec lanes[UNIT_LANES], const unsigned short *w) {
  const uints pairs = *(const uints *)w;
  lanes[0] = (vec)(UNIT_LANES == 1 ? pairs : pairs << 16);
  lanes[UNIT_LANES - 1] = (vec)(UNIT_LANES == 1 ? pairs : pairs & 0xffff0000);
}
#endif
