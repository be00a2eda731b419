// Vectors of the instruction set that a kernel file is compiled for (GCC/Clang vector extensions).
//
// Kernel files are compiled once per instruction set, in namespace flmoe::FLMOE_ISA, and use no
// templates of the standard library: the linker keeps only one copy of those, which may be compiled
// for any instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/types.h"

namespace flmoe::FLMOE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kMaxPanelVectors = 4;  // 6 x 4 accumulators leave 8 of 32 registers for operands
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kMaxPanelVectors = 2;  // 6 x 2 accumulators leave 4 of 16
#elif defined(__aarch64__)  // NEON, which every such processor has: this is its baseline
constexpr int kVectorBytes = 16;
constexpr int kMaxPanelVectors = 4;  // as for AVX-512
#else
constexpr int kVectorBytes = 16;
constexpr int kMaxPanelVectors = 2;
#endif

using VecF __attribute__((vector_size(kVectorBytes))) = float;
using VecD __attribute__((vector_size(kVectorBytes))) = double;
using VecI32 __attribute__((vector_size(kVectorBytes))) = int32_t;
using VecI64 __attribute__((vector_size(kVectorBytes))) = int64_t;

template <typename A>
struct Simd;
template <>
struct Simd<float> {
  using Vec = VecF;
  using Int = VecI32;
  using Lane = int32_t;
};
template <>
struct Simd<double> {
  using Vec = VecD;
  using Int = VecI64;
  using Lane = int64_t;
};
template <typename A>
using Vec = typename Simd<A>::Vec;
template <typename A>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
inline Vec<A> splat(A x) {
  return x - Vec<A>{};  // x - 0 is x for every x, so this is one broadcast
}

template <typename A>
inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

template <typename A>
inline void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

// Reductions combine halves, quarters, .. of the vector. They take no address of it, which would
// keep it in memory in the loop that fills it.
template <typename A, typename F>
inline A reduce(Vec<A> v, const F& combine) {
  constexpr int n = kLanes<A>;
#pragma GCC unroll 4
  for (int step = n / 2; step > 0; step /= 2) {
#if defined(__clang__)
    Vec<A> other;
    for (int k = 0; k < n; ++k) other[k] = v[k ^ step];
#else
    typename Simd<A>::Int index;
    for (int k = 0; k < n; ++k) index[k] = k ^ step;
    const Vec<A> other = __builtin_shuffle(v, index);
#endif
    v = combine(v, other);
  }
  return v[0];
}

template <typename A>
inline A sum_lanes(Vec<A> v) {
  return reduce<A>(v, [](Vec<A> x, Vec<A> y) { return x + y; });
}

// The largest lane. NaN if all lanes are NaN; a single one may be passed over.
template <typename A>
inline A max_lanes(Vec<A> v) {
  return reduce<A>(v, [](Vec<A> x, Vec<A> y) { return x > y ? x : y; });
}

// Inner product, summed in vector lanes.
template <typename A>
inline A dot_of(const A* x, const A* y, int64_t n) {
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += x[i] * y[i];
  return total;
}

// The larger of two values in every lane. Where one of them is NaN, the result is y.
template <typename A>
inline Vec<A> max_vec(Vec<A> x, Vec<A> y) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return (Vec<A>)_mm512_maskz_max_ps(0xffff, (__m512)x, (__m512)y);
  else
    return (Vec<A>)_mm512_maskz_max_pd(0xff, (__m512d)x, (__m512d)y);
#else
  return x > y ? x : y;
#endif
}

// Keeps the lanes whose bit is set, in lane order from the lowest bit, and sets the others to 0.
template <typename A>
inline Vec<A> keep_lanes(Vec<A> v, uint32_t bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4)
    return (Vec<A>)_mm512_maskz_mov_ps(static_cast<__mmask16>(bits), (__m512)v);
  else
    return (Vec<A>)_mm512_maskz_mov_pd(static_cast<__mmask8>(bits), (__m512d)v);
#else
  using Int = typename Simd<A>::Int;
  using Lane = typename Simd<A>::Lane;
  static constexpr Lane kLaneBit[16] = {1,   2,   4,    8,    16,   32,   64,    128,
                                        256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  Int lane_bit;
  std::memcpy(&lane_bit, kLaneBit, sizeof lane_bit);
  return ((lane_bit & static_cast<Lane>(bits)) != 0) ? v : Vec<A>{};
#endif
}

