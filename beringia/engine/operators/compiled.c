/* The engine's operators on a CPU. Activations are float32; weights and cache are float32 or bfloat16.

Weights lie in panels of 16 outputs, k after k, so that a vector holds 16 outputs and nothing is summed across lanes:
an output is the sum over k in order, whatever other rows and outputs are computed beside it. Attention takes a
sequence's tokens 16 at a time from its first one. So a row's result depends on nothing but that row: the same bits
alone and in any batch, as a whole prompt and in chunks. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 16
#define MOST_HEADS 8     /* that one task of attention works on */
#define WIDEST 1024      /* row of the cache, in numbers */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

INLINE vec load(const float *from) { vec x; memcpy(&x, from, sizeof x); return x; }
INLINE void store(float *to, vec x) { memcpy(to, &x, sizeof x); }
INLINE vec all(float x) { return x - (vec){}; }
INLINE vec choose(ints mask, vec yes, vec no) { return (vec)(((ints)yes & mask) | ((ints)no & ~mask)); }
/* A bfloat16 is the upper half of a float32; a word of a panel holds those of an even k (below) and the odd k after. */
INLINE vec even_of(words pair) { return (vec)(pair << 16); }
INLINE vec odd_of(words pair) { return (vec)(pair & 0xffff0000u); }

/* Lane i meets lane i + 8, then i + 4, i + 2, i + 1. */
#define REACH(x, by) __builtin_shufflevector(x, x, (0 + by) % 16, (1 + by) % 16, (2 + by) % 16, (3 + by) % 16, (4 + by) % 16, \
  (5 + by) % 16, (6 + by) % 16, (7 + by) % 16, (8 + by) % 16, (9 + by) % 16, (10 + by) % 16, (11 + by) % 16,           \
  (12 + by) % 16, (13 + by) % 16, (14 + by) % 16, (15 + by) % 16)
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); }
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

/* e^x within 2 units in the last place between -87 and 88, outside the value at the nearer end: after the constants of
   Cephes' expf (S. L. Moshier, netlib.org/cephes). */
INLINE vec exponential(vec x) {
  x = choose(x > all(-87.0f), x, all(-87.0f));
  x = choose(x < all(88.0f), x, all(88.0f));
  vec shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer in the lowest bits */
  vec n = shifted - 12582912.0f;
  vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * (vec)(((ints)shifted - 0x4B400000 + 127) << 23);
}

/* ---- products */

/* out[m, n] (+)= sum over k of x[m, k] weight[n, k] + bias[n] */
typedef struct {
  float *out;
  const float *x;
  const char *weight; /* panels */
  const float *bias;  /* or NULL */
  int64_t out_step, x_step, rows, n, k;
  int narrow, adds;
} product;

INLINE void finish(const product *p, int64_t row, int64_t first, vec sum) {
  float *out = p->out + row * p->out_step + first;
  int64_t count = p->n - first < LANES ? p->n - first : LANES;
  vec bias = {}, before = {};
  if (p->bias) memcpy(&bias, p->bias + first, 4 * count);
  if (p->adds) memcpy(&before, out, 4 * count);
  sum = before + (sum + bias);
  memcpy(out, &sum, 4 * count);
}

#define DEFINE_TILE(ROWS, PANELS)                                                                            \
  static void tile_##ROWS##_##PANELS(const product *p, int64_t row, int64_t panel) {                         \
    const float *x = p->x + row * p->x_step;                                                                 \
    const int64_t step = p->x_step, k_all = p->k;                                                            \
    vec sum[ROWS][PANELS] = {};                                                                              \
    if (p->narrow) {                                                                                         \
      const int64_t pairs = (k_all + 1) / 2;                                                                 \
      const words *weight = (const words *)p->weight + panel * pairs;                                        \
      for (int64_t k = 0; k < k_all / 2; k++) {                                                              \
        _Pragma("GCC unroll 8") for (int j = 0; j < PANELS; j++) {                                           \
          words pair = weight[j * pairs + k];                                                                \
          vec even = even_of(pair), odd = odd_of(pair);                                                      \
          _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++) {                                           \
            sum[i][j] += x[i * step + 2 * k] * even;                                                         \
            sum[i][j] += x[i * step + 2 * k + 1] * odd;                                                      \
          }                                                                                                  \
        }                                                                                                    \
      }                                                                                                      \
      if (k_all % 2)                                                                                         \
        for (int j = 0; j < PANELS; j++)                                                                     \
          for (int i = 0; i < ROWS; i++)                                                                     \
            sum[i][j] += x[i * step + k_all - 1] * even_of(weight[j * pairs + pairs - 1]);                   \
    } else {                                                                                                 \
      const vec *weight = (const vec *)p->weight + panel * k_all;                                            \
      for (int64_t k = 0; k < k_all; k++)                                                                    \
        _Pragma("GCC unroll 8") for (int j = 0; j < PANELS; j++) {                                           \
          vec column = weight[j * k_all + k];                                                                \
          _Pragma("GCC unroll 8") for (int i = 0; i < ROWS; i++) sum[i][j] += x[i * step + k] * column;      \
        }                                                                                                    \
    }                                                                                                        \
    for (int i = 0; i < ROWS; i++)                                                                           \
      for (int j = 0; j < PANELS; j++) finish(p, row + i, (panel + j) * LANES, sum[i][j]);                   \
  }
