/* Products of matrices bit for bit as published models of matrix units make them.

   A unit takes `block` products and the accumulator at once. Products are exact; a product's exponent is the sum of its
   operands' exponents, not normalised. In the block schemes everything is aligned to the largest exponent, cut some bits
   below it, added exactly and rounded once. Numbers are aligned as integers in units of 2^(largest exponent - bits):
   `exact_products.py` admits only units whose sums stay below 2^51, where float64 holds every integer.

   Letters: m rows of a, n columns of b (LANES at a time), k terms. Nothing here may be contracted into fused
   multiply-adds (-ffp-contract=off). Loops over lanes are plain so that the compiler makes vector code of them. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define LANES 64
#define NO_EXPONENT -100000 /* of a product of zero, which must not decide what others are aligned to */
#define EVERY(lane) for (int lane = 0; lane < LANES; lane++)

enum { TRUNCATE, FLOOR, NEAREST_EVEN, HALF_AWAY };
enum { BLOCK, HALVES, PAIRWISE, SEQUENTIAL };

typedef struct {
  int64_t scheme, block;
  int64_t fraction_bits, alignment;
  int64_t sum_bits, sum_rounding;
  int64_t accumulator_bits, accumulator_rounding; /* bits < 0: aligned with the products */
  int64_t result_bits, final;
  int64_t flushes_out;
  int64_t infinite_products; /* products of 2^128 and more count as infinite */
  int64_t operand_bits;      /* fraction bits of the operands' format */
  int64_t zero_exponent;     /* of an accumulator of zero; NO_EXPONENT where it decides nothing */
} unit_t;

typedef struct { const float *number; const int32_t *significand, *exponent; } operand_t;

static uint32_t bits_of(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static uint64_t bits_of_double(double x) { uint64_t bits; memcpy(&bits, &x, 8); return bits; }
static double double_of(uint64_t bits) { double x; memcpy(&x, &bits, 8); return x; }
static double power_of_two(int64_t exponent) { return double_of((uint64_t)(exponent + 1023) << 52); }
static float quiet_nan(void) { uint32_t bits = 0x7FFFFFFF; float x; memcpy(&x, &bits, 4); return x; }

/* A float32 as significand x 2^(exponent - bits), with the exponent of its own format where it is subnormal there. */
static inline void take_apart(float x, int64_t bits, int64_t smallest, int32_t *significand, int32_t *exponent) {
  uint32_t word = bits_of(x), magnitude = word & 0x7FFFFFFF;
  int32_t biased = magnitude >> 23, fraction = magnitude & 0x7FFFFF;
  int32_t own = biased ? biased - 127 : -126, whole = biased ? fraction | 0x800000 : fraction;
  int32_t shown = own < smallest ? (int32_t)smallest : own;
  int32_t drop = 23 - (int32_t)bits + (shown - own);
  whole = drop > 31 ? 0 : whole >> drop; /* loses nothing: x is a number of the format */
  *significand = word >> 31 ? -whole : whole;
  *exponent = whole ? shown : NO_EXPONENT;
}

void decode(const float *numbers, int64_t count, int64_t bits, int64_t smallest, int32_t *significand,
            int32_t *exponent) {
  for (int64_t i = 0; i < count; i++) take_apart(numbers[i], bits, smallest, significand + i, exponent + i);
}

/* value x 2^-distance as an integer; distance >= 0, |value| < 2^51. */
static inline int64_t shift_down(int64_t value, int64_t distance, int64_t direction) {
  if (distance > 60) distance = 60;
  int64_t sign = value >> 63, magnitude = (value ^ sign) - sign;
  if (direction == TRUNCATE) return ((magnitude >> distance) ^ sign) - sign;
  if (direction == FLOOR) return value >> distance;
  if (!distance) return value;
  int64_t half = (int64_t)1 << (distance - 1);
  if (direction == NEAREST_EVEN) half += ((magnitude >> distance) & 1) - 1;
  return (((magnitude + half) >> distance) ^ sign) - sign;
}

/* value x 2^(up - distance): the shift to the left is exact. */
static inline int64_t align(int64_t value, int64_t up, int64_t distance, int64_t direction) {
  return up >= 0 ? shift_down(value << up, distance, direction) : shift_down(value, distance - up, direction);
}

/* Sum of every `stride`-th product of a block, from `first` on, in units of 2^(*largest - bits). The accumulator takes
   part unless its significands are NULL. */
static inline void aligned_sum(const unit_t *unit, const operand_t *a, const operand_t *b, int64_t columns, int64_t terms,
                               int64_t first, int64_t stride, const int32_t *c_significand, const int32_t *c_exponent,
                               int64_t direction, int32_t *largest, int64_t *sum) {
  int64_t up = unit->fraction_bits - 2 * unit->operand_bits;
  EVERY(n) largest[n] = c_significand ? c_exponent[n] : NO_EXPONENT;
  for (int64_t k = first; k < terms; k += stride) {
    int32_t exponent = a->exponent[k];
    const int32_t *exponents = b->exponent + k * columns;
    EVERY(n) {
      int32_t of_product = exponent + exponents[n];
      largest[n] = of_product > largest[n] ? of_product : largest[n];
    }
  }
  EVERY(n) sum[n] = c_significand ? align(c_significand[n], unit->fraction_bits - 23, largest[n] - c_exponent[n], direction) : 0;
  for (int64_t k = first; k < terms; k += stride) {
    int64_t significand = a->significand[k];
    int32_t exponent = a->exponent[k];
    const int32_t *significands = b->significand + k * columns, *exponents = b->exponent + k * columns;
    EVERY(n) sum[n] += align(significand * significands[n], up, largest[n] - exponent - exponents[n], direction);
  }
}

static double round_to_integer(double x, int64_t direction) {
  if (direction == TRUNCATE) return trunc(x);
  if (direction == FLOOR) return floor(x);
  return direction == NEAREST_EVEN ? rint(x) : round(x);
}

/* Float32 with `bits` fraction bits from exact float64: what a block hands on. */
static inline float round_result(double exact, int64_t bits, int64_t direction) {
  uint64_t word = bits_of_double(exact);
  int64_t dropped = 52 - bits;
  uint64_t rest = ((uint64_t)1 << dropped) - 1, half = (uint64_t)1 << (dropped - 1);
  uint64_t more = direction == NEAREST_EVEN ? half - 1 + ((word >> dropped) & 1)
                  : direction == HALF_AWAY  ? half
                  : direction == FLOOR      ? (word >> 63 ? rest : 0)
                                            : 0;
  double rounded = double_of((word + more) & ~rest);
  if (fabs(exact) < 0x1p-126) { /* subnormal: what is kept is counted from the smallest normal exponent */
    double scale = power_of_two(126 + bits);
    rounded = round_to_integer(exact * scale, direction) / scale;
  }
  return (float)rounded;
}

static inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? x * 0.0f : x; }

