// The register-tiled matrix product under every CPU kernel of this package.
//
// C (M x N) = or += A (M x K) B (K x N), all in the compute type. A is read through two strides, so
// that a transpose costs nothing; rows of B and C are contiguous and N is padded to whole vectors
// by the caller. 6 rows x 4 vectors (AVX-512) keep 24 independent multiply-add chains in registers,
// enough to cover the latency of two FMA units; each loaded vector of B feeds 6 of them.
// What is accumulated is a sum of its own first: sums over many calls are sums of sums, whose
// rounding grows with the length of each and with their number, not with their product.
#pragma once

#include "cpu/simd.h"

namespace flmoe::FLMOE_ISA {

template <typename A, int ROWS, int VECS>
inline void micro_gemm(int64_t depth, const A* a, int64_t a_row, int64_t a_col, const A* b,
                       int64_t b_row, A* c, int64_t c_row, bool accumulate) {
  Vec<A> acc[ROWS][VECS];
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) acc[i][v] = Vec<A>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> row[VECS];
#pragma GCC unroll 4
    for (int v = 0; v < VECS; ++v) row[v] = load(b + k * b_row + v * kLanes<A>);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      const A x = a[i * a_row + k * a_col];
#pragma GCC unroll 4
      for (int v = 0; v < VECS; ++v) acc[i][v] += x * row[v];
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
template <typename A, int VECS, int ROWS>
inline void panel_gemm(int64_t m, int64_t depth, const A* a, int64_t a_row, int64_t a_col,
                       const A* b, int64_t b_row, A* c, int64_t c_row, bool accumulate) {
  int64_t i = 0;
  for (; i + ROWS <= m; i += ROWS)
    micro_gemm<A, ROWS, VECS>(depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row,
                              accumulate);
  for (; i + 4 <= m; i += 4)
    micro_gemm<A, 4, VECS>(depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row,
                           accumulate);
  for (; i + 2 <= m; i += 2)
    micro_gemm<A, 2, VECS>(depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row,
                           accumulate);
  for (; i < m; ++i)
    micro_gemm<A, 1, VECS>(depth, a + i * a_row, a_row, a_col, b, b_row, c + i * c_row, c_row,
                           accumulate);
}

// n is a multiple of kLanes<A>. One copy per kernel file: inlined into every caller it is no faster
// and takes half as long again to compile.
template <typename A>
[[gnu::noinline]] void gemm(int64_t m, int64_t n, int64_t depth, const A* a, int64_t a_row,
                            int64_t a_col, const A* b, int64_t b_row, A* c, int64_t c_row,
                            bool accumulate) {
  constexpr int64_t kWide = kMaxPanelVectors * kLanes<A>;
  int64_t j = 0;
  for (; j + kWide <= n; j += kWide)
    panel_gemm<A, kMaxPanelVectors, 6>(m, depth, a, a_row, a_col, b + j, b_row, c + j, c_row,
                                       accumulate);
  if constexpr (kMaxPanelVectors > 2) {
    for (; j + 2 * kLanes<A> <= n; j += 2 * kLanes<A>)
      panel_gemm<A, 2, 12>(m, depth, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate);
  }
  for (; j < n; j += kLanes<A>)
    panel_gemm<A, 1, 12>(m, depth, a, a_row, a_col, b + j, b_row, c + j, c_row, accumulate);
}

}  // namespace flmoe::FLMOE_ISA
