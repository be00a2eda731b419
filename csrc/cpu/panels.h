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

// Operands of products in the compute type. A product gives the type T of arguments, the type A of
// sums and the type E of operands. The depth of an operand is padded to a multiple of kUnit;
// element (k, n) of one with rows of b_row / kUnit columns starts at k / kUnit * b_row + kUnit * n.
template <typename Storage>
struct PlainOperands {
  using T = Storage;
  using A = typename Compute<T>::Type;
  using E = A;
  static constexpr int64_t kUnit = 1;

  static void gemm(int64_t m, int64_t n, int64_t depth, const E* a, int64_t a_row, int64_t a_col,
                   const E* b, int64_t b_row, A* c, int64_t c_row, bool add) {
    flmoe::FLMOE_ISA::gemm<A>(m, n, depth, a, a_row, a_col, b, b_row, c, c_row, add);
  }

  // One panel of a weight, whose rows (or, with depth_is_rows, columns) are columns of B.
  static void pack(const T* weight, int64_t stride, bool depth_is_rows, int64_t depth,
                   int64_t columns, E* out) {
    pack_panel<T, A>(weight, depth_is_rows ? stride : 1, depth_is_rows ? 1 : stride, depth, columns,
                     out);
  }

  static void put(E* to, Vec<A> v) { store(to, v); }

  // Writes rows in the layout of an operand whose depth runs over rows; here nothing to do.
  static void put_depth(const E*, int64_t, int64_t, int64_t, E*, int64_t) {}

  // sums += kUnit rows of the depth, each times its factor.
  static void add_depth(const E* row, const A* factor, int64_t columns, A* sums) {
    for (int64_t n = 0; n < columns; ++n) sums[n] += factor[0] * row[n];
  }
};

}  // namespace flmoe::FLMOE_ISA
