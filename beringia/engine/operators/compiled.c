/* The engine's operators on a CPU. Activations are float32; weights and cache are float32 or bfloat16. With bfloat16
weights a product rounds its activations to bfloat16, as matrix units do; sums are float32.

Weights lie in panels of 16 outputs, k after k, so that a vector holds 16 outputs and nothing is summed across lanes:
an output is the sum over k in order, whatever other rows and outputs are computed beside it. Attention takes a
sequence's tokens 32 at a time from the first one. So a row's result depends on nothing but that row: the same bits
alone and in any batch, as a whole prompt and in chunks.

NaN, infinities, subnormal and the largest numbers come out as in IEEE 754 arithmetic, as torch's operators have them: no
comparison may drop a NaN, and nothing may overflow that is no part of the result. */
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define MOST_HEADS 8     /* that one task of attention works on */
#define TOKENS 32        /* that it works on at a time */
#define WIDEST 1024      /* row of the cache, in numbers */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

INLINE vec load(const float *from) { vec x; memcpy(&x, from, sizeof x); return x; }
INLINE void store(float *to, vec x) { memcpy(to, &x, sizeof x); }
INLINE vec all(float x) { return x - (vec){}; }
INLINE vec choose(ints mask, vec yes, vec no) { return (vec)(((ints)yes & mask) | ((ints)no & ~mask)); }
/* A bfloat16 is the upper half of a float32; a word of a panel holds those of an even k (below) and the odd k after. */
INLINE vec even_of(words pair) { return (vec)(pair << 16); }
INLINE vec odd_of(words pair) { return (vec)(pair & 0xffff0000u); }

INLINE uint16_t narrowed(float x) { /* round to nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, quiet = bits >> 16 | 0x40;
  return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

/* Lane i meets lane i + 8, then i + 4, i + 2, i + 1. */
#define REACH(x, by) __builtin_shufflevector(x, x, (0 + by) % 16, (1 + by) % 16, (2 + by) % 16, (3 + by) % 16, (4 + by) % 16, \
  (5 + by) % 16, (6 + by) % 16, (7 + by) % 16, (8 + by) % 16, (9 + by) % 16, (10 + by) % 16, (11 + by) % 16,           \
  (12 + by) % 16, (13 + by) % 16, (14 + by) % 16, (15 + by) % 16)
/* The second where either is a NaN. */
#ifdef __AVX512F__
INLINE vec larger(vec a, vec b) { return (vec)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE vec smaller(vec a, vec b) { return (vec)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }
INLINE vec smaller(vec a, vec b) { return choose(a < b, a, b); }
#endif
INLINE float largest(vec x) {
  x = larger(x, REACH(x, 8));
  x = larger(x, REACH(x, 4));
  x = larger(x, REACH(x, 2));
  return larger(x, REACH(x, 1))[0];
}
INLINE float total(vec x) {
  x += REACH(x, 8);
  x += REACH(x, 4);
  x += REACH(x, 2);
  return (x + REACH(x, 1))[0];
}

/* x 2^n, rounded once where it is subnormal, and infinite where it is too large. */
INLINE vec scaled(vec x, vec n) {
#ifdef __AVX512F__
  return (vec)_mm512_scalef_ps((__m512)x, (__m512)n);
#else
  ints whole = __builtin_convertvector(n, ints), half = whole >> 1; /* 2^n itself may be no number of the format */
  return x * (vec)((half + 127) << 23) * (vec)((whole - half + 127) << 23);
#endif
}

/* e^x within 2 units in the last place, and below 2^-126 within 2^-149; 0 and infinity where float32 ends, NaN of NaN.
   After the constants of Cephes' expf (S. L. Moshier, netlib.org/cephes). */
INLINE vec exponential(vec x) {
  x = smaller(all(89.0f), larger(all(-104.0f), x)); /* e^-104 rounds to 0, e^89 is infinite; a NaN stays */
  vec n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return scaled(p * (r * r) + r + 1.0f, n);
}

/* ---- threads: OpenMP's take 40 microseconds to wake where they wait passively, as long as a whole operator here */

typedef void (*task)(const void *context, int64_t number);

static struct {
  _Atomic uint64_t ticket; /* upper half: number of the job; lower half: the next task that nobody has taken, or CLOSED */
  _Atomic int64_t count, done;
  _Atomic(task) run;
  _Atomic(const void *) context;
  _Atomic int sleeping, threads;
  atomic_flag busy;
  pthread_mutex_t lock;
  pthread_cond_t more;
} pool = {.threads = 1, .busy = ATOMIC_FLAG_INIT, .lock = PTHREAD_MUTEX_INITIALIZER, .more = PTHREAD_COND_INITIALIZER};

#define CLOSED UINT32_MAX /* in place of a task: the job is being written down */

#define ROUNDS_AWAKE 3000 /* of looking for the next operator, some 50 microseconds */

INLINE void pause_a_little(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

/* Take tasks of a job until none is left. Whoever comes late finds another number, and takes nothing. */
static void work_on(uint32_t job) {
  for (;;) {
    uint64_t ticket = atomic_load(&pool.ticket);
    int64_t number = (uint32_t)ticket, count = atomic_load(&pool.count);
    task run = atomic_load(&pool.run);
    const void *context = atomic_load(&pool.context);
    if (ticket >> 32 != job || number >= count) return;
    if (!atomic_compare_exchange_weak(&pool.ticket, &ticket, ticket + 1)) continue;
    run(context, number);
    atomic_fetch_add(&pool.done, 1);
  }
}

static int is_new(uint64_t ticket, uint32_t last) {
  return ticket >> 32 != last && (uint32_t)ticket != CLOSED;
}

static void *worker(void *nothing) {
  uint32_t last = 0;
  (void)nothing;
  for (int idle = 0;;) {
    uint64_t ticket = atomic_load(&pool.ticket);
    if (is_new(ticket, last)) {
      last = ticket >> 32;
      idle = 0;
      work_on(last);
    } else if (++idle < ROUNDS_AWAKE) {
      pause_a_little();
    } else {
      pthread_mutex_lock(&pool.lock);
      atomic_fetch_add(&pool.sleeping, 1);
      while (!is_new(atomic_load(&pool.ticket), last)) pthread_cond_wait(&pool.more, &pool.lock);
      atomic_fetch_sub(&pool.sleeping, 1);
      pthread_mutex_unlock(&pool.lock);
      idle = 0;
    }
  }
  return NULL;
}

/* How many threads compute, with the caller's own; more can be added later, none goes. Returns how many there are. */
int64_t start_threads(int64_t wanted) {
  pthread_mutex_lock(&pool.lock);
  while (atomic_load(&pool.threads) < wanted) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, NULL)) break;
    pthread_detach(thread);
    atomic_fetch_add(&pool.threads, 1);
  }
  pthread_mutex_unlock(&pool.lock);
  return atomic_load(&pool.threads);
}

