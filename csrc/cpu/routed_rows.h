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

struct RowBlocks {
  Buffer<RowBlock> block;
  int64_t threads, count = 0, rows = 0;

  RowBlocks(int64_t most_rows, const RoutedArgs& in)
      : block((most_rows / kRowBlock + in.experts) * 5 / 4 + 1),  // see add
        threads(in.threads > 1 ? in.threads : 1) {}

  void clear() { count = rows = 0; }
  // Many rows: equal blocks, the same number for every thread.
  void add(int64_t expert, int64_t first, int64_t end) {
    const int64_t whole = (end - first + kRowBlock - 1) / kRowBlock;
    const int64_t blocks = whole < 4 * threads ? whole : round_up(whole, threads);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t from = first + (end - first) * i / blocks;
      const int64_t size = first + (end - first) * (i + 1) / blocks - from;
      block[count++] = {expert, from, size, rows};
      rows += size;
    }
  }
};

// Elements from row to row in scratch memory: room for one more column, and an odd number of cache
// lines, so that the rows of a column lie in different sets of the cache.
template <typename A>
int64_t row_stride(int64_t columns) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A));
  return round_up(columns + 1, 2 * kLine) + kLine;
}

// A weight of the experts with rows, packed and shared by the threads. With a bias, it is one row
// deeper, and the other operand has a last column of ones. A null weight is not used.
template <typename T, typename A>
struct PackedWeight {
  int64_t depth, size;  // of one expert
  Buffer<A> panels;

  // (rows x columns) per expert; element (k, n) of expert e lies at e * stride + k * ks + n * ns.
  PackedWeight(const RoutedArgs& in, const void* weight, int64_t stride, int64_t rows,
               int64_t columns, int64_t ks, int64_t ns, const void* bias = nullptr)
      : depth(rows + (bias != nullptr)),
        size(packed_size<A>(depth, columns)),
        panels(weight == nullptr ? 0 : in.experts * size) {
    if (weight == nullptr) return;
    const int64_t blocks = panels_of<A>(columns);
    parallel_for(in.experts * blocks, in.threads, [&](int64_t item, int) {
      const int64_t e = item / blocks, n0 = item % blocks * kPanel<A>;
      if (in.offsets[e] == in.offsets[e + 1]) return;
      const int64_t count = min64(kPanel<A>, columns - n0);
      const T* from = static_cast<const T*>(weight) + e * stride + n0 * ns;
      A* to = panels + item * depth * kPanel<A>;
      pack_panel<T, A>(from, ks, ns, rows, count, to);
      if (bias != nullptr)
        pack_panel<T, A>(static_cast<const T*>(bias) + e * columns + n0, 0, 1, 1, count,
                         to + rows * kPanel<A>);
    });
  }

  // The panel that starts at a column.
  const A* panel(int64_t expert, int64_t column) const {
    return panels + expert * size + column * depth;
  }
};

// The packed weights of one direction: forward w_in, w_out and w_gate, backward w_out, w_in and
// w_gate.
template <typename T, typename A>
struct PackedWeights {
  PackedWeight<T, A> first, second, gate;
};

// Calls body(column, columns) for every panel of a matrix with this number of columns.
template <typename A, typename F>
void each_panel(int64_t columns, const F& body) {
  for (int64_t n = 0; n < columns; n += kPanel<A>) body(n, min64(kPanel<A>, columns - n));
}

// out (rows x columns, padded to whole vectors) = in (rows x depth) times a panel, or is increased
// by it.
template <typename A>
void times_panel(const A* in, int64_t in_stride, int64_t rows, int64_t depth, const A* panel,
                 int64_t columns, A* out, int64_t out_stride, bool accumulate = false) {
  gemm<A>(rows, round_up(columns, kLanes<A>), depth, in, in_stride, 1, panel, kPanel<A>, out,
          out_stride, accumulate);
}

template <typename T, typename A>
void gather_tokens(const RoutedArgs& in, const void* source, const RowBlock& block, A* out) {
  const int64_t stride = row_stride<A>(in.width);
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t token = in.permutation[block.first + r] / in.choices;
    read_row<T, A>(static_cast<const T*>(source) + token * in.width, out + r * stride, in.width);
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
