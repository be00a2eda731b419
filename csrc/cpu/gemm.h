// Register-tiled matrix product of all CPU kernels in this package.
//
// C (M x N) = or += A (M x K) B (K x N), all in the compute type. A has two strides, so that a
// transpose costs nothing; rows of B and C are contiguous, and the caller pads N to whole vectors.
// 6 rows x 4 vectors (AVX-512, NEON) keep 24 independent multiply-add chains in registers, enough
// to cover the latency of two FMA units; each loaded vector of B is used by 6 of them.
// With +=, the product is summed separately before it is added to C: over many calls, the rounding
// error grows with the length of a sum plus the number of sums, not with their product.
#pragma once

#include "cpu/simd.h"

namespace flmoe::FLMOE_ISA {

// Products of operands in the type of the sums, one step of the depth at a time.
template <typename Type>
struct PlainSteps {
  using A = Type;  // of sums
  using E = Type;  // of operands
  using Row = Vec<A>;
  static constexpr int64_t kUnit = 1;  // elements of the depth in a step
  static E column(const E* a) { return *a; }
  static Row row(const E* b) { return load(b); }
  static Vec<A> add(Vec<A> sum, E x, Row y) { return sum + x * y; }
};

// The steps of gemm<P>: P is the type of operands and sums, or a class like PlainSteps.
template <typename P>
struct Steps : P {};
template <>
struct Steps<float> : PlainSteps<float> {};
template <>
struct Steps<double> : PlainSteps<double> {};

template <typename S, int ROWS, int VECS>
inline void micro_gemm(int64_t depth, const typename S::E* a, int64_t a_row, int64_t a_col,
                       const typename S::E* b, int64_t b_row, typename S::A* c, int64_t c_row,
                       bool accumulate) {
  using A = typename S::A;
  Vec<A> acc[ROWS][VECS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) acc[i][v] = Vec<A>{};
  for (int64_t k = 0; k < depth; ++k) {
    typename S::Row row[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) row[v] = S::row(b + k * b_row + v * S::kUnit * kLanes<A>);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const auto x = S::column(a + i * a_row + k * a_col);
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) acc[i][v] = S::add(acc[i][v], x, row[v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) {
      A* to = c + i * c_row + v * kLanes<A>;
      store(to, accumulate ? load(to) + acc[i][v] : acc[i][v]);
    }
}

// All rows of one panel of VECS vectors.
template <typename S, int VECS, int ROWS>
inline void panel_gemm(int64_t m, int64_t depth, const typename S::E* a, int64_t a_row,
                       int64_t a_col, const typename S::E* b, int64_t b_row, typename S::A* c,
                       int64_t c_row, bool accumulate) {
  int64_t i = 0;
  for (; i + ROWS <= m; i += ROWS)
    micro_gemm<S, ROWS, VECS>(depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row,
                              accumulate);
  for (; i + 4 <= m; i += 4)
    micro_gemm<S, 4, VECS>(depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row,
                           accumulate);
  for (; i + 2 <= m; i += 2)
    micro_gemm<S, 2, VECS>(depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row,
                           accumulate);
  for (; i < m; ++i)
    micro_gemm<S, 1, VECS>(depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row,
                           accumulate);
}

// n is a multiple of kLanes<A>; depth is a number of steps, a_col and b_row are elements from one
// to the next. One copy per kernel file: inlining it into every caller is not faster and increases
// the compile time by half.
template <typename P, typename S = Steps<P>>
[[gnu::noinline]] void gemm(int64_t m, int64_t n, int64_t depth, const typename S::E* a,
                            int64_t a_row, int64_t a_col, const typename S::E* b, int64_t b_row,
                            typename S::A* c, int64_t c_row, bool accumulate) {
  using A = typename S::A;
  constexpr int64_t kWide = kMaxPanelVectors * kLanes<A>;
  int64_t j = 0;
  for (; j + kWide <= n; j += kWide)
    panel_gemm<S, kMaxPanelVectors, 6>(m, depth, a, a_row, a_col, b + S::kUnit * j, b_row, c + j,
                                       c_row, accumulate);
  if constexpr (kMaxPanelVectors > 2) {
    for (; j + 2 * kLanes<A> <= n; j += 2 * kLanes<A>)
      panel_gemm<S, 2, 12>(m, depth, a, a_row, a_col, b + S::kUnit * j, b_row, c + j, c_row,
                           accumulate);
  }
  for (; j < n; j += kLanes<A>)
    panel_gemm<S, 1, 12>(m, depth, a, a_row, a_col, b + S::kUnit * j, b_row, c + j, c_row,
                         accumulate);
}

}  // namespace flmoe::FLMOE_ISA