#define WORTH_A_THREAD 200000 /* multiply-adds: below, a second thread costs more than it saves */

/* run(context, 0) to run(context, count - 1), in any order, on all threads where the work is worth it. */
static void in_parallel(task run, const void *context, int64_t count, int64_t work) {
  if (count < 2 || work < WORTH_A_THREAD || atomic_load(&pool.threads) < 2 || atomic_flag_test_and_set(&pool.busy)) {
    for (int64_t number = 0; number < count; number++) run(context, number);
    return;
  }
  uint32_t job = (uint32_t)(atomic_load(&pool.ticket) >> 32) + 1;
  /* A late thread, which has read the old ticket, must not take it with the new count: so the ticket changes first. */
  atomic_store(&pool.ticket, (uint64_t)job << 32 | CLOSED);
  atomic_store(&pool.count, count);
  atomic_store(&pool.done, 0);
  atomic_store(&pool.run, run);
  atomic_store(&pool.context, context);
  atomic_store(&pool.ticket, (uint64_t)job << 32);
  if (atomic_load(&pool.sleeping)) {
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.more);
    pthread_mutex_unlock(&pool.lock);
  }
  work_on(job);
  for (int round = 0; atomic_load(&pool.done) < count; round++)
    if (round < ROUNDS_AWAKE) pause_a_little();
    else sched_yield(); /* the other thread's core has something else to do */
  atomic_flag_clear(&pool.busy);
}

/* ---- products */

/* out[m, n] (+)= sum over k of x[m, k] weight[n, k] + bias[n] */
typedef struct {
  float *out;
  const void *x;      /* float32, or pairs of bfloat16 where the weights are pairs; steps count either */
  const char *weight; /* panels */
  const float *bias;  /* or NULL */
  const uint32_t *delicate; /* whether a row of pairs is; NULL without pairs */
  int64_t out_step, x_step, rows, n, k;
  int narrow, adds;
  int64_t ahead;      /* bytes from a panel to the one that is multiplied with later, and is fetched meanwhile; or 0 */
} product;

INLINE void finish(const product *p, int64_t row, int64_t first, vec sum) {
  float *out = p->out + row * p->out_step + first;
  if (p->n - first >= LANES) {
    if (p->bias) sum += load(p->bias + first);
    if (p->adds) sum += load(out);
    store(out, sum);
    return;
  }
  for (int64_t i = 0; i < p->n - first; i++) {
    float one = p->bias ? sum[i] + p->bias[first + i] : sum[i];
    out[i] = p->adds ? one + out[i] : one;
  }
}

/* sum + x[even k] weight[even k] + x[odd k] weight[odd k] */
INLINE vec add_pair_exactly(vec sum, uint32_t x, words weight) {
  words pair = x - (words){};
  sum += even_of(pair) * even_of(weight);
  return sum + odd_of(pair) * odd_of(weight);
}