// 1 / x to one unit in the last place, for normal x whose reciprocal is normal. A division of 16
// lanes takes up to three times as long.
inline VecF reciprocal(VecF x) {
#if defined(__AVX512F__)
  const VecF y = (VecF)_mm512_maskz_rcp14_ps(0xffff, (__m512)x);
  return y * (2.0f - x * y);
#else
  return 1.0f / x;
#endif
}

inline VecD reciprocal(VecD x) {
  return 1.0 / x;
}

// exp(x) for x <= 0, to one unit in the last place; 0 below -87.3, NaN stays NaN. Valid up to x
// = 87.
inline VecF exp_nonpositive(VecF x) {
  // Adding 1.5 * 2^23 rounds to the nearest integer, and leaves it in the lowest bits of the sum.
  // Plus the bias of the exponent: shifted by the mantissa's length, the sum is 2^n.
  const VecF magic = splat(12582912.0f + 127.0f);
  const VecF biased = x * 1.44269504f + magic;
  const VecF n = biased - magic;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VecF y = splat(1.381446685e-3f);
  y = y * r + 8.368780418e-3f;
  y = y * r + 4.166839422e-2f;
  y = y * r + 1.666652011e-1f;
  y = y * r + 4.999999341e-1f;
  y = y * (r * r) + r + 1.0f;
  const VecF power = (VecF)((VecI32)biased << 23);
  return x < splat(-87.33654f) ? VecF{} : y * power;
}

