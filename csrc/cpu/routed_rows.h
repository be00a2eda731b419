// Rows of routed_mlp: blocks of one expert's rows, packed weights, gathered tokens.
#pragma once

#include "cpu/panels.h"

namespace flmoe::FLMOE_ISA {

constexpr int64_t kRowBlock = 96;  // 16 register tiles

// Rows [first, first + count) of the permutation, all of one expert; at: the first one's row in
// scratch memory.
struct RowBlock {
  int64_t expert, first, count, at;
};

// In scratch memory, a block and an expert's rows start at a multiple of `unit`.
struct RowBlocks {
  Buffer<RowBlock> block;
  Buffer<int64_t> start;  // the row in scratch memory of an expert's first one
  int64_t threads, unit, count = 0, rows = 0;

  RowBlocks(int64_t most_rows, const RoutedArgs& in, int64_t row_unit)
      : block((most_rows / kRowBlock + in.experts) * 5 / 4 + 1),  // see add
        start(in.experts),
        threads(in.threads > 1 ? in.threads : 1),
        unit(row_unit) {}

  void clear() { count = rows = 0; }
  // Many rows: equal blocks, the same number for every thread.
  void add(int64_t expert, int64_t first, int64_t end) {
    const int64_t whole = (end - first + kRowBlock - 1) / kRowBlock;
    const int64_t blocks = whole < 4 * threads ? whole : round_up(whole, threads);
    const int64_t total = end - first;
    start[expert] = rows;
    // Rounded up, so that the last block has at most kRowBlock rows, too.
    const auto cut = [&](int64_t i) { return min64(round_up(total * i / blocks, unit), total); };
    for (int64_t i = 0; i < blocks; ++i)
      block[count++] = {expert, first + cut(i), cut(i + 1) - cut(i), rows + cut(i)};
    rows += round_up(total, unit);
  }
};

// Elements from row to row in scratch memory: room for two more columns, and an odd number of cache
// lines, so that the rows of a column lie in different sets of the cache.
template <typename A>
int64_t row_stride(int64_t columns) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A));
  return round_up(columns + 1, 2 * kLine) + kLine;
}

// The columns after those of an operand's row: the factor of the bias, and what pads the depth.
template <typename Product>
void end_row(typename Product::E* row, int64_t columns, typename Product::A factor) {
  write<typename Product::E, typename Product::A>(row + columns, factor);
  row[columns + 1] = {};
}

// A weight of the experts with rows, packed and shared by the threads. With a bias, it is one row
// deeper, and the other operand has a last column of ones. A null weight is not used.
template <typename Product>
struct PackedWeight {
  using T = typename Product::T;
  using A = typename Product::A;
  using E = typename Product::E;

  int64_t depth, padded_depth, size;  // of one expert
  Buffer<E> panels;

  // (rows x columns) per expert, `stride` apart; the transpose of what is stored, unless
  // depth_is_rows.
  PackedWeight(const RoutedArgs& in, const void* weight, int64_t stride, int64_t rows,
               int64_t columns, bool depth_is_rows, const void* bias = nullptr)
      : depth(rows + (bias != nullptr)),
        padded_depth(round_up(depth, Product::kUnit)),
        size(packed_size<A>(padded_depth, columns)),
        panels(weight == nullptr ? 0 : in.experts * size) {
    if (weight == nullptr) return;
    const int64_t blocks = panels_of<A>(columns);
    parallel_for(in.experts * blocks, in.threads, [&](int64_t item, int) {
      const int64_t e = item / blocks, n0 = item % blocks * kPanel<A>;
      if (in.offsets[e] == in.offsets[e + 1]) return;
      const int64_t count = min64(kPanel<A>, columns - n0);
      const T* from = static_cast<const T*>(weight) + e * stride + n0 * (depth_is_rows ? 1 : rows);
      E* to = panels + item * padded_depth * kPanel<A>;
      Product::pack(from, depth_is_rows ? columns : rows, depth_is_rows, rows, count, to);
      if (bias != nullptr)
        put_bias(static_cast<const T*>(bias) + e * columns + n0, rows, count, to);
    });
  }

  // Row `row` of a panel, and the padding after it.
  static void put_bias(const T* bias, int64_t row, int64_t count, E* panel) {
    const int64_t place = row % Product::kUnit;
    E* to = panel + (row - place) * kPanel<A>;
    for (int64_t n = 0; n < kPanel<A>; ++n) {
      for (int64_t i = place; i < Product::kUnit; ++i) to[Product::kUnit * n + i] = {};
      if (n < count) to[Product::kUnit * n + place] = read<T, E>(bias + n);
    }
  }

  // The panel that starts at a column.
  const E* panel(int64_t expert, int64_t column) const {
    return panels + expert * size + column * padded_depth;
  }
};

// The packed weights of one direction: forward w_in, w_out and w_gate, backward w_out, w_in and
// w_gate.
template <typename Product>
struct RoutedWeights {
  PackedWeight<Product> first, second, gate;
};

// Calls body(column, columns) for every panel of a matrix with this number of columns.
template <typename A, typename F>
void each_panel(int64_t columns, const F& body) {
  for (int64_t n = 0; n < columns; n += kPanel<A>) body(n, min64(kPanel<A>, columns - n));
}

// out (rows x columns, padded to whole vectors) = in (rows x depth) times a panel, or is increased
// by it.
template <typename Product>
void times_panel(const typename Product::E* in, int64_t in_stride, int64_t rows, int64_t depth,
                 const typename Product::E* panel, int64_t columns, typename Product::A* out,
                 int64_t out_stride, bool accumulate = false) {
  using A = typename Product::A;
  constexpr int64_t kUnit = Product::kUnit;
  Product::gemm(rows, round_up(columns, kLanes<A>), depth, in, in_stride, kUnit, panel,
                kUnit * kPanel<A>, out, out_stride, accumulate);
}

// Rows as operands, with the factor of the bias.
template <typename Product>
void gather_tokens(const RoutedArgs& in, const void* source, const RowBlock& block,
                   typename Product::E* out) {
  using T = typename Product::T;
  using E = typename Product::E;
  const int64_t stride = row_stride<E>(in.width);
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t token = in.permutation[block.first + r] / in.choices;
    read_row<T, E>(static_cast<const T*>(source) + token * in.width, out + r * stride, in.width);
    end_row<Product>(out + r * stride, in.width, 1);
  }
}

// The first of the rows [first, end), in ascending order of the permutation, whose position is at
// least `position`.
inline int64_t find_row(const int32_t* permutation, int64_t first, int64_t end, int64_t position) {
  while (first < end) {
    const int64_t middle = first + (end - first) / 2;
    if (permutation[middle] < position)
      first = middle + 1;
    else
      end = middle;
  }
  return first;
}

// Calls body.template operator()<whether the experts are gated>().
template <typename F>
void with_gate(const RoutedArgs& in, const F& body) {
  if (in.w_gate != nullptr)
    body.template operator()<true>();
  else
    body.template operator()<false>();
}

}  // namespace flmoe::FLMOE_ISA