INLINE vec add_pair(vec sum, uint32_t x, words weight) {
#ifdef __AVX512BF16__
  return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)weight);
#else
  return add_pair_exactly(sum, x, weight);
#endif
}

/* In a tile, at k: the lines of what is multiplied with later. */
#define FETCH_AHEAD(PANELS)                                                                                   \
  if (k == until) {                                                                                           \
    until += tiles;                                                                                           \
    for (int j = 0; j < PANELS; j++) __builtin_prefetch(weight + p->ahead + (j * deep + k) * sizeof(vec));    \
  }

#define DEFINE_TILE(NAME, ROWS, PANELS, ADD_PAIR)                                                             \
  static void NAME(const product *p, int64_t row, int64_t panel) {                                            \
    /* The tiles of a panel fetch a share each of the lines that come later. */                               \
    const int64_t tiles = (p->rows + 7) / 8, own = row / 8;                                                   \
    int64_t until = p->ahead ? own : INT64_MAX;                                                               \
    const int64_t step = p->x_step, deep = p->narrow ? (p->k + 1) / 2 : p->k;                                 \
    const char *weight = p->weight + panel * deep * sizeof(vec);                                              \
    vec sum[ROWS][PANELS] = {};                                                                               \
    if (p->narrow) {                                                                                          \
      const uint32_t *x = (const uint32_t *)p->x + row * step;                                                \
      for (int64_t k = 0; k < deep; k++) {                                                                    \
        FETCH_AHEAD(PANELS)                                                                                   \
        _Pragma("GCC unroll 8") for (int j = 0; j < PANELS; j++) {                                            \
          words column = ((const words *)weight)[j * deep + k];                                               \
          _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++)                                              \
            sum[i][j] = ADD_PAIR(sum[i][j], x[i * step + k], column);                                         \
        }                                                                                                     \
      }                                                                                                       \
    } else {                                                                                                  \
      const float *x = (const float *)p->x + row * step;                                                      \
      for (int64_t k = 0; k < deep; k++) {                                                                    \
        FETCH_AHEAD(PANELS)                                                                                   \
        _Pragma("GCC unroll 8") for (int j = 0; j < PANELS; j++) {                                            \
          vec column = ((const vec *)weight)[j * deep + k];                                                   \
          _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++) sum[i][j] += x[i * step + k] * column;       \
        }                                                                                                     \
      }                                                                                                       \
    }                                                                                                         \
    for (int i = 0; i < ROWS; i++)                                                                            \
      for (int j = 0; j < PANELS; j++) finish(p, row + i, (panel + j) * LANES, sum[i][j]);                    \
  }
DEFINE_TILE(tile_8_3, 8, 3, add_pair)
DEFINE_TILE(tile_8_2, 8, 2, add_pair)
DEFINE_TILE(tile_8_1, 8, 1, add_pair)
DEFINE_TILE(tile_4_4, 4, 4, add_pair)
DEFINE_TILE(tile_4_1, 4, 1, add_pair)
DEFINE_TILE(tile_1_4, 1, 4, add_pair)
DEFINE_TILE(tile_1_1, 1, 1, add_pair)
DEFINE_TILE(exact_tile_1_4, 1, 4, add_pair_exactly)
DEFINE_TILE(exact_tile_1_1, 1, 1, add_pair_exactly)

#define CHUNK 6 /* panels that one task computes for all rows, so that weights are read once */

INLINE int any_delicate(const product *p, int64_t row, int64_t count) {
  for (int64_t i = 0; p->delicate && i < count; i++)
    if (p->delicate[row + i]) return 1;
  return 0;
}

static void multiply_exactly(const product *p, int64_t row, int64_t panel, int64_t end) {
  for (; panel + 4 <= end; panel += 4) exact_tile_1_4(p, row, panel);
  for (; panel < end; panel++) exact_tile_1_1(p, row, panel);
}

INLINE void multiply_rows(const product *p, int64_t row, int64_t last, int64_t panel, int64_t end) {
  for (; row < last; row++) {
    int64_t j = panel;
    if (any_delicate(p, row, 1)) {
      multiply_exactly(p, row, panel, end);
      continue;
    }
    for (; j + 4 <= end; j += 4) tile_1_4(p, row, j);
    for (; j < end; j++) tile_1_1(p, row, j);
  }
}

static void multiply_chunk(const product *p, int64_t panel) {
  int64_t panels = (p->n + LANES - 1) / LANES, end = panel + CHUNK < panels ? panel + CHUNK : panels;
  int64_t row = 0;
  for (; row + 8 <= p->rows; row += 8) {
    int64_t j = panel;
    if (any_delicate(p, row, 8)) {
      multiply_rows(p, row, row + 8, panel, end);
      continue;
    }
    for (; j + 3 <= end; j += 3) tile_8_3(p, row, j);
    for (; j + 2 <= end; j += 2) tile_8_2(p, row, j);
    if (j < end) tile_8_1(p, row, j);
  }
  for (; row + 4 <= p->rows && !any_delicate(p, row, 4); row += 4) {
    int64_t j = panel;
    for (; j + 4 <= end; j += 4) tile_4_4(p, row, j);
    for (; j < end; j++) tile_4_1(p, row, j);
  }
  multiply_rows(p, row, p->rows, panel, end);
}

