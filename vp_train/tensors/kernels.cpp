// Kernels for a CPU in 16 bits: sums of two dtypes, and the row-wise work of the vocabulary passes.
//
// torch would run each of them as several operations, and cast whole tensors in between.  The loops
// over a row are written so that a compiler vectorises them.  Matrices are contiguous unless a
// stride is an argument.  `kernels.py` builds this file for one 16-bit type, ELEMENT, and has the
// signatures.

#include <cmath>
#include <cstdint>
#include <cstring>

using index_t = int64_t;

namespace {

// Below so many values a second thread costs more than it saves.
constexpr index_t kValuesOfThread = 1 << 15;
// Rows and columns of a tile that is transposed in the first-level cache.
constexpr index_t kTile = 32;
// Columns that a thread takes where it may not take rows.
constexpr index_t kColumns = 256;
// Values of a row that stay in the first-level cache from one loop to the next.
constexpr index_t kBlock = 1024;

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

using E = ELEMENT;

inline float load(float value) { return value; }

inline float load(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float load(Float16 value) {
  const uint32_t half = value.bits, magnitude = half & 0x7fffu;
  // 2^112 moves the exponent, of subnormal numbers too.
  const uint32_t finite = bits_of(float_of(magnitude << 13) * 0x1p112f);
  const uint32_t bits = magnitude >= 0x7c00u ? finite | 0x7f800000u : finite;
  return float_of(bits | (half & 0x8000u) << 16);
}

// Stores round to nearest, ties to even.

inline void store(float& to, float value) { to = value; }

inline void store(BFloat16& to, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

inline void store(Float16& to, float value) {
  const uint32_t sign = bits_of(value) & 0x80000000u, bits = bits_of(value) ^ sign;
  const uint32_t normal = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(bits) + 0.5f) - (126u << 23);
  const uint32_t large = bits > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t half = bits >= 0x47800000u ? large : bits < 0x38800000u ? subnormal : normal;
  to.bits = static_cast<uint16_t>(half | sign >> 16);
}

// exp(x) for x <= 87 within 2e-7 + 6e-8 |x|, relatively; at least 2^-126, and NaN for NaN.
inline float exponential(float x) {
  const float exact = x * 1.44269504f, power = exact < -126.0f ? -126.0f : exact;
  const float shifted = power + 0x1.8p23f;  // its lowest bits are the nearest whole number
  const float rest = power - (shifted - 0x1.8p23f);
  float value = 1.54035304e-4f;  // 2^rest, whose series ends here
  value = value * rest + 1.33335581e-3f;
  value = value * rest + 9.61812911e-3f;
  value = value * rest + 5.55041087e-2f;
  value = value * rest + 2.40226507e-1f;
  value = value * rest + 6.93147181e-1f;
  value = value * rest + 1.0f;
  return float_of(bits_of(value) + (bits_of(shifted) << 23));
}

inline float hyperbolic_tangent(float x) {
  const float size = std::fabs(x), power = exponential(-2.0f * size);
  const float series = size - size * size * size / 3.0f;  // as good as exact where it is used
  return std::copysign(size < 0.02f ? series : (1.0f - power) / (1.0f + power), x);
}

// exp(reference - lse) dloss / dlse of token t; `reference` null is lse itself.
inline float softmax_factor(const float* reference, const float* lse, float z_loss, index_t t) {
  const float factor = reference ? std::exp(reference[t] - lse[t]) : 1.0f;
  return z_loss != 0.0f ? factor * (1.0f + 2.0f * z_loss * lse[t]) : factor;
}

// Writes P of one row of logits unless `out` is null, and returns its sum.  With a softcap P has
// its slope as a factor, and the sum has not.
inline float exponentials(const E* logits, E* out, index_t columns, float reference,
                          float softcap) {
  const float inverse = 1.0f / softcap;
  float sum = 0.0f, block[kBlock];  // a loop that also rounds is not vectorised for every type
  for (index_t left = 0; left < columns; left += kBlock) {
    const index_t width = columns - left < kBlock ? columns - left : kBlock;
    const E* from = logits + left;
    if (softcap > 0.0f) {
#pragma omp simd reduction(+ : sum)
      for (index_t i = 0; i < width; ++i) {
        const float ratio = hyperbolic_tangent(load(from[i]) * inverse);
        const float p = exponential(softcap * ratio - reference);
        sum += p;
        block[i] = p * (1.0f - ratio * ratio);
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (index_t i = 0; i < width; ++i) {
        block[i] = exponential(load(from[i]) - reference);
        sum += block[i];
      }
    }
    if (!out) continue;
#pragma omp simd
    for (index_t i = 0; i < width; ++i) store(out[left + i], block[i]);
  }
  return sum;
}

// Each row of `out` is (product * softmax factor - target_scale * W[row] - shared) * gain.
template <class Out>
void input_term_as(const float* product, Out* out, const float* reference, const float* lse,
                   const E* weight, const index_t* rows, const float* target_scales,
                   float target_scale, float z_loss, const float* shared, const float* gain,
                   index_t tokens, index_t hidden, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * hidden > kValuesOfThread)
  for (index_t t = 0; t < tokens; ++t) {
    const float own = gain ? gain[t] : 1.0f, factor = softmax_factor(reference, lse, z_loss, t);
    const float of_target = target_scales ? target_scales[t] : target_scale;
    const float* from = product + t * hidden;
    const E* row = rows[t] >= 0 ? weight + rows[t] * hidden : nullptr;
    Out* to = out + t * hidden;
#pragma omp simd
    for (index_t i = 0; i < hidden; ++i) {
      float value = from[i] * factor;
      if (row) value -= of_target * load(row[i]);
      if (shared) value -= shared[i];
      store(to[i], value * own);
    }
  }
}

// Each row of `out` is x * factor, times its softmax factor if there is `lse`.
template <class X>
void scale_from(const X* x, const float* factor, const float* reference, const float* lse,
                float z_loss, E* out, index_t tokens, index_t hidden, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * hidden > kValuesOfThread)
  for (index_t t = 0; t < tokens; ++t) {
    const float own = factor[t] * (lse ? softmax_factor(reference, lse, z_loss, t) : 1.0f);
    const X* from = x + t * hidden;
    E* to = out + t * hidden;
#pragma omp simd
    for (index_t i = 0; i < hidden; ++i) store(to[i], load(from[i]) * own);
  }
}

// out[2 i], out[2 i + 1] = first[i], second[i].  A compiler vectorises copies of whole numbers, but
// not of the struct around them.
inline void interleave(const E* __restrict first, const E* __restrict second, E* __restrict out,
                       index_t size) {
#pragma omp simd
  for (index_t i = 0; i < size; ++i) {
    out[2 * i].bits = first[i].bits;
    out[2 * i + 1].bits = second[i].bits;
  }
}

// Writes the transpose of a tile [height, width] to `out`, with kTile values from row to row.
//
// Interleaving the two halves of 2^k x 2^k values rotates the bits of their indices by one.  After k
// rounds the bits of rows and columns have changed places.
inline void transpose(const E* from, index_t stride, index_t height, index_t width, E* out) {
  if (height < kTile || width < kTile) {
    for (index_t r = 0; r < height; ++r) {
      for (index_t c = 0; c < width; ++c) out[c * kTile + r] = from[r * stride + c];
    }
    return;
  }
  constexpr index_t half = kTile * kTile / 2;
  E other[2 * half];
  for (index_t r = 0; r < kTile / 2; ++r) {
    interleave(from + r * stride, from + (r + kTile / 2) * stride, out + 2 * r * kTile, kTile);
  }
  static_assert(kTile == 32, "this round and four more");
  for (int pair = 0; pair < 2; ++pair) {
    interleave(out, out + half, other, half);
    interleave(other, other + half, out, half);
  }
}

}  // namespace

