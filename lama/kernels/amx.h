// AMX: registers of 16 rows of 64 bytes, and an instruction that multiplies two of them. Registers 0 to 3 hold a square
// of sums, 32 x 32, in quarters. Registers 4 and 5 hold 16 rows of the first factor each, for the upper and the lower
// half of the square. Registers 6 and 7 hold 16 columns of the second factor each, for its left and right half: row k
// of the register has lane k of each column.
//
// The system saves these registers only for a process that has asked (`may_use_amx` in host.py), as it has if AMX is 1.

#if AMX && V == 16 && !PORTABLE && defined(__AMX_TILE__)
#define AMX_LOAD(at, step, to) __asm__ volatile("tileloadd (%0,%1), %%tmm" #to : : "r"(at), "r"((long)(step)) : "memory")
#define AMX_STORE(at, step, from) __asm__ volatile("tilestored %%tmm" #from ", (%0,%1)" : : "r"(at), "r"((long)(step)) : "memory")
#define AMX_MULTIPLY(how, a, w, sums) __asm__ volatile(how " %%tmm" #w ", %%tmm" #a ", %%tmm" #sums : : : "memory")

// Call this first in each slice. The sums and the first factor have `rows` rows, 1 to 32; an instruction multiplies
// `lanes` lanes.
PART void amx_begin(int rows, int lanes) {
  struct { unsigned char palette, start, zeros[14]; unsigned short bytes[16]; unsigned char rows[16]; } shape = {1};
  EACH(i, 8) {
    const int some = i == 2 || i == 3 || i == 5 ? rows - 16 : rows;
    shape.bytes[i] = i == 4 || i == 5 ? 4 * lanes : 64;
    shape.rows[i] = i > 5 ? lanes : some < 1 ? 16 : MIN(some, 16);
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(shape));
}
PART void amx_end(void) { __asm__ volatile("tilerelease" : : : "memory"); }

PART void amx_clear(void) {
  __asm__ volatile("tilezero %%tmm0\n tilezero %%tmm1\n tilezero %%tmm2\n tilezero %%tmm3" : : : "memory");
}

// Load or store `rows` rows of sums, `step` bytes apart.
PART void amx_load(const void *sums, long step, int rows) {
  AMX_LOAD(sums, step, 0);
  AMX_LOAD((const char *)sums + 64, step, 1);
  if (rows <= 16) return;
  AMX_LOAD((const char *)sums + 16 * step, step, 2);
  AMX_LOAD((const char *)sums + 16 * step + 64, step, 3);
}
PART void amx_store(void *sums, long step, int rows) {
  AMX_STORE(sums, step, 0);
  AMX_STORE((char *)sums + 64, step, 1);
  if (rows <= 16) return;
  AMX_STORE((char *)sums + 16 * step, step, 2);
  AMX_STORE((char *)sums + 16 * step + 64, step, 3);
}

// Add the products of 16 lanes to the sums. The rows of a are `a_row` bytes apart, the lanes of w `w_step` bytes.
#define AMX_PRODUCTS(how, a, a_row, w, w_step, rows) { \
  AMX_LOAD(a, a_row, 4); \
  AMX_LOAD(w, w_step, 6); \
  AMX_MULTIPLY(how, 4, 6, 0); \
  AMX_LOAD((const char *)(w) + 64, w_step, 7); \
  AMX_MULTIPLY(how, 4, 7, 1); \
  if ((rows) > 16) { \
    AMX_LOAD((const char *)(a) + 16 * (a_row), a_row, 5); \
    AMX_MULTIPLY(how, 5, 6, 2); \
    AMX_MULTIPLY(how, 5, 7, 3); \
  } \
}
#endif