INLINE int64_t chunks_of(int64_t n) { return (n + CHUNK * LANES - 1) / (CHUNK * LANES); }
INLINE int64_t panel_bytes(int64_t k, int narrow) { return narrow ? (k + 1) / 2 * 4 * LANES : k * 4 * LANES; }
/* Chunks one after the other, each fetched while the one before is multiplied with. */
static void multiply_chunks(product *p, int64_t first, int64_t end) {
  for (int64_t chunk = first; chunk < end; chunk++) {
    p->ahead = chunk + 1 < end ? CHUNK * panel_bytes(p->k, p->narrow) : 0;
    multiply_chunk(p, chunk * CHUNK);
  }
}

/* Enough for all threads to end at the same time, each long enough to be fetched ahead. */
INLINE int64_t pieces_of(int64_t chunks) {
  int64_t wanted = 4 * atomic_load(&pool.threads);
  return wanted < chunks ? wanted : chunks;
}

INLINE int64_t weight_bytes(int64_t n, int64_t k, int narrow) {
  return (n + LANES - 1) / LANES * panel_bytes(k, narrow);
}

#ifdef __AVX512BF16__
/* The instructions for bfloat16 take subnormal numbers for zeros. What a sum of k terms loses by it is below k 2^-100,
   unless its row has subnormals itself, or numbers of 2^26 and more, beside which a subnormal weight may count. Such a
   delicate row is multiplied without them. */
INLINE uint16_t first_lanes(int64_t count) {
  return count < LANES ? (uint16_t)((1 << (count > 0 ? count : 0)) - 1) : 0xffff;
}
INLINE vec load_first(const float *from, int64_t count) { return (vec)_mm512_maskz_loadu_ps(first_lanes(count), from); }

static int is_delicate(const float *x, int64_t k) {
  const uint32_t smallest = 0x00800000, large = 0x4c800000; /* 2^-126, 2^26 */
  ints found = {};
  for (int64_t i = 0; i < k; i += LANES) {
    words size = (words)load_first(x + i, k - i) & 0x7fffffff;
    found |= (size - smallest >= large - smallest) & (size != 0);
  }
  return largest((vec)(found & (ints)all(1.0f))) > 0;
}

INLINE void narrow_row(uint32_t *to, const float *x, int64_t k) {
  for (int64_t i = 0; i < k; i += 2 * LANES) {
    vec low = load_first(x + i, k - i), high = load_first(x + i + LANES, k - i - LANES);
    __m512i pairs = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    _mm512_mask_storeu_epi32(to + i / 2, first_lanes((k - i + 1) / 2), pairs);
  }
}
#endif

/* A row as pairs of bfloat16, filled up with a zero; may be done in place. Returns whether it is delicate. */
static uint32_t to_pairs(uint32_t *to, const float *x, int64_t k) {
#ifdef __AVX512BF16__
  const int delicate = is_delicate(x, k);
  if (!delicate) {
    narrow_row(to, x, k);
    return 0;
  }
#else
  const int delicate = 0;
#endif
  for (int64_t i = 0; i < k / 2; i++) to[i] = narrowed(x[2 * i]) | (uint32_t)narrowed(x[2 * i + 1]) << 16;
  if (k % 2) to[k / 2] = narrowed(x[k - 1]);
  return delicate;
}

typedef struct {
  product all;
  const float *x;
  uint32_t *pairs, *delicate;
  int64_t x_step, out_group, x_group, weight_group, chunks, pieces;
} grouped_product;

static void pairs_task(const void *context, int64_t row) { /* one row of one group */
  const grouped_product *g = context;
  int64_t group = row / g->all.rows, deep = (g->all.k + 1) / 2;
  const float *x = g->x + group * g->x_group + row % g->all.rows * g->x_step;
  g->delicate[row] = to_pairs(g->pairs + row * deep, x, g->all.k);
}

static void linear_task(const void *context, int64_t number) {
  const grouped_product *g = context;
  int64_t group = number / g->pieces, piece = number % g->pieces;
  product p = g->all;
  p.out += group * g->out_group;
  p.x = g->pairs ? (const void *)(g->pairs + group * p.rows * p.x_step) : (const void *)(g->x + group * g->x_group);
  p.weight += group * g->weight_group;
  if (g->pairs) p.delicate = g->delicate + group * p.rows;
  multiply_chunks(&p, piece * g->chunks / g->pieces, (piece + 1) * g->chunks / g->pieces);
}