extern "C" {

// P of a chunk of logits, and statistics that include the chunk: `rows.extend`.
//
// out: with `out_stride` values from row to row; null if P is not wanted.
// running: reference, total and target [3, T]; if `start` is 0 they only get values.
// rows: the rows of the targets, of which `start` is the first column; null without targets.
// softcap: 0 is none.
void extend(const E* logits, E* out, index_t out_stride, float* running, float* references,
            const index_t* rows, index_t start, index_t tokens, index_t columns,
            float softcap, float slack, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * columns > kValuesOfThread)
  for (index_t t = 0; t < tokens; ++t) {
    const E* row = logits + t * columns;
    float *reference = running + t, *total = reference + tokens, *target = total + tokens;
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (index_t i = 0; i < columns; ++i) {
      const float z = load(row[i]);
      largest = z > largest ? z : largest;
    }
    if (softcap > 0.0f) largest = softcap * hyperbolic_tangent(largest / softcap);  // rises with z
    const float before = start ? *reference : -INFINITY;
    const float own = start && !(largest > before + slack) ? before : largest;
    if (start == 0) *target = 0.0f;
    if (rows && rows[t] >= start && rows[t] < start + columns) *target = load(row[rows[t] - start]);
    const float sum = exponentials(row, out ? out + t * out_stride : nullptr, columns, own, softcap);
    *total = start ? *total * std::exp(before - own) + sum : sum;
    *reference = references[t] = own;
  }
}

