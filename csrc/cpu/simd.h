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
#endif

#include "common/types.h"

namespace flmoe::FLMOE_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kMaxPanelVectors = 4;  // 6 x 4 accumulators leave 8 of 32 registers for operands
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
constexpr int kMaxPanelVectors = 2;  // 6 x 2 accumulators leave 4 of 16
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

// Reductions halve the vector until one lane is left.
template <typename A, int N>
struct Part {
  using Type __attribute__((vector_size(N * sizeof(A)))) = A;
};

template <typename A, int N, typename F>
inline A reduce(typename Part<A, N>::Type v, const F& combine) {
  if constexpr (N == 2) {
    const typename Part<A, 2>::Type swapped = {v[1], v[0]};
    return combine(v, swapped)[0];
  } else {
    typename Part<A, N / 2>::Type low, high;
    std::memcpy(&low, &v, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof low, sizeof high);
    return reduce<A, N / 2>(combine(low, high), combine);
  }
}

template <typename A>
inline A sum_lanes(Vec<A> v) {
  return reduce<A, kLanes<A>>(v, [](auto x, auto y) { return x + y; });
}

// The largest lane; NaN if any lane is NaN.
template <typename A>
inline A max_lanes(Vec<A> v) {
  return reduce<A, kLanes<A>>(v, [](auto x, auto y) { return ((x > y) | (x != x)) ? x : y; });
}

// Keeps the lanes whose bit is set, in lane order from the lowest bit, and sets the others to 0.
template <typename A>
inline Vec<A> keep_lanes(Vec<A> v, uint32_t bits) {
  using Int = typename Simd<A>::Int;
  using Lane = typename Simd<A>::Lane;
  static constexpr Lane kLaneBit[16] = {1,   2,   4,    8,    16,   32,   64,    128,
                                        256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
  Int lane_bit;
  std::memcpy(&lane_bit, kLaneBit, sizeof lane_bit);
  return ((lane_bit & static_cast<Lane>(bits)) != 0) ? v : Vec<A>{};
}

// exp(x) = y * 2^whole for x within the exponent's range: returns y, about 1, to one unit in the
// last place.
inline VecF exp_parts(VecF x, VecI32* whole) {
  const VecF magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const VecF biased = x * 1.44269504f + magic;
  const VecF n = biased - magic;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VecF y = splat(1.9875691500e-4f);
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  *whole = (VecI32)biased - (VecI32)magic;
  return y * (r * r) + r + 1.0f;
}

// 2^n by its exponent's bits, for n from -126 to 127.
inline VecF power_of_two(VecI32 n) {
  return (VecF)((n + 127) << 23);
}

constexpr float kExpLow = -87.33654f, kExpHigh = 88.72283f;

// exp; 0 below -87.3, inf above 88.7, NaN stays NaN.
inline VecF exp_vec(VecF x) {
  const VecF low = splat(kExpLow), high = splat(kExpHigh);
  VecF clamped = x < low ? low : x;
  clamped = clamped > high ? high : clamped;
  VecI32 whole;
  VecF y = exp_parts(clamped, &whole);
  // In two steps, so that n = 128 does not overflow.
  const VecI32 half = whole >> 1;
  y = y * power_of_two(half) * power_of_two(whole - half);
  y = x < low ? VecF{} : y;
  return x > high ? splat(INFINITY) : y;
}

// exp for x <= 0 (or NaN), where it can neither overflow nor need two steps to scale.
inline VecF exp_nonpositive(VecF x) {
  const VecF low = splat(kExpLow);
  VecI32 whole;
  const VecF y = exp_parts(x < low ? low : x, &whole);
  return x < low ? VecF{} : y * power_of_two(whole);
}

inline VecD exp_vec(VecD x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

inline VecD exp_nonpositive(VecD x) {
  return exp_vec(x);
}

// Standard normal distribution function and density of x: GELU(x) = x * cdf, GELU'(x) = cdf + x *
// pdf. cdf(-|x|) = exp(-x^2/2) P(s) / 2 with s = 1 / (1 + 0.42 |x| / sqrt 2) and P fitted to the
// scaled complementary error function with a relative error of 4e-8.
inline void normal_cdf_pdf(VecF x, VecF* cdf, VecF* pdf) {
  const VecF positive = x < 0.0f ? -x : x;
  const VecF s = 1.0f / (positive * 0.29698485f + 1.0f);
  VecF p = splat(7.838467787e-2f);
  p = p * s - 3.569275890e-1f;
  p = p * s + 5.102797107e-1f;
  p = p * s - 2.031485002e-1f;
  p = p * s + 3.141687838e-1f;
  p = p * s + 1.773225264e-1f;
  p = p * s + 2.435671089e-1f;
  p = p * s + 2.363274224e-1f;
  p = p * s + 2.589934152e-5f;
  const VecF bell = exp_vec(x * x * -0.5f);
  const VecF tail = bell * p * 0.5f;
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

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}
inline int64_t min64(int64_t a, int64_t b) {
  return a < b ? a : b;
}

}  // namespace flmoe::FLMOE_ISA
