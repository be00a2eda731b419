// Matrices packed into column panels as wide as the register tile; products with many rows read one
// operand in this form.
#pragma once

#include "cpu/gemm.h"
#include "cpu/kernels/entry.h"

namespace flmoe::FLMOE_ISA {

template <typename A>
constexpr int64_t kPanel = kMaxPanelVectors * kLanes<A>;

template <typename A>
int64_t panels_of(int64_t columns) {
  return (columns + kPanel<A> - 1) / kPanel<A>;
}

// Elements of one packed (depth x columns) matrix.
template <typename A>
int64_t packed_size(int64_t depth, int64_t columns) {
  return panels_of<A>(columns) * depth * kPanel<A>;
}

// (depth x columns) with element (k, n) at k * k_stride + n * n_stride, to panels [column
// block][k][kPanel].
template <typename T, typename A>
void pack_panel(const T* in, int64_t k_stride, int64_t n_stride, int64_t depth, int64_t columns,
                A* out) {
  for (int64_t k = 0; k < depth; ++k)
    for (int64_t n = columns; n < kPanel<A>; ++n) out[k * kPanel<A> + n] = 0;
  if (n_stride == 1) {
    for (int64_t k = 0; k < depth; ++k)
      read_row<T, A>(in + k * k_stride, out + k * kPanel<A>, columns);
    return;
  }
  constexpr int64_t lanes = kLanes<A>;
  int64_t deep = 0, wide = 0;  // the part that is transposed by shuffles
  if constexpr (sizeof(T) == sizeof(A) && kHasTranspose) {
    if (k_stride == 1) deep = depth / lanes * lanes, wide = columns / lanes * lanes;
    for (int64_t k0 = 0; k0 < deep; k0 += lanes)
      for (int64_t n0 = 0; n0 < wide; n0 += lanes) {
        Vec<A> square[lanes];
        for (int64_t i = 0; i < lanes; ++i)
          std::memcpy(&square[i], in + (n0 + i) * n_stride + k0, sizeof square[i]);
        transpose_square<A>(square);
        for (int64_t i = 0; i < lanes; ++i) store(out + (k0 + i) * kPanel<A> + n0, square[i]);
      }
  }
  constexpr int64_t kBlock = 16;  // reads whole cache lines of rows, writes a line at a time
  for (int64_t k0 = 0; k0 < depth; k0 += kBlock)
    for (int64_t n = k0 + kBlock <= deep ? wide : 0; n < columns; ++n)
      for (int64_t k = k0; k < min64(k0 + kBlock, depth); ++k)
        out[k * kPanel<A> + n] = read<T, A>(in + k * k_stride + n * n_stride);
}

}  // namespace flmoe::FLMOE_ISA