/* `groups` products beside each other: group g reads x from g * x_group on and writes out from g * out_group on. With
   bfloat16 weights `pairs` holds groups rows ((k + 1) / 2 + 1) words, else it is NULL. */
void linear(float *out, int64_t out_step, int64_t out_group, const float *x, int64_t x_step, int64_t x_group,
            const void *weight, const float *bias, uint32_t *pairs, int64_t groups, int64_t rows, int64_t n, int64_t k,
            int64_t adds) {
  const int narrow = pairs != NULL;
  uint32_t *delicate = narrow ? pairs + groups * rows * ((k + 1) / 2) : NULL;
  const grouped_product g = {
      {out, NULL, weight, bias, NULL, out_step, narrow ? (k + 1) / 2 : x_step, rows, n, k, narrow, adds, 0},
      x, pairs, delicate, x_step, out_group, x_group, weight_bytes(n, k, narrow), chunks_of(n), pieces_of(chunks_of(n))};
  if (narrow) in_parallel(pairs_task, &g, groups * rows, groups * rows * k * 4);
  in_parallel(linear_task, &g, groups * g.pieces, groups * rows * n * k);
}

/* ---- row by row */

/* The weight's row of each token: one lane of its panel. */
void embed(float *out, const char *weight, const int64_t *tokens, int64_t rows, int64_t k, int64_t narrow) {
  for (int64_t row = 0; row < rows; row++, out += k) {
    const uint32_t *lane = (const uint32_t *)(weight + tokens[row] / LANES * panel_bytes(k, narrow)) + tokens[row] % LANES;
    for (int64_t d = 0; d < k; d++) {
      uint32_t bits = narrow ? (d % 2 ? lane[d / 2 * LANES] & 0xffff0000u : lane[d / 2 * LANES] << 16) : lane[d * LANES];
      memcpy(out + d, &bits, 4);
    }
  }
}

/* Root-mean-square norm (arXiv 1910.07467) of `count` vectors in each row. */
void norm(float *out, int64_t out_step, const float *x, int64_t x_step, const float *weight, int64_t rows,
          int64_t count, int64_t width, float eps) {
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < count; i++) {
      const float *from = x + row * x_step + i * width;
      float *to = out + row * out_step + i * width;
      vec squares = {};
      int64_t d = 0;
      for (; d + LANES <= width; d += LANES) squares += load(from + d) * load(from + d);
      float sum = total(squares);
      for (; d < width; d++) sum += from[d] * from[d];
      float scale = 1.0f / sqrtf(sum / (float)width + eps);
      for (d = 0; d < width; d++) to[d] = from[d] * scale * weight[d];
    }
}

/* Rotary embedding of `heads` vectors in each row; halves hold the first and the second of each pair. */
void rotate(float *out, int64_t out_step, int64_t out_head, const float *x, int64_t x_step, int64_t x_head,
            const float *cosines, const float *sines, const int64_t *positions, int64_t rows, int64_t heads,
            int64_t width) {
  const int64_t half = width / 2;
  for (int64_t row = 0; row < rows; row++) {
    const float *c = cosines + positions[row] * half, *s = sines + positions[row] * half;
    for (int64_t head = 0; head < heads; head++) {
      const float *from = x + row * x_step + head * x_head;
      float *to = out + row * out_step + head * out_head;
      for (int64_t i = 0; i < half; i++) {
        float first = from[i], second = from[half + i];
        to[i] = first * c[i] - second * s[i];
        to[half + i] = second * c[i] + first * s[i];
      }
    }
  }
}

/* Write each row into the cache's row `slots[row]`. */
void keep(void *cache, const float *x, int64_t x_step, const int64_t *slots, int64_t rows, int64_t width, int64_t narrow) {
  for (int64_t row = 0; row < rows; row++) {
    const float *from = x + row * x_step;
    if (narrow)
      for (int64_t i = 0; i < width; i++) ((uint16_t *)cache)[slots[row] * width + i] = narrowed(from[i]);
    else memcpy((float *)cache + slots[row] * width, from, 4 * width);
  }
}

/* silu(gate) up, of rows that hold gate and up side by side; times `factor` where there is one. */
static void gate_rows(float *out, const float *x, int64_t x_step, int64_t rows, int64_t width, const float *factor) {
  for (int64_t row = 0; row < rows; row++) {
    const float *gate = x + row * x_step, *up = gate + width;
    float by = factor ? factor[row] : 1.0f;
    for (int64_t i = 0; i < width; i += LANES) {
      int64_t count = width - i < LANES ? width - i : LANES;
      vec g = {}, u = {};
      memcpy(&g, gate + i, 4 * count);
      memcpy(&u, up + i, 4 * count);
      g = g / (1.0f + exponential(-g)) * u * by;
      memcpy(out + row * width + i, &g, 4 * count);
    }
  }
}

typedef struct {
  float *out;
  const float *x;
  int64_t width;
} gating;