/* One block in one lane, where an operand or the accumulator may be infinite or no number: whether the result is so, and
   the result. Products are exact in float64. */
static int special_sum(const unit_t *unit, const operand_t *a, const float *b, int64_t columns, int64_t terms, float c,
                       float *result) {
  double sum = c, of_infinite = 0;
  for (int64_t k = 0; k < terms; k++) {
    double product = (double)a->number[k] * b[k * columns];
    sum += product;
    if (fabs(product) >= 0x1p128) of_infinite += product * INFINITY;
  }
  if (unit->infinite_products && isfinite(sum)) sum = of_infinite;
  *result = isnan(sum) ? quiet_nan() : (float)sum;
  return !isfinite(sum);
}

static inline void finish(const unit_t *unit, const int32_t *exponent, int64_t bits, const int64_t *sum, float *c) {
  int64_t result_bits = unit->result_bits, final = unit->final;
  EVERY(n) {
    /* A sum of zero may have no exponent. */
    int64_t power = sum[n] ? exponent[n] - bits : 0;
    c[n] = round_result((double)sum[n] * power_of_two(power), result_bits, final);
  }
}

static inline void block_scheme(const unit_t *unit, const operand_t *a, const operand_t *b, int64_t columns, int64_t terms,
                                int64_t direction, float *c) {
  int32_t c_significand[LANES], c_exponent[LANES], largest[LANES];
  int64_t sum[LANES];
  EVERY(n) take_apart(c[n], 23, -126, c_significand + n, c_exponent + n);
  EVERY(n) c_exponent[n] = c_significand[n] ? c_exponent[n] : (int32_t)unit->zero_exponent;
  if (unit->accumulator_bits < 0) {
    aligned_sum(unit, a, b, columns, terms, 0, 1, c_significand, c_exponent, direction, largest, sum);
    finish(unit, largest, unit->fraction_bits, sum, c);
    return;
  }
  if (unit->scheme == HALVES) {
    int32_t odd_largest[LANES];
    int64_t odd_sum[LANES];
    aligned_sum(unit, a, b, columns, terms, 0, 2, NULL, NULL, direction, largest, sum);
    aligned_sum(unit, a, b, columns, terms, 1, 2, NULL, NULL, direction, odd_largest, odd_sum);
    EVERY(n) {
      int32_t larger = largest[n] > odd_largest[n] ? largest[n] : odd_largest[n];
      sum[n] = shift_down(sum[n], larger - largest[n], unit->sum_rounding) +
               shift_down(odd_sum[n], larger - odd_largest[n], unit->sum_rounding);
      largest[n] = larger;
    }
  } else {
    aligned_sum(unit, a, b, columns, terms, 0, 1, NULL, NULL, direction, largest, sum);
  }
  int64_t up = unit->sum_bits - unit->fraction_bits;
  int64_t bits = unit->sum_bits > unit->accumulator_bits ? unit->sum_bits : unit->accumulator_bits;
  EVERY(n) {
    int32_t larger = largest[n] > c_exponent[n] ? largest[n] : c_exponent[n];
    int64_t of_products = align(sum[n], up, larger - largest[n], unit->sum_rounding);
    int64_t distance = larger - c_exponent[n];
    int64_t of_accumulator = align(c_significand[n], unit->accumulator_bits - 23, distance, unit->accumulator_rounding);
    /* MI300X's fp8 unit drops an accumulator of which nothing is left, where flooring would leave -1. */
    if (unit->scheme == HALVES && distance > unit->accumulator_bits + 1) of_accumulator = 0;
    sum[n] = of_products * ((int64_t)1 << (bits - unit->sum_bits)) +
             of_accumulator * ((int64_t)1 << (bits - unit->accumulator_bits));
    largest[n] = larger;
  }
  finish(unit, largest, bits, sum, c);
}