inline VecD exp_nonpositive(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Standard normal distribution function and density of x: GELU(x) = x * cdf, GELU'(x) = cdf + x *
// pdf. cdf(-|x|) = exp(-x^2/2) P(s) with s = 1 / (1 + 0.42 |x| / sqrt 2) and P fitted to half the
// scaled complementary error function with a relative error of 4e-8.
inline void normal_cdf_pdf(VecF x, VecF* cdf, VecF* pdf) {
  const VecF negative = (VecF)((VecI32)x | (VecI32)splat(-0.0f));  // -|x|
  const VecF s = reciprocal(1.0f - max_vec<float>(splat(-40.0f), negative) * 0.29698485f);
  VecF p = splat(3.9192338935e-2f);
  p = p * s - 1.784637945e-1f;
  p = p * s + 2.5513985535e-1f;
  p = p * s - 1.015742501e-1f;
  p = p * s + 1.570843919e-1f;
  p = p * s + 8.86612632e-2f;
  p = p * s + 1.2178355445e-1f;
  p = p * s + 1.181637223e-1f;
  p = p * s + 1.294967076e-5f;
  const VecF bell = exp_nonpositive(x * x * -0.5f);
  const VecF tail = bell * p;
  *cdf = x < 0.0f ? tail : 1.0f - tail;
  *pdf = bell * 0.39894228f;
}

inline void normal_cdf_pdf(VecD x, VecD* cdf, VecD* pdf) {
  for (int i = 0; i < kLanes<double>; ++i) {
    (*cdf)[i] = 0.5 * std::erfc(-x[i] * 0.70710678118654752440);
    (*pdf)[i] = 0.39894228040143267794 * std::exp(-0.5 * x[i] * x[i]);
  }
}

// ---- conversion between stored and computed types ----

inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

#if defined(__F16C__)
inline float to_float(Float16 x) {
  return _cvtsh_ss(x.bits);
}
#elif defined(__aarch64__)
inline float to_float(Float16 x) {
  __fp16 half;
  std::memcpy(&half, &x, sizeof half);
  return half;
}
#else
// Without the instruction: moves the bits of half precision, then scales by 2^112, the difference
// of the exponents' biases; this is exact and turns subnormals into normal numbers.
inline float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float magnitude;
  std::memcpy(&magnitude, &bits, 4);
  magnitude *= 5.192296858534828e33f;
  std::memcpy(&bits, &magnitude, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000u;  // infinity or NaN
  bits |= sign;
  std::memcpy(&magnitude, &bits, 4);
  return magnitude;
}
#endif

inline void from_float(float f, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if (f != f) {
    out->bits = 0x7fc0;
  } else {
    out->bits = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
}

#if defined(__F16C__)
inline void from_float(float f, Float16* out) {
  out->bits = _cvtss_sh(f, 0);
}
#elif defined(__aarch64__)
inline void from_float(float f, Float16* out) {
  const auto half = static_cast<__fp16>(f);
  std::memcpy(out, &half, sizeof half);
}
#else
inline void from_float(float f, Float16* out) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffffu;
  uint32_t half;
  if (bits > 0x7f800000u) {
    half = 0x7e00;  // NaN
  } else if (bits >= 0x477ff000u) {
    half = 0x7c00;  // rounds to infinity
  } else if (bits < 0x38800000u) {
    // Subnormal: adding 1/2 lines the unit of half precision's subnormals up with float's last bit.
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&half, &magnitude, 4);
    half -= 0x3f000000u;
  } else {
    half = (bits - 0x38000000u + 0xfff + ((bits >> 13) & 1)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}
#endif

// Storage types and their compute types.
template <typename T>
struct Compute {
  using Type = float;
};
template <>
struct Compute<double> {
  using Type = double;
};

template <typename T, typename A>
inline A read(const T* p) {
  if constexpr (sizeof(T) == sizeof(A)) {
    return *p;
  } else {
    return to_float(*p);
  }
}

template <typename T, typename A>
inline void write(T* p, A x) {
  if constexpr (sizeof(T) == sizeof(A)) {
    *p = x;
  } else {
    from_float(x, p);
  }
}

// Whole vectors of a row in half precision, whose conversions the compiler does not vectorise;
// return the number of values converted. Other types have none.
template <typename T, typename A>
inline int64_t read_vectors(const T*, A*, int64_t) {
  return 0;
}
template <typename T, typename A>
inline int64_t write_vectors(const A*, T*, int64_t) {
  return 0;
}
#if defined(__F16C__)
inline int64_t read_vectors(const Float16* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    __m128i half;
    std::memcpy(&half, in + i, sizeof half);
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
  }
  return i;
}
inline int64_t write_vectors(const float* in, Float16* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0);
    std::memcpy(out + i, &half, sizeof half);
  }
  return i;
}
#elif defined(__aarch64__)
inline int64_t read_vectors(const Float16* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    float16x4_t half;
    std::memcpy(&half, in + i, sizeof half);
    vst1q_f32(out + i, vcvt_f32_f16(half));
  }
  return i;
}
inline int64_t write_vectors(const float* in, Float16* out, int64_t n) {
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    const float16x4_t half = vcvt_f16_f32(vld1q_f32(in + i));
    std::memcpy(out + i, &half, sizeof half);
  }
  return i;
}
#endif

// n values from storage to the compute type.
template <typename T, typename A>
inline void read_row(const T* in, A* out, int64_t n) {
  for (int64_t i = read_vectors(in, out, n); i < n; ++i) out[i] = read<T, A>(in + i);
}

template <typename T, typename A>
inline void write_row(const A* in, T* out, int64_t n) {
  for (int64_t i = write_vectors(in, out, n); i < n; ++i) write<T, A>(out + i, in[i]);
}

#if defined(__clang__)
constexpr bool kHasTranspose = false;
template <typename A>
inline void transpose_square(Vec<A>*) {}
#else
constexpr bool kHasTranspose = true;
// Transposes kLanes vectors, the rows of a square matrix, in place: halves, quarters, .. are
// swapped.
template <typename A>
inline void transpose_square(Vec<A>* rows) {
  using Int = typename Simd<A>::Int;
  constexpr int n = kLanes<A>;
#pragma GCC unroll 8
  for (int step = n / 2; step > 0; step /= 2) {
    Int low, high;
    for (int k = 0; k < n; ++k) {
      low[k] = (k & step) == 0 ? k : n + k - step;
      high[k] = (k & step) == 0 ? k + step : n + k;
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if ((i & step) != 0) continue;
      const Vec<A> x = rows[i], y = rows[i + step];
      rows[i] = __builtin_shuffle(x, y, low);
      rows[i + step] = __builtin_shuffle(x, y, high);
    }
  }
}
#endif

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
inline int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}

}  // namespace flmoe::FLMOE_ISA