static void gate_task(const void *context, int64_t row) {
  const gating *g = context;
  gate_rows(g->out + row * g->width, g->x + row * 2 * g->width, 2 * g->width, 1, g->width, NULL);
}

void gate(float *out, const float *x, int64_t rows, int64_t width) {
  const gating g = {out, x, width};
  in_parallel(gate_task, &g, rows, rows * width * 16); /* an exponential and a division each */
}

/* ---- routing (arXiv 2412.19437 section 2.1.2; softmax: arXiv 2505.09388) */

void sigmoid(float *x, int64_t count) { /* every number by the same instructions, wherever it stands */
  for (int64_t i = 0; i < count; i += LANES) {
    int64_t size = count - i < LANES ? count - i : LANES;
    vec one = {};
    memcpy(&one, x + i, 4 * size);
    one = 1.0f / (1.0f + exponential(-one));
    memcpy(x + i, &one, 4 * size);
  }
}

void softmax(float *x, int64_t rows, int64_t count) {
  for (int64_t row = 0; row < rows; row++, x += count) {
    float most = x[0], sum = 0;
    for (int64_t i = 1; i < count; i++) most = x[i] > most ? x[i] : most;
    for (int64_t i = 0; i < count; i += LANES) {
      int64_t size = count - i < LANES ? count - i : LANES;
      vec one = {};
      memcpy(&one, x + i, 4 * size);
      one = exponential(one - most);
      memcpy(x + i, &one, 4 * size);
    }
    for (int64_t i = 0; i < count; i++) sum += x[i];
    for (int64_t i = 0; i < count; i++) x[i] /= sum;
  }
}

/* Weights of the chosen experts, from their scores. */
void weigh(float *weights, const float *scores, const int64_t *chosen_of, int64_t rows, int64_t num_experts,
           int64_t chosen, int64_t normalises, float scaling) {
  for (int64_t row = 0; row < rows; row++) {
    float sum = 0, *to = weights + row * chosen;
    for (int64_t i = 0; i < chosen; i++) {
      to[i] = scores[row * num_experts + chosen_of[row * chosen + i]];
      sum += to[i];
    }
    for (int64_t i = 0; i < chosen; i++) to[i] = (normalises ? to[i] / (sum + 1e-20f) : to[i]) * scaling;
  }
}

/* ---- experts: assignments of rows to experts, expert by expert */

typedef struct {
  const char *gate_up, *down;
  float *x_in, *both, *gated, *x_out, *factor;
  uint32_t *delicate;
  const int64_t *end; /* of each expert's places */
  int64_t hidden, width, narrow;
} mixture;

static void expert_task(const void *context, int64_t e) {
  const mixture *m = context;
  const int64_t first = e ? m->end[e - 1] : 0, count = m->end[e] - first, hidden = m->hidden, width = m->width;
  const int narrow = m->narrow;
  if (!count) return;
  float *x_in = m->x_in + first * hidden, *both = m->both + first * 2 * width, *gated = m->gated + first * width;
  uint32_t *delicate = narrow ? m->delicate + first : NULL;
  for (int64_t row = 0; narrow && row < count; row++)
    delicate[row] = to_pairs((uint32_t *)x_in + row * hidden, x_in + row * hidden, hidden);
  product into = {both, x_in, m->gate_up + e * weight_bytes(2 * width, hidden, narrow), NULL, delicate,
                  2 * width, hidden, count, 2 * width, hidden, narrow, 0, 0};
  multiply_chunks(&into, 0, chunks_of(into.n));
  gate_rows(gated, both, 2 * width, count, width, m->factor + first);
  for (int64_t row = 0; narrow && row < count; row++)
    delicate[row] = to_pairs((uint32_t *)gated + row * width, gated + row * width, width);
  product back = {m->x_out + first * hidden, gated, m->down + e * weight_bytes(hidden, width, narrow), NULL, delicate,
                  hidden, width, count, hidden, width, narrow, 0, 0};
  multiply_chunks(&back, 0, chunks_of(back.n));
}

/* `scratch` holds rows chosen (3 width + 2 hidden + 2) floats, `order` rows chosen + experts + 1 integers. */
void experts(float *out, const float *x, const int64_t *expert_of, const float *weight_of, const void *gate_up,
             const void *down, float *scratch, int64_t *order, int64_t rows, int64_t chosen, int64_t num_experts,
             int64_t hidden, int64_t width, int64_t narrow) {
  const int64_t places = rows * chosen;
  int64_t *end = order + places;
  float *both = scratch + places * hidden, *gated = both + places * 2 * width, *x_out = gated + places * width;
  float *factor = x_out + places * hidden;
  uint32_t *delicate = (uint32_t *)(factor + places);
  const mixture m = {gate_up, down, scratch, both, gated, x_out, factor, delicate, end, hidden, width, narrow};
  memset(end, 0, 8 * (num_experts + 1));
  for (int64_t i = 0; i < places; i++) end[expert_of[i] + 1]++;
  for (int64_t e = 0; e < num_experts; e++) end[e + 1] += end[e];
  for (int64_t i = 0; i < places; i++) { /* end[e] is the start of e, until all of its places are taken */
    int64_t place = end[expert_of[i]]++;
    order[i] = place;
    m.factor[place] = weight_of[i];
    memcpy(m.x_in + place * hidden, x + i / chosen * hidden, 4 * hidden);
  }
  in_parallel(expert_task, &m, num_experts, places * 3 * hidden * width);
  for (int64_t row = 0; row < rows; row++)
    for (int64_t d = 0; d < hidden; d++) {
      float sum = 0;
      for (int64_t i = 0; i < chosen; i++) sum += x_out[order[row * chosen + i] * hidden + d];
      out[row * hidden + d] = sum;
    }
}