DEFINE_TILE(8, 2)
DEFINE_TILE(8, 1)
DEFINE_TILE(4, 4)
DEFINE_TILE(4, 1)
DEFINE_TILE(1, 4)
DEFINE_TILE(1, 1)

#define CHUNK 4 /* panels that one task computes for all rows, so that weights are read once */

static void multiply_chunk(const product *p, int64_t panel) {
  int64_t panels = (p->n + LANES - 1) / LANES, end = panel + CHUNK < panels ? panel + CHUNK : panels;
  int whole = end - panel == CHUNK;
  int64_t row = 0;
  for (; row + 8 <= p->rows; row += 8) {
    int64_t j = panel;
    for (; j + 2 <= end; j += 2) tile_8_2(p, row, j);
    if (j < end) tile_8_1(p, row, j);
  }
  for (; row + 4 <= p->rows; row += 4) {
    if (whole) tile_4_4(p, row, panel);
    else for (int64_t j = panel; j < end; j++) tile_4_1(p, row, j);
  }
  for (; row < p->rows; row++) {
    if (whole) tile_1_4(p, row, panel);
    else for (int64_t j = panel; j < end; j++) tile_1_1(p, row, j);
  }
}

INLINE int64_t chunks_of(int64_t n) { return (n + CHUNK * LANES - 1) / (CHUNK * LANES); }
INLINE int64_t panel_bytes(int64_t k, int narrow) { return narrow ? (k + 1) / 2 * 4 * LANES : k * 4 * LANES; }
INLINE int64_t weight_bytes(int64_t n, int64_t k, int narrow) {
  return (n + LANES - 1) / LANES * panel_bytes(k, narrow);
}

/* Below so many multiply-adds a second thread costs more than it saves. */
#define WORTH_A_THREAD 100000

/* `groups` products beside each other: group g reads x from g * x_group on and writes out from g * out_group on. */
void linear(float *out, int64_t out_step, int64_t out_group, const float *x, int64_t x_step, int64_t x_group,
            const void *weight, const float *bias, int64_t groups, int64_t rows, int64_t n, int64_t k, int64_t narrow,
            int64_t adds) {
  const int64_t chunks = chunks_of(n), size = weight_bytes(n, k, narrow);
#pragma omp parallel for schedule(static) if (groups * rows * n * k > WORTH_A_THREAD)
  for (int64_t task = 0; task < groups * chunks; task++) {
    int64_t group = task / chunks;
    product p = {out + group * out_group, x + group * x_group, (const char *)weight + group * size, bias,
                 out_step, x_step, rows, n, k, narrow, adds};
    multiply_chunk(&p, task % chunks * CHUNK);
  }
}

/* ---- row by row */

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

INLINE uint16_t narrowed(float x) { /* round to nearest, ties to even */
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 0x40);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
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

void gate(float *out, const float *x, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static) if (rows * width > WORTH_A_THREAD / 4)
  for (int64_t row = 0; row < rows; row++) gate_rows(out + row * width, x + row * 2 * width, 2 * width, 1, width, NULL);
}

/* ---- experts: assignments of rows to experts, expert by expert */

