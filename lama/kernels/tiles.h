// A matrix of half precision in tiles: TILE rows side by side, UNIT numbers of each and UNITS times so. See tiles.py.
// Without UNIT, rows of K numbers follow one another.

#if UNIT
#define WEIGHTS_AT(w, n, k) ((w) + ((long)(n) / TILE * UNITS + (k) / UNIT) * (TILE * UNIT) + (n) % TILE * UNIT)
#define UNIT_LANES (UNIT / PER_LANE)

// The lanes of a sum, see bfloat16.h, that V rows have in one unit.
PART OVERLOADED void unit_at(vec lanes[UNIT_LANES], const _Float16 *w) { lanes[0] = load(w); }
PART OVERLOADED void unit_at(vec lanes[UNIT_LANES], const unsigned short *w) {
  const uints pairs = *(const uints *)w;
  lanes[0] = (vec)(UNIT_LANES == 1 ? pairs : pairs << 16);
  lanes[UNIT_LANES - 1] = (vec)(UNIT_LANES == 1 ? pairs : pairs & 0xffff0000);
}
#endif