/* ---- attention on the paged cache */

typedef struct {
  float *out;
  const float *q;
  const char *cache;
  const int64_t *tables, *sequence_of, *positions;
  int64_t table_step, block_tokens, row_width;             /* of the cache */
  int64_t groups, heads, key_width, value_width;     /* heads of one group */
  int64_t group_step, value_start, q_step, out_step;       /* in numbers */
  int64_t start;                                           /* token that all attend to first */
  float scale;
  int narrow;
} attention;

#define PADDED(width) (((width) + LANES - 1) / LANES * LANES)

/* (sums of neighbouring lanes of a, then those of b) */
INLINE vec fold(vec a, vec b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/* Products of one query with 16 keys. */
INLINE vec scores_of(const float *q, const float *const *keys, int64_t width) {
  vec sum[LANES] = {};
  for (int64_t d = 0; d < width; d += LANES) {
    vec part = load(q + d);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) sum[i] += part * load(keys[i] + d);
  }
#pragma GCC unroll 4
  for (int count = LANES / 2; count; count /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < count; i++) sum[i] = fold(sum[2 * i], sum[2 * i + 1]);
  return sum[0];
}

/* out = out * shrink + sum over the tokens of p[token] values[token] */
INLINE void add_values(float *out, const float *const *values, const float *p, int64_t count, int64_t width,
                       float shrink) {
  int64_t d = 0;
  for (; d + 4 * LANES <= width; d += 4 * LANES) {
    vec sum[4];
    for (int j = 0; j < 4; j++) sum[j] = load(out + d + j * LANES) * shrink;
    for (int64_t i = 0; i < count; i++)
      for (int j = 0; j < 4; j++) sum[j] += p[i] * load(values[i] + d + j * LANES);
    for (int j = 0; j < 4; j++) store(out + d + j * LANES, sum[j]);
  }
  for (; d < width; d += LANES) {
    vec sum = load(out + d) * shrink;
    for (int64_t i = 0; i < count; i++) sum += p[i] * load(values[i] + d);
    store(out + d, sum);
  }
}

static void copy_numbers(float *to, const char *cache, int64_t from, int64_t count, int narrow) {
  if (!narrow) {
    memcpy(to, (const float *)cache + from, 4 * count);
    return;
  }
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits = (uint32_t)((const uint16_t *)cache)[from + i] << 16;
    memcpy(to + i, &bits, 4);
  }
}

/* Up to MOST_HEADS heads of one group for one row: softmax over TOKENS tokens at a time with a running maximum (arXiv
   1805.02867). Where that is not finite, which also a sum can be whose mean is, `again` is called with the maxima and sums
   found: shares are divided by their sum before they are multiplied with values, as in a plain softmax. Returns whether
   all is finite. */