/* `scratch` holds rows chosen (3 width + 2 hidden + 1) floats, `order` rows chosen + experts + 1 integers. */
void experts(float *out, const float *x, const int64_t *expert_of, const float *weight_of, const void *gate_up,
             const void *down, float *scratch, int64_t *order, int64_t rows, int64_t chosen, int64_t num_experts,
             int64_t hidden, int64_t width, int64_t narrow) {
  const int64_t all_places = rows * chosen;
  int64_t *start = order + all_places;
  float *x_in = scratch, *both = x_in + all_places * hidden, *gated = both + all_places * 2 * width;
  float *x_out = gated + all_places * width, *factor = x_out + all_places * hidden;
  memset(start, 0, 8 * (num_experts + 1));
  for (int64_t i = 0; i < all_places; i++) start[expert_of[i] + 1]++;
  for (int64_t e = 0; e < num_experts; e++) start[e + 1] += start[e];
  for (int64_t i = 0; i < all_places; i++) { /* start[e] runs to the end of e, which is the start of e + 1 */
    int64_t place = start[expert_of[i]]++;
    order[i] = place;
    factor[place] = weight_of[i];
    memcpy(x_in + place * hidden, x + i / chosen * hidden, 4 * hidden);
  }
#pragma omp parallel for schedule(dynamic) if (all_places * 3 * hidden * width > WORTH_A_THREAD)
  for (int64_t e = 0; e < num_experts; e++) {
    int64_t first = e ? start[e - 1] : 0, count = start[e] - first;
    if (!count) continue;
    product into = {both + first * 2 * width, x_in + first * hidden,
                    (const char *)gate_up + e * weight_bytes(2 * width, hidden, narrow), NULL,
                    2 * width, hidden, count, 2 * width, hidden, narrow, 0};
    for (int64_t c = 0; c < chunks_of(into.n); c++) multiply_chunk(&into, c * CHUNK);
    gate_rows(gated + first * width, into.out, 2 * width, count, width, factor + first);
    product back = {x_out + first * hidden, gated + first * width,
                    (const char *)down + e * weight_bytes(hidden, width, narrow), NULL,
                    hidden, width, count, hidden, width, narrow, 0};
    for (int64_t c = 0; c < chunks_of(back.n); c++) multiply_chunk(&back, c * CHUNK);
  }
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

/* Up to MOST_HEADS heads of one group for one row: softmax over 16 tokens at a time with a running maximum (arXiv
   1805.02867). */
static void attend_task(const attention *a, int64_t row, int64_t group, int64_t first, int64_t heads) {
  const int64_t key_padded = PADDED(a->key_width), value_padded = PADDED(a->value_width);
  /* Rows that are whole vectors are read where they are; others are copied and filled up with zeros. */
  const int in_place = !a->narrow && key_padded == a->key_width && value_padded == a->value_width;
  float q[MOST_HEADS][WIDEST], out[MOST_HEADS][WIDEST], most[MOST_HEADS], sums[MOST_HEADS];
  float key_copy[LANES][WIDEST], value_copy[LANES][WIDEST];
  const float *keys[LANES], *values[LANES];
  const int64_t *table = a->tables + a->sequence_of[row] * a->table_step;
  const int64_t key_start = group * a->group_step, value_start = a->value_start + group * a->group_step;
  for (int64_t h = 0; h < heads; h++) {
    const float *from = a->q + row * a->q_step + (group * a->heads + first + h) * a->key_width;
    for (int64_t d = 0; d < key_padded; d++) q[h][d] = d < a->key_width ? from[d] * a->scale : 0.0f;
    memset(out[h], 0, 4 * value_padded);
    most[h] = -INFINITY;
    sums[h] = 0;
  }
  for (int64_t i = 0; i < LANES && !in_place; i++) {
    memset(key_copy[i] + a->key_width, 0, 4 * (key_padded - a->key_width));
    memset(value_copy[i] + a->value_width, 0, 4 * (value_padded - a->value_width));
  }
  for (int64_t token = 0; token <= a->positions[row]; token += LANES) {
    int64_t count = a->positions[row] + 1 - token < LANES ? a->positions[row] + 1 - token : LANES;
    for (int64_t i = 0; i < LANES; i++) {
      int64_t at = token + (i < count ? i : 0);
      int64_t start = (table[at / a->block_tokens] * a->block_tokens + at % a->block_tokens) * a->row_width;
      if (in_place) {
        keys[i] = (const float *)a->cache + start + key_start;
        values[i] = (const float *)a->cache + start + value_start;
      } else {
        copy_numbers(key_copy[i], a->cache, start + key_start, a->key_width, a->narrow);
        copy_numbers(value_copy[i], a->cache, start + value_start, a->value_width, a->narrow);
        keys[i] = key_copy[i];
        values[i] = value_copy[i];
      }
    }
    ints lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ints here = lane < (int32_t)count;
    for (int64_t h = 0; h < heads; h++) {
      vec scores = choose(here, scores_of(q[h], keys, key_padded), all(-INFINITY));
      float before = most[h], now = largest(scores);
      most[h] = now > before ? now : before;
      vec p = (vec)((ints)exponential(scores - most[h]) & here);
      float shrink = exponential(all(before - most[h]))[0];
      sums[h] = sums[h] * shrink + total(p);
      add_values(out[h], values, (const float *)&p, count, value_padded, shrink);
    }
  }
  for (int64_t h = 0; h < heads; h++) {
    float *to = a->out + row * a->out_step + (group * a->heads + first + h) * a->value_width;
    for (int64_t d = 0; d < a->value_width; d++) to[d] = out[h][d] / sums[h];
  }
}

void attend(float *out, int64_t out_step, const float *q, int64_t q_step, const void *cache, int64_t block_tokens,
            int64_t row_width, int64_t narrow, const int64_t *tables, int64_t table_step, const int64_t *sequence_of,
            const int64_t *positions, int64_t rows, int64_t groups, int64_t heads, int64_t key_width,
            int64_t value_width, int64_t group_step, int64_t value_start, float scale) {
  const attention a = {out, q, cache, tables, sequence_of, positions, table_step, block_tokens, row_width, groups, heads,
                       key_width, value_width, group_step, value_start, q_step, out_step, scale, narrow};
  const int64_t parts = (heads + MOST_HEADS - 1) / MOST_HEADS;
  int64_t work = 0;
  for (int64_t row = 0; row < rows; row++) work += (positions[row] + 1) * groups * heads * (key_width + value_width);
#pragma omp parallel for schedule(dynamic) if (work > WORTH_A_THREAD)
  for (int64_t task = 0; task < rows * groups * parts; task++) {
    int64_t first = task % parts * MOST_HEADS, left = heads - first;
    attend_task(&a, task / parts / groups, task / parts % groups, first, left < MOST_HEADS ? left : MOST_HEADS);
  }
}
