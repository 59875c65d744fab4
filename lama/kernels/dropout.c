// y = x / (1 - rate), or 0 for the dropped elements. The N elements of x begin at row key[1] of a larger batch,
// whose rows have ROW elements. Element i of that batch is kept if its hash, below 2^32, is at least THRESHOLD.

KERNEL NAME(output y, input x, uint_input key, uint_input site, int slice) {
  SEED;
  VECTORS_AT(i) put(y + i, DROPPED(get(x + i, LEFT(i), 0), i), LEFT(i));
}