INLINE int attend_heads(const attention *a, int64_t row, int64_t group, int64_t first, int64_t heads,
                        float *restrict most, float *restrict sums, const int again) {
  const int64_t key_padded = PADDED(a->key_width), value_padded = PADDED(a->value_width);
  /* Rows that are whole vectors are read where they are; others are copied and filled up with zeros. */
  const int in_place = !a->narrow && key_padded == a->key_width && value_padded == a->value_width;
  /* Side by side, not in rows of WIDEST: at steps of 4 KiB all of them would meet in the same lines of the cache. */
  float queries[MOST_HEADS * WIDEST], outs[MOST_HEADS * WIDEST];
  float key_copy[TOKENS * WIDEST], value_copy[TOKENS * WIDEST];
  const float *keys[TOKENS], *values[TOKENS];
  const int64_t *table = a->tables + a->sequence_of[row] * a->table_step;
  const int64_t key_start = group * a->group_step, value_start = a->value_start + group * a->group_step;
  for (int64_t h = 0; h < heads; h++) {
    const float *from = a->q + row * a->q_step + (group * a->heads + first + h) * a->key_width;
    float *q = queries + h * key_padded;
    for (int64_t d = 0; d < key_padded; d++) q[d] = d < a->key_width ? from[d] * a->scale : 0.0f;
    memset(outs + h * value_padded, 0, 4 * value_padded);
    if (!again) most[h] = -INFINITY, sums[h] = 0;
  }
  for (int64_t i = 0; i < TOKENS && !in_place; i++) {
    memset(key_copy + i * key_padded + a->key_width, 0, 4 * (key_padded - a->key_width));
    memset(value_copy + i * value_padded + a->value_width, 0, 4 * (value_padded - a->value_width));
  }
  int64_t block = a->start / a->block_tokens, within = a->start % a->block_tokens;
  for (int64_t token = a->start; token <= a->positions[row]; token += TOKENS) {
    const int64_t left = a->positions[row] + 1 - token, count = left < TOKENS ? left : TOKENS;
    const int64_t parts = (count + LANES - 1) / LANES;
    for (int64_t i = 0; i < count; i++) {
      int64_t start = (table[block] * a->block_tokens + within) * a->row_width;
      if (++within == a->block_tokens) within = 0, block++;
      if (in_place) {
        keys[i] = (const float *)a->cache + start + key_start;
        values[i] = (const float *)a->cache + start + value_start;
      } else {
        copy_numbers(key_copy + i * key_padded, a->cache, start + key_start, a->key_width, a->narrow);
        copy_numbers(value_copy + i * value_padded, a->cache, start + value_start, a->value_width, a->narrow);
        keys[i] = key_copy + i * key_padded;
        values[i] = value_copy + i * value_padded;
      }
    }
    for (int64_t i = count; i < parts * LANES; i++) keys[i] = keys[0]; /* fills up the last vector */
    for (int64_t h = 0; h < heads; h++) {
      vec scores[TOKENS / LANES], now = all(-INFINITY), p_sum = {};
      float p[TOKENS];
      for (int64_t part = 0; part < parts; part++) {
        const ints here = (ints){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} < (int32_t)(count - part * LANES);
        vec found = scores_of(queries + h * key_padded, keys + part * LANES, key_padded);
        scores[part] = choose(here, found, all(-INFINITY));
        now = larger(now, scores[part]);
      }
      const float before = most[h], highest = largest(now);
      most[h] = highest > before ? highest : before;
      /* So far all may be minus infinity, which counts nothing beside what comes. */
      const float least = most[h] > -INFINITY ? most[h] : 0.0f;
      for (int64_t part = 0; part < parts; part++) {
        vec one = exponential(scores[part] - least);
        if (again) one /= sums[h];
        store(p + part * LANES, one);
        p_sum += one;
      }
      float shrink = exponential(all(before - least))[0];
      if (!again) sums[h] = sums[h] * shrink + total(p_sum);
      add_values(outs + h * value_padded, values, p, count, value_padded, shrink);
    }
  }
  int32_t finite = 1;
  for (int64_t h = 0; h < heads; h++) {
    float *to = a->out + row * a->out_step + (group * a->heads + first + h) * a->value_width;
    for (int64_t d = 0; d < a->value_width; d++) {
      to[d] = outs[h * value_padded + d] / (again ? 1.0f : sums[h]);
      finite &= fabsf(to[d]) <= FLT_MAX;
    }
  }
  return finite;
}

static __attribute__((noinline)) void attend_again(const attention *a, int64_t row, int64_t group, int64_t first,
                                                   int64_t heads, float *most, float *sums) {
  attend_heads(a, row, group, first, heads, most, sums, 1);
}

static void attend_task(const void *context, int64_t number) {
  const attention *a = context;
  const int64_t parts = (a->heads + MOST_HEADS - 1) / MOST_HEADS;
  const int64_t first = number % parts * MOST_HEADS, left = a->heads - first;
  const int64_t heads = left < MOST_HEADS ? left : MOST_HEADS;
  const int64_t row = number / parts / a->groups, group = number / parts % a->groups;
  float most[MOST_HEADS], sums[MOST_HEADS];
  if (!attend_heads(a, row, group, first, heads, most, sums, 0)) attend_again(a, row, group, first, heads, most, sums);
}

void attend(float *out, int64_t out_step, const float *q, int64_t q_step, const void *cache, int64_t block_tokens,
            int64_t row_width, int64_t narrow, const int64_t *tables, int64_t table_step, const int64_t *sequence_of,
            const int64_t *positions, int64_t rows, int64_t groups, int64_t heads, int64_t key_width,
            int64_t value_width, int64_t group_step, int64_t value_start, int64_t start, float scale) {
  const attention a = {out, q, cache, tables, sequence_of, positions, table_step, block_tokens, row_width, groups, heads,
                       key_width, value_width, group_step, value_start, q_step, out_step, start, scale, narrow};
  int64_t work = 0;
  for (int64_t row = 0; row < rows; row++) work += (positions[row] + 1) * groups * heads * (key_width + value_width);
  in_parallel(attend_task, &a, rows * groups * ((heads + MOST_HEADS - 1) / MOST_HEADS), work);
}