/* A tree of float32 additions over a block (a power of two of at most 32 terms), then the accumulator. */
static void pairwise_scheme(const unit_t *unit, const operand_t *a, const operand_t *b, int64_t columns, int64_t terms,
                            float *c) {
  float part[32][LANES];
  int64_t flushes = unit->flushes_out;
  for (int64_t k = 0; k < unit->block; k++) {
    if (k >= terms) { memset(part[k], 0, sizeof part[k]); continue; }
    float left = a->number[k];
    const float *right = b->number + k * columns;
    EVERY(n) { float product = left * right[n]; part[k][n] = flushes ? flushed(product) : product; }
  }
  for (int64_t width = unit->block / 2; width; width /= 2)
    for (int64_t k = 0; k < width; k++)
      EVERY(n) { float sum = part[2 * k][n] + part[2 * k + 1][n]; part[k][n] = flushes ? flushed(sum) : sum; }
  EVERY(n) { float sum = c[n] + part[0][n]; c[n] = flushes ? flushed(sum) : sum; }
}

static void sequential_scheme(const operand_t *a, const operand_t *b, int64_t columns, int64_t terms, float *c) {
  for (int64_t k = 0; k < terms; k++) {
    float left = a->number[k];
    const float *right = b->number + k * columns;
    EVERY(n) c[n] = fmaf(left, right[n], c[n]);
  }
}

/* Which lanes need `special_sum`, and whether any does. */
static int find_special(const unit_t *unit, const operand_t *a, const operand_t *b, int64_t columns, int64_t terms,
                        const float *c, uint8_t *special) {
  int any = 0;
  EVERY(n) special[n] = (bits_of(c[n]) & 0x7F800000) == 0x7F800000;
  for (int64_t k = 0; k < terms; k++) {
    int32_t exponent = a->exponent[k];
    const int32_t *exponents = b->exponent + k * columns;
    /* Infinities and NaN were decoded with the exponent 128; finite numbers have at most 127. */
    EVERY(n) special[n] |= exponent == 128 || exponents[n] == 128;
    if (unit->infinite_products) EVERY(n) special[n] |= exponent + exponents[n] >= 127;
  }
  EVERY(n) any |= special[n];
  return any;
}

/* Rows `from` to `to` of c (rows x columns, float32) = a (rows x terms) b (terms x columns); columns is a multiple of
   LANES and terms of 1; a and b come decoded, c holds what is accumulated onto. */
void multiply(const unit_t *unit, int64_t from, int64_t to, int64_t terms, int64_t columns, const operand_t *a,
              const operand_t *b, float *c) {
  for (int64_t m = from; m < to; m++)
    for (int64_t n = 0; n < columns; n += LANES) {
      float total[LANES], special_total[LANES];
      uint8_t special[LANES];
      memcpy(total, c + m * columns + n, sizeof total);
      for (int64_t k = 0; k < terms; k += unit->block) {
        int64_t length = terms - k < unit->block ? terms - k : unit->block;
        operand_t left = {a->number + m * terms + k, a->significand + m * terms + k, a->exponent + m * terms + k};
        int64_t at = k * columns + n;
        operand_t right = {b->number + at, b->significand + at, b->exponent + at};
        if (unit->scheme == SEQUENTIAL) { sequential_scheme(&left, &right, columns, length, total); continue; }
        if (unit->scheme == PAIRWISE) { pairwise_scheme(unit, &left, &right, columns, length, total); continue; }
        int any = find_special(unit, &left, &right, columns, length, total, special);
        if (any) EVERY(lane) if (special[lane])
          special[lane] = special_sum(unit, &left, right.number + lane, columns, length, total[lane], special_total + lane);
        /* A direction known to the compiler makes the loops over lanes vector code. */
        if (unit->alignment == TRUNCATE) block_scheme(unit, &left, &right, columns, length, TRUNCATE, total);
        else if (unit->alignment == FLOOR) block_scheme(unit, &left, &right, columns, length, FLOOR, total);
        else block_scheme(unit, &left, &right, columns, length, unit->alignment, total);
        if (any) EVERY(lane) if (special[lane]) total[lane] = special_total[lane];
        if (unit->flushes_out) EVERY(lane) total[lane] = flushed(total[lane]);
      }
      memcpy(c + m * columns + n, total, sizeof total);
    }
}
