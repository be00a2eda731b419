// Helpers of pair_moe's kernels: packing of valid tokens, and the gate of a tile.
//
// A tile is kPairTile rows (side a) by up to kPairBlock columns (side b) of logits for every
// expert, computed by the register-tiled product from packed q and transposed k. Masked tokens are
// not packed, so they are neither read nor computed. The softmax runs over the experts, lane by
// lane, so the gate of a vector of pairs needs no exchange between lanes.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/gemm.h"
#include "cpu/kernels/entry.h"
#if defined(__AVX512DQ__)
#include <immintrin.h>
#endif

namespace flmoe::FLMOE_ISA {

constexpr int64_t kPairBlock = 128;
constexpr int64_t kPairTile = 24;  // 4 experts x 24 x 128 floats stay in 48 KiB

// kind -> (s1, s2, s3); the positions are those of KINDS in flmoe_kernels/ops/pair_moe/kinds.py.
struct Message {
  double a, c, product;
};
constexpr Message kMessages[kPairKinds] = {
    {1, 0, 0}, {0, 1, 0}, {0, 0, 1}, {0.5, 0.5, 0}, {0, 0, 0}};
// The kernels make the product or the sum of a message, never both.
constexpr bool one_form(const Message& m) {
  return m.product == 0 || (m.a == 0 && m.c == 0);
}
static_assert(one_form(kMessages[0]) && one_form(kMessages[1]) && one_form(kMessages[2]) &&
              one_form(kMessages[3]) && one_form(kMessages[4]));

// Sets of experts, one bit each.
struct ExpertSets {
  uint32_t products =
      0;                 // the message from side b varies with the row: a product per row is needed
  uint32_t columns = 0;  // it is the same for all rows: the columns' mass is enough
  uint32_t synergy = 0;

  ExpertSets(const PairArgs& in, PairReduce reduce) {
    for (int64_t e = 0; e < in.experts; ++e) {
      const Message& message = kMessages[in.kinds[e]];
      const bool varies = message.product != 0 || reduce != PairReduce::kPool;
      if (message.product != 0) synergy |= 1u << e;
      if (message.product != 0 || (message.c != 0 && varies)) products |= 1u << e;
      if (message.c != 0 && !varies) columns |= 1u << e;
    }
  }
};
inline bool has(uint32_t set, int64_t e) {
  return (set >> e & 1u) != 0;
}

template <typename T>
inline const T* token(const RowView& view, int64_t b, int64_t e, int64_t i) {
  return static_cast<const T*>(view.data) + b * view.group_stride + e * view.head_stride +
         i * view.row_stride;
}

// Positions in [first, last) whose mask byte is set; all of them without a mask.
inline int64_t valid_tokens(const uint8_t* mask, int64_t first, int64_t last, int64_t* out) {
  int64_t count = 0;
  for (int64_t i = first; i < last; ++i)
    if (mask == nullptr || mask[i]) out[count++] = i;
  return count;
}

// Tokens of one side as rows in the compute type, for every expert.
template <typename A>
struct Rows {
  A* data;
  int64_t expert, row;  // strides
  A* at(int64_t e, int64_t i) const { return data + e * expert + i * row; }
};

// Whether rows need no copy: nothing to leave out, to convert or to pad to whole vectors.
template <typename T, typename A>
inline bool in_place(const uint8_t* mask, int64_t width) {
  return sizeof(T) == sizeof(A) && mask == nullptr && width % kLanes<A> == 0;
}

// count tokens of the experts in `wanted`, copied to experts x count x padded, zero padded, unless
// they can be read in place.
template <typename T, typename A>
inline Rows<const A> rows_of(const PairArgs& in, const RowView& view, const uint8_t* mask,
                             uint32_t wanted, int64_t b, const int64_t* index, int64_t count,
                             int64_t width, A* copy) {
  if constexpr (sizeof(T) == sizeof(A))
    if (in_place<T, A>(mask, width))
      return {token<A>(view, b, 0, count > 0 ? index[0] : 0), view.head_stride, view.row_stride};
  const int64_t padded = round_up(width, kLanes<A>);
  const Rows<A> rows{copy, count * padded, padded};
  for (int64_t e = 0; e < in.experts; ++e)
    for (int64_t r = 0; r < count && has(wanted, e); ++r) {
      A* to = rows.at(e, r);
      read_row<T, A>(token<T>(view, b, e, index[r]), to, width);
      for (int64_t d = width; d < padded; ++d) to[d] = 0;
    }
  return {copy, rows.expert, rows.row};
}
constexpr uint32_t kAllExperts = ~0u;

// count <= kPairBlock tokens of one expert into width x kPairBlock, scaled and zero padded to whole
// vectors.
template <typename T, typename A>
inline void gather_columns(const RowView& view, int64_t b, int64_t e, const int64_t* index,
                           int64_t count, int64_t width, A scale, A* out) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t r0 = 0; r0 < count; r0 += lanes) {
    const int64_t rows = min64(lanes, count - r0);
    const T* in[lanes];
    for (int64_t r = 0; r < lanes; ++r)
      in[r] = token<T>(view, b, e, index[r0 + (r < rows ? r : 0)]);
    int64_t d = 0;
    if constexpr (sizeof(T) == sizeof(A) && kHasTranspose) {
      for (; d + lanes <= width; d += lanes) {
        Vec<A> square[lanes];
        for (int64_t r = 0; r < lanes; ++r) std::memcpy(&square[r], in[r] + d, sizeof square[r]);
        transpose_square<A>(square);
        for (int64_t r = 0; r < lanes; ++r)
          store(out + (d + r) * kPairBlock + r0, square[r] * scale);
      }
    }
    for (; d < width; ++d)
      for (int64_t r = 0; r < lanes; ++r)
        out[d * kPairBlock + r0 + r] = read<T, A>(in[r] + d) * scale;
    for (int64_t r = rows; r < lanes; ++r)
      for (int64_t d = 0; d < width; ++d) out[d * kPairBlock + r0 + r] = 0;
  }
}