// lse and loss of each token from the statistics [n, 3, T] of n shards, summed in their order.
void combine(const float* gathered, const uint8_t* ignored, float z_loss, float* lse, float* loss,
             index_t shards, index_t tokens, int threads) {
#pragma omp parallel for num_threads(threads) if (shards * tokens > kValuesOfThread)
  for (index_t t = 0; t < tokens; ++t) {
    float reference = -INFINITY, total = 0.0f, target = 0.0f;
    for (index_t s = 0; s < shards; ++s) {
      const float own = gathered[3 * s * tokens + t];
      reference = own > reference ? own : reference;
    }
    for (index_t s = 0; s < shards; ++s) {
      const float* own = gathered + 3 * s * tokens + t;
      total += own[tokens] * std::exp(own[0] - reference);
      target += own[2 * tokens];
    }
    lse[t] = reference + std::log(total);
    const float extra = z_loss != 0.0f ? z_loss * lse[t] * lse[t] : 0.0f;
    loss[t] = ignored[t] ? 0.0f : lse[t] - target + extra;
  }
}

void input_term(const float* product, float* out, const float* reference, const float* lse,
                const E* weight, const index_t* rows, const float* target_scales,
                float target_scale, float z_loss, const float* shared, const float* gain,
                index_t tokens, index_t hidden, int threads) {
  input_term_as(product, out, reference, lse, weight, rows, target_scales, target_scale, z_loss,
                shared, gain, tokens, hidden, threads);
}

void input_term_rounded(const float* product, E* out, const float* reference, const float* lse,
                        const E* weight, const index_t* rows, const float* target_scales,
                        float target_scale, float z_loss, const float* shared, const float* gain,
                        index_t tokens, index_t hidden, int threads) {
  input_term_as(product, out, reference, lse, weight, rows, target_scales, target_scale, z_loss,
                shared, gain, tokens, hidden, threads);
}

void scale(const E* x, const float* factor, const float* reference, const float* lse, float z_loss,
           E* out, index_t tokens, index_t hidden, int threads) {
  scale_from(x, factor, reference, lse, z_loss, out, tokens, hidden, threads);
}

void scale_rounded(const float* x, const float* factor, const float* reference, const float* lse,
                   float z_loss, E* out, index_t tokens, index_t hidden, int threads) {
  scale_from(x, factor, reference, lse, z_loss, out, tokens, hidden, threads);
}

// grad[row] -= x * factor * target_scale for each token with a row here, in the order of tokens.
void subtract_targets(float* grad, const E* x, const index_t* rows, const float* factor,
                      const float* target_scales, float target_scale, index_t tokens,
                      index_t hidden, int threads) {
#pragma omp parallel for num_threads(threads) if (tokens * hidden > kValuesOfThread)
  for (index_t left = 0; left < hidden; left += kColumns) {  // two tokens may have the same row
    const index_t width = hidden - left < kColumns ? hidden - left : kColumns;
    for (index_t t = 0; t < tokens; ++t) {
      if (rows[t] < 0) continue;
      const float own = factor[t] * (target_scales ? target_scales[t] : target_scale);
      float* to = grad + rows[t] * hidden + left;
      const E* from = x + t * hidden + left;
#pragma omp simd
      for (index_t i = 0; i < width; ++i) to[i] -= load(from[i]) * own;
    }
  }
}

// Each row of the accumulator is multiplied by `keep`, and addend * scale is added.  Both are
// factors of rows, null for 1; the stride of `scale` may be 0.  `assigns`: the accumulator was 0.
void accumulate(float* accumulator, const E* addend, const float* keep, const float* scale,
                index_t scale_stride, int assigns, index_t rows, index_t columns, int threads) {
#pragma omp parallel for num_threads(threads) if (rows * columns > kValuesOfThread)
  for (index_t r = 0; r < rows; ++r) {
    float* to = accumulator + r * columns;
    const E* from = addend + r * columns;
    const float kept = keep ? keep[r] : 1.0f, factor = scale ? scale[r * scale_stride] : 1.0f;
    if (assigns) {
#pragma omp simd
      for (index_t i = 0; i < columns; ++i) to[i] = load(from[i]) * factor;
    } else {
#pragma omp simd
      for (index_t i = 0; i < columns; ++i) to[i] = to[i] * kept + load(from[i]) * factor;
    }
  }
}

// The accumulator [rows, columns] grows by addend^T * scale, for an addend [columns, rows] with
// `stride` values from row to row; `scale` null is 1.
void accumulate_transposed(float* accumulator, const E* addend, const float* scale, index_t stride,
                           index_t rows, index_t columns, int threads) {
  const float factor = scale ? *scale : 1.0f;
#pragma omp parallel for num_threads(threads) if (rows * columns > kValuesOfThread)
  for (index_t first = 0; first < rows; first += kTile) {
    const index_t height = rows - first < kTile ? rows - first : kTile;
    for (index_t left = 0; left < columns; left += kTile) {
      const index_t width = columns - left < kTile ? columns - left : kTile;
      E turned[kTile * kTile];
      transpose(addend + left * stride + first, stride, width, height, turned);
      for (index_t r = 0; r < height; ++r) {
        float* to = accumulator + (first + r) * columns + left;
        const E* from = turned + r * kTile;
#pragma omp simd
        for (index_t c = 0; c < width; ++c) to[c] += load(from[c]) * factor;
      }
    }
  }
}

}  // extern "C"
