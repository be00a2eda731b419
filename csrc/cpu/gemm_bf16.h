// Register-tiled product of bfloat16 operands with sums in float32 (vdpbf16ps).
//
// C (M x N) = or += A (M x K) B (K x N). Operands are read as pairs of neighbours in depth: A by
// its two strides, so rows with contiguous depth are read in place; B as pair rows, row p =
// (B[2p][0], B[2p+1][0], B[2p][1], ...). An odd depth ends with a pair whose second element is 0 in
// both operands. One instruction does twice the multiply-adds of float32.
#pragma once

#include "cpu/panels.h"

namespace flmoe::FLMOE_ISA {

constexpr int64_t kPair = 2;

inline int64_t pairs_of(int64_t depth) {
  return (depth + 1) / kPair;
}

// Strides are in elements; a_col is that of a pair.
struct PairSteps {
  using A = float;
  using E = BFloat16;
  using Row = VecI32;
  static constexpr int64_t kUnit = kPair;
  static Row column(const E* a) {
    int32_t pair;
    std::memcpy(&pair, a, sizeof pair);
    return pair - VecI32{};
  }
  static Row row(const E* b) {
    Row pairs;
    std::memcpy(&pairs, b, sizeof pairs);
    return pairs;
  }
};

#if defined(__AVX512BF16__)
struct NativeDot : PairSteps {
  static VecF add(VecF sum, VecI32 a, VecI32 b) {
    return (VecF)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// The exact arithmetic of the instruction, for tests: the second product first, fused steps rounded
// to nearest even, subnormal operands and sums are 0.
struct EmulatedDot : PairSteps {
  static float flushed(float x) {
    return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x;
  }
  static float element(int32_t pair, int place) {
    return flushed(to_float(BFloat16{static_cast<uint16_t>(pair >> (16 * place))}));
  }
  static VecF add(VecF sum, VecI32 a, VecI32 b) {
    for (int i = 0; i < kLanes<float>; ++i) {
      const float high = std::fma(element(a[i], 1), element(b[i], 1), flushed(sum[i]));
      sum[i] = flushed(std::fma(element(a[i], 0), element(b[i], 0), flushed(high)));
    }
    return sum;
  }
};

// One pair row: n elements of two rows alternate; the second is null after an odd depth. Elements
// up to `padded` are 0.
inline void interleave(const BFloat16* first, const BFloat16* second, int64_t n, int64_t padded,
                       BFloat16* __restrict out) {
  if (second == nullptr) {
    for (int64_t i = 0; i < n; ++i) out[kPair * i] = first[i], out[kPair * i + 1] = {0};
  } else {
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t pair = first[i].bits | static_cast<uint32_t>(second[i].bits) << 16;
      std::memcpy(out + kPair * i, &pair, sizeof pair);
    }
  }
  for (int64_t i = kPair * n; i < kPair * padded; ++i) out[i] = {0};
}

// B from its rows (depth x columns, `stride` apart) to pair rows of `padded` columns.
inline void pack_depth_rows(const BFloat16* in, int64_t stride, int64_t depth, int64_t columns,
                            int64_t padded, BFloat16* out) {
  for (int64_t k = 0; k < depth; k += kPair)
    interleave(in + k * stride, k + 1 < depth ? in + (k + 1) * stride : nullptr, columns, padded,
               out + k * padded);
}

#if defined(__AVX512BW__)
// Transposes 16 x 16 elements of 32 bits: rows of one vector each.
inline void transpose16(__m512i rows[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int high = 0; high < 2; ++high) {
      rows[i + 2 * high] = _mm512_unpacklo_epi64(t[i + high], t[i + high + 2]);
      rows[i + 2 * high + 1] = _mm512_unpackhi_epi64(t[i + high], t[i + high + 2]);
    }
  // Now part l (128 bits) of rows[4 g + c] is column 4 l + c of rows 4 g to 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i even0 = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0x88);
    const __m512i even1 = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0x88);
    const __m512i odd0 = _mm512_shuffle_i32x4(rows[c], rows[4 + c], 0xdd);
    const __m512i odd1 = _mm512_shuffle_i32x4(rows[8 + c], rows[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(even0, even1, 0x88);
    rows[4 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(even0, even1, 0xdd);
    rows[12 + c] = _mm512_shuffle_i32x4(odd0, odd1, 0xdd);
  }
}
#endif

// The same from rows of contiguous depth (columns x depth, `stride` apart), to pair rows `out_row`
// elements apart. padded: a multiple of 16.
inline void pack_depth_columns(const BFloat16* in, int64_t stride, int64_t depth, int64_t columns,
                               int64_t padded, int64_t out_row, BFloat16* out) {
#if defined(__AVX512BW__)
  constexpr int64_t kBlock = 16, kDepth = kPair * kBlock;
  for (int64_t n0 = 0; n0 < padded; n0 += kBlock)
    for (int64_t k0 = 0; k0 < depth; k0 += kDepth) {
      const int64_t rest = min64(kDepth, depth - k0);
      const auto mask = static_cast<__mmask32>((uint64_t{1} << rest) - 1);
      __m512i rows[kBlock];
      for (int64_t n = 0; n < kBlock; ++n)
        rows[n] = n0 + n < columns ? _mm512_maskz_loadu_epi16(mask, in + (n0 + n) * stride + k0)
                                   : _mm512_setzero_si512();
      transpose16(rows);
      for (int64_t k = 0; k < pairs_of(rest); ++k)
        std::memcpy(out + (k0 / kPair + k) * out_row + kPair * n0, &rows[k], sizeof rows[k]);
    }
#else
  for (int64_t n = 0; n < padded; ++n)
    for (int64_t k = 0; k < kPair * pairs_of(depth); ++k)
      out[k / kPair * out_row + kPair * n + k % kPair] =
          n < columns && k < depth ? in[n * stride + k] : BFloat16{0};
#endif
}

// A: rows of contiguous depth, copied to an even stride with 0 at the end of an odd depth.
inline void pack_even_rows(const BFloat16* in, int64_t stride, int64_t rows, int64_t depth,
                           BFloat16* out) {
  const int64_t even = kPair * pairs_of(depth);
  for (int64_t i = 0; i < rows; ++i) {
    std::memcpy(out + i * even, in + i * stride, depth * sizeof(BFloat16));
    if (even > depth) out[i * even + depth] = {0};
  }
}

#if defined(__AVX512BF16__)
inline void store_rounded(BFloat16* to, VecF v) {
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(to, &rounded, sizeof rounded);
}

// Operands in bfloat16, see PlainOperands; sums are in float32.
struct Bf16Operands {
  using T = BFloat16;
  using A = float;
  using E = BFloat16;
  static constexpr int64_t kUnit = kPair;

  static void gemm(int64_t m, int64_t n, int64_t depth, const E* a, int64_t a_row, int64_t a_col,
                   const E* b, int64_t b_row, A* c, int64_t c_row, bool add) {
    flmoe::FLMOE_ISA::gemm<NativeDot>(m, n, pairs_of(depth), a, a_row, a_col, b, b_row, c, c_row,
                                      add);
  }

  static void pack(const T* weight, int64_t stride, bool depth_is_rows, int64_t depth,
                   int64_t columns, E* out) {
    if (depth_is_rows)
      pack_depth_rows(weight, stride, depth, columns, kPanel<A>, out);
    else
      pack_depth_columns(weight, stride, depth, columns, kPanel<A>, kPair * kPanel<A>, out);
  }

  static void put(E* to, VecF v) { store_rounded(to, v); }

  // Rows, an even number of elements of `out` apart, as depth of an operand.
  static void put_depth(const E* rows, int64_t stride, int64_t count, int64_t columns, E* out,
                        int64_t out_stride) {
    for (int64_t r = 0; r < count; r += kPair)
      interleave(rows + r * stride, r + 1 < count ? rows + (r + 1) * stride : nullptr, columns,
                 columns, out + r * out_stride);
  }

  static void add_depth(const E* row, const A* factor, int64_t columns, A* __restrict sums) {
    const auto element = [](uint32_t bits) { return to_float(E{static_cast<uint16_t>(bits)}); };
    for (int64_t n = 0; n < columns; ++n) {
      uint32_t pair;
      std::memcpy(&pair, row + kPair * n, sizeof pair);
      sums[n] += factor[0] * element(pair) + factor[1] * element(pair >> 16);
    }
  }
};
#endif

// The entry point of tests: packs both operands as the kernels do.
template <typename Dot>
void run_product_bf16(const ProductBf16& args) {
  const int64_t pairs = pairs_of(args.depth), b_row = kPair * args.n_padded;
  const Buffer<BFloat16> a(kPair * pairs * args.m), b(pairs * b_row);
  if (args.depth_is_rows) {
    pack_depth_rows(args.a, args.m, args.depth, args.m, args.m, a);
    pack_depth_rows(args.b, args.n, args.depth, args.n, args.n_padded, b);
    gemm<Dot>(args.m, args.n_padded, pairs, a, kPair, kPair * args.m, b, b_row, args.c,
              args.n_padded, true);
  } else {
    pack_even_rows(args.a, args.depth, args.m, args.depth, a);
    pack_depth_columns(args.b, args.depth, args.depth, args.n, args.n_padded, b_row, b);
    gemm<Dot>(args.m, args.n_padded, pairs, a, kPair * pairs, kPair, b, b_row, args.c,
              args.n_padded, true);
  }
}

}  // namespace flmoe::FLMOE_ISA