// One gated tile: [expert][row][column], columns contiguous.
constexpr int64_t kTileRow = kPairBlock;
constexpr int64_t kTileExpert = kPairTile * kPairBlock;

// 2^x for x <= 0, to one unit in the last place; 0 below -126, where results would be subnormal
// and slow; NaN stays NaN. The gate's logits are in units of ln 2, because this costs half of exp.
inline VecF gate_exp(VecF x) {
#if defined(__AVX512DQ__)
  const VecF r = (VecF)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const VecF magic = splat(12583039.0f);  // 1.5 * 2^23 + 127: adding it rounds, and adds the bias
  const VecF biased = x + magic;
  const VecF r = x - (biased - magic);
#endif
  VecF y = splat(1.535336196e-4f);
  y = y * r + 1.339887502e-3f;
  y = y * r + 9.618436918e-3f;
  y = y * r + 5.550332367e-2f;
  y = y * r + 2.402264774e-1f;
  y = y * r + 6.931471825e-1f;
  y = y * r + 1.0f;
#if defined(__AVX512DQ__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (VecF)_mm512_maskz_scalef_ps(normal, (__m512)y, (__m512)(x - r));
#else
  y *= (VecF)((VecI32)biased << 23);
  return x < -126.0f ? VecF{} : y;
#endif
}

inline VecD gate_exp(VecD x) {
  return exp_nonpositive(x);
}

// Factor of logits before gate_exp.
template <typename A>
constexpr A kGateUnit = 1;
template <>
inline constexpr float kGateUnit<float> = 1.44269504f;

// The gate's unit is folded into k and the bias, but not with top_k: it could separate equal
// logits.
template <typename A>
inline A folded_unit(const PairArgs& in) {
  return in.top_k < in.experts ? A(1) : kGateUnit<A>;
}

template <typename A>
inline void load_bias(const PairArgs& in, A* bias) {
  constexpr A kMost = std::numeric_limits<A>::max();
  for (int64_t e = 0; e < in.experts; ++e) {
    bias[e] = in.gate_bias ? static_cast<const A*>(in.gate_bias)[e] : A(0);
    // The unit must not make a finite bias infinite.
    if (std::isfinite(bias[e])) bias[e] = std::clamp(bias[e] * folded_unit<A>(in), -kMost, kMost);
  }
}

