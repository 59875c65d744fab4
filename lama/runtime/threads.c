// Runs a list of kernel calls in order, and shares the slices of each call among threads: a whole training
// step, or a token, in one call from Python. Compiled twice: WORKER 1 for waiting threads, 0 for the caller.
//
// Each thread has a range of a call's slices. It takes the next slice of its own range, and so continues to
// read where it stopped. When none is left, it takes slices from other ranges. The caller works too, so it
// only waits for slices that others have started. `inside` and `open` keep a late thread out of a finished
// call: a thread enters, then checks; the caller closes, then checks. If other programs use the cores, a
// thread may lose its core in the middle of a slice. After a wait that was much longer than the work, the
// caller runs the next calls alone, and more of them each time.

typedef unsigned long long word;

#define RANGES 64  // at most: more threads share them

struct pool {
  // Filled in by threads.py: functions of the C library, the mutex and the condition, how long to spin.
  int (*lock)(void *), (*unlock)(void *), (*wait)(void *, void *), (*wake)(void *), (*yield)(void), (*clock)(int, long *);
  void *mutex, *condition;
  word clock_id, spin_ns, threads;
  word alone, pause;  // calls that the caller still runs alone; their number after the last long wait
  // Shared by the threads, on separate cache lines.
  word busy, line1[7];        // whether calls are being run
  word published, line2[7];   // the number of calls so far, which threads wait for
  word workers, line3[7];     // the number of threads that have started
  word open, line4[7];        // whether slices can be taken
  word inside, line5[7];      // threads that may be running a slice
  word sleeping, line6[7];
  const word *call;
  struct { word next, line[7]; } ranges[RANGES];  // the first slice of each that is not taken
};

// A call: the kernel's address, the number of slices, which argument is the slice's number, the number of
// words of arguments (8, 16 or 64), and these.
enum { ADDRESS, SLICES, PLACE, WORDS, ARGUMENTS };

#define SLACK_NS 20000  // a wait that is never late
// In units of the caller's own work: longer than a last slice takes, even on a core of half the speed.
#define LATE 2
#define LOAD(x) __atomic_load_n(&(x), __ATOMIC_SEQ_CST)
#define STORE(x, value) __atomic_store_n(&(x), value, __ATOMIC_SEQ_CST)
#define ADD(x, value) __atomic_fetch_add(&(x), value, __ATOMIC_SEQ_CST)

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define RELAX() __asm__ volatile("isb")
#else
#define RELAX() __asm__ volatile("")
#endif

#define PART static inline __attribute__((always_inline))  // the loader wants one function
#define FOUR(at) a[at], a[at + 1], a[at + 2], a[at + 3]
#define SIXTEEN(at) FOUR(at), FOUR(at + 4), FOUR(at + 8), FOUR(at + 12)
#define W4 word, word, word, word
#define W16 W4, W4, W4, W4

// More arguments than a kernel takes do no harm: in C's calling conventions the caller removes them.
PART void run_slice(const word *call, word slice) {
  word a[64];
  for (word i = 0; i < call[WORDS]; i++) a[i] = call[ARGUMENTS + i];
  if (call[PLACE] < 64) a[call[PLACE]] = slice;
  if (call[WORDS] == 8)
    ((void (*)(W4, W4))call[ADDRESS])(FOUR(0), FOUR(4));
  else if (call[WORDS] == 16)
    ((void (*)(W16))call[ADDRESS])(SIXTEEN(0));
  else
    ((void (*)(W16, W16, W16, W16))call[ADDRESS])(SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48));
}

PART word ranges_of(struct pool *p, const word *call) {
  word most = p->threads < RANGES ? p->threads : RANGES;
  return call[SLICES] < most ? call[SLICES] : most;
}

PART void take_slices(struct pool *p, word thread) {
  const word *call = p->call;
  const word ranges = ranges_of(p, call);
  for (word i = 0; i < ranges; i++) {
    word range = (thread + i) % ranges, end = call[SLICES] * (range + 1) / ranges;
    for (word slice; (slice = ADD(p->ranges[range].next, 1)) < end;) run_slice(call, slice);
  }
}

PART word now(struct pool *p) {
  long time[2];
  p->clock((int)p->clock_id, time);
  return (word)time[0] * 1000000000 + (word)time[1];
}

#if WORKER
// Wait until `published` is no longer `seen`: spin for a while, yielding the core to others, then sleep.
PART void await(struct pool *p, word seen) {
  for (word began = now(p); now(p) - began < p->spin_ns; p->yield())
    for (int i = 0; i < 64; i++) {
      if (LOAD(p->published) != seen) return;
      RELAX();
    }
  p->lock(p->mutex);
  ADD(p->sleeping, 1);
  while (LOAD(p->published) == seen) p->wait(p->condition, p->mutex);
  ADD(p->sleeping, -1);
  p->unlock(p->mutex);
}

void lama_worker(struct pool *p) {
  const word thread = 1 + ADD(p->workers, 1);
  for (word seen = 0;;) {
    await(p, seen);
    seen = LOAD(p->published);
    ADD(p->inside, 1);
    if (LOAD(p->open)) take_slices(p, thread);
    ADD(p->inside, -1);
  }
}
#else
PART void share(struct pool *p, const word *call) {
  word began = now(p);
  p->call = call;
  const word ranges = ranges_of(p, call);
  for (word range = 0; range < ranges; range++) STORE(p->ranges[range].next, call[SLICES] * range / ranges);
  STORE(p->open, 1);
  ADD(p->published, 1);
  if (LOAD(p->sleeping)) {
    p->lock(p->mutex);
    word wanted = call[SLICES] < p->threads ? call[SLICES] - 1 : p->threads - 1;
    for (word i = 0; i < wanted && i < p->sleeping; i++) p->wake(p->condition);
    p->unlock(p->mutex);
  }
  take_slices(p, 0);
  STORE(p->open, 0);
  word done = now(p);
  for (int i = 0; LOAD(p->inside); i++)
    if (i < 200)
      RELAX();
    else
      p->yield();
  if (now(p) - done > LATE * (done - began) + SLACK_NS)
    p->alone = p->pause = p->pause < 512 ? 2 * p->pause + 8 : p->pause;
  else if (p->pause)  // written only if it changes: other threads read that cache line
    p->pause /= 2;
}

void lama_run(struct pool *p, const word *call, word calls) {
  int mine = p->threads > 1 && !__atomic_exchange_n(&p->busy, 1, __ATOMIC_SEQ_CST);
  for (; calls; calls--, call += ARGUMENTS + call[WORDS])
    if (mine && call[SLICES] > 1 && !p->alone)
      share(p, call);
    else {
      if (mine && call[SLICES] > 1) p->alone--;
      for (word slice = 0; slice < call[SLICES]; slice++) run_slice(call, slice);
    }
  if (mine) STORE(p->busy, 0);
}
#endif