// Converts logits (see folded_unit) of a vector of pairs to probabilities over E experts, in place.
template <typename A, int E, bool kTopK>
inline void gate(Vec<A>* x, int64_t top_k) {
  using Int = typename Simd<A>::Int;
  using Lane = typename Simd<A>::Lane;
  Int rank[E] = {};
  if constexpr (kTopK) {
    // Number of experts that come first: a larger logit, or an equal logit and a lower index.
#pragma GCC unroll 8
    for (int e = 1; e < E; ++e)
#pragma GCC unroll 8
      for (int f = 0; f < e; ++f) {
        rank[e] -= (Int)(x[f] >= x[e]);
        rank[f] -= (Int)(x[e] > x[f]);
      }
#pragma GCC unroll 8
    for (int e = 0; e < E; ++e)
      x[e] = (rank[e] < static_cast<Lane>(top_k)) ? x[e] : splat(A(-INFINITY));
  }
  Vec<A> top = x[0];
#pragma GCC unroll 8
  for (int e = 1; e < E; ++e) top = x[e] > top ? x[e] : top;
  // NaN in one logit makes all of the pair's probabilities NaN through the sum, as in a softmax.
  Vec<A> total = {};
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e) {
    x[e] -= top;
    if constexpr (kTopK) x[e] *= kGateUnit<A>;
    x[e] = gate_exp(x[e]);
    total += x[e];
  }
  const Vec<A> share = reciprocal(total);
#pragma GCC unroll 8
  for (int e = 0; e < E; ++e) {
    x[e] *= share;
    if constexpr (kTopK) x[e] = (rank[e] < static_cast<Lane>(top_k)) ? x[e] : Vec<A>{};
  }
}

// sums[j] += the sum over the rows of a tile, for whole vectors of columns.
template <typename A>
inline void add_columns(const A* tile, int64_t rows, int64_t columns, A* sums) {
  for (int64_t j = 0; j < columns; j += kLanes<A>) {
    Vec<A> sum = load(tile + j);
    for (int64_t i = 1; i < rows; ++i) sum += load(tile + i * kTileRow + j);
    store(sums + j, load(sums + j) + sum);
  }
}

// Keeps the first `count` lanes of a vector and sets the others to 0, whatever their values are.
template <typename A>
inline Vec<A> keep_first(Vec<A> x, int64_t count) {
  return keep_lanes<A>(x, count >= kLanes<A> ? 0xffffu : (1u << count) - 1u);
}

// Kernel::run<A, E, kTopK> for the number of experts of a call: the gate keeps one vector per
// expert in registers. Only this is compiled for every E, not the products around it.
template <typename Kernel, typename A>
inline auto for_experts(const PairArgs& args) {
  const bool top = args.top_k < args.experts;
  switch (args.experts) {
    case 1:
      return &Kernel::template run<A, 1, false>;
    case 2:
      return top ? &Kernel::template run<A, 2, true> : &Kernel::template run<A, 2, false>;
    case 3:
      return top ? &Kernel::template run<A, 3, true> : &Kernel::template run<A, 3, false>;
    case 4:
      return top ? &Kernel::template run<A, 4, true> : &Kernel::template run<A, 4, false>;
    case 5:
      return top ? &Kernel::template run<A, 5, true> : &Kernel::template run<A, 5, false>;
    case 6:
      return top ? &Kernel::template run<A, 6, true> : &Kernel::template run<A, 6, false>;
    case 7:
      return top ? &Kernel::template run<A, 7, true> : &Kernel::template run<A, 7, false>;
    default:
      return top ? &Kernel::template run<A, 8, true> : &Kernel::template run<A, 8, false>;
  }
}

// Splits the rows of a sample into work items: enough for many threads, but few enough that packing
// side b for each item stays cheap. Depends only on the shape, so results do not depend on threads.
struct RowBlocks {
  int64_t each = 0, count = 0;

  explicit RowBlocks(const PairArgs& in) {
    constexpr int64_t kItems = 16, kLeast = 3 * kPairTile, kMost = 16 * kPairTile;
    if (in.batch == 0 || in.rows == 0) return;
    const int64_t wanted = (kItems + in.batch - 1) / in.batch;
    const int64_t share = round_up((in.rows + wanted - 1) / wanted, kPairTile);
    each = share < kLeast ? kLeast : min64(share, kMost);
    count = (in.rows + each - 1) / each;
  }
};

}  // namespace flmoe::FLMOE_ISA
