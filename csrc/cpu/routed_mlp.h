// routed_mlp: applies to every token the MLPs of its experts.
//
// Tokens are processed in chunks whose rows stay in the cache until they are added. One item is a
// block of up to 96 rows of one expert in the chunk: it gathers their tokens and computes a panel
// of the hidden layer at a time, for gated experts also the gate's; a panel is saved if there will
// be a backward, and activated in place. The last product reads the hidden layer from the cache.
// Biases are a further row of the packed weights. Operands of products are of the product's type,
// see PlainOperands; if it is not that of sums, a panel is computed in a buffer, and its activation
// is rounded to the operand of the last product. The rows are then added per token in the order of
// its choices, so that the result depends neither on threads nor on chunks. Bound: 4 D F FLOP per
// row, gated 6 D F.
#pragma once

#include "cpu/activations.h"
#include "cpu/routed_rows.h"

namespace flmoe::FLMOE_ISA {

// Rows of a chunk: several blocks per thread and per expert.
constexpr int64_t kChunkPerThread = 24 * kRowBlock, kChunkPerExpert = 4 * kRowBlock;

// out = act(hidden) of one row, or act(gate) * hidden, in whole vectors.
template <typename Product, bool kGated>
void activate_row(Activation act, const typename Product::A* gate,
                  const typename Product::A* hidden, int64_t count, typename Product::E* out) {
  using A = typename Product::A;
  for (int64_t d = 0; d < count; d += kLanes<A>) {
    if constexpr (kGated)
      Product::put(out + d, activate<A>(act, load(gate + d), nullptr) * load(hidden + d));
    else
      Product::put(out + d, activate<A>(act, load(hidden + d), nullptr));
  }
}

// rows: the outputs of the block's rows, before they are weighted.
template <typename Product, bool kGated>
void forward_block(const RoutedForward& args, const RoutedWeights<Product>& packed,
                   const RowBlock& block, typename Product::A* rows) {
  using T = typename Product::T;
  using A = typename Product::A;
  using E = typename Product::E;
  constexpr bool kInPlace = sizeof(A) == sizeof(E);
  const RoutedArgs& in = args.in;
  const auto act = static_cast<Activation>(in.act);
  const int64_t e = block.expert, width = in.width, count = block.count;
  const int64_t width_stride = row_stride<E>(width), hidden_stride = row_stride<E>(in.hidden);
  const Buffer<E> tokens(kRowBlock * width_stride), hidden(kRowBlock * hidden_stride);
  const Buffer<A> gate(kGated ? kRowBlock * kPanel<A> : 0);
  const Buffer<A> own_panel(kInPlace ? 0 : kRowBlock * kPanel<A>);
  gather_tokens<Product>(in, in.x, block, tokens);
  each_panel<A>(in.hidden, [&](int64_t n, int64_t columns) {
    A* panel = kInPlace ? reinterpret_cast<A*>(hidden + n) : own_panel.data();
    const int64_t panel_stride = kInPlace ? hidden_stride : kPanel<A>;
    times_panel<Product>(tokens, width_stride, count, packed.first.depth, packed.first.panel(e, n),
                         columns, panel, panel_stride);
    if constexpr (kGated)
      times_panel<Product>(tokens, width_stride, count, packed.gate.depth, packed.gate.panel(e, n),
                           columns, gate, kPanel<A>);
    for (int64_t r = 0; r < count; ++r) {
      const A* row = panel + r * panel_stride;
      const A* row_gate = kGated ? gate + r * kPanel<A> : nullptr;
      if (args.hidden != nullptr) {
        T* saved = static_cast<T*>(args.hidden) + (block.first + r) * in.hidden + n;
        write_row<T, A>(row, saved, columns);
        if constexpr (kGated)
          write_row<T, A>(row_gate, saved + in.tokens * in.choices * in.hidden, columns);
      }
      activate_row<Product, kGated>(act, row_gate, row, columns, hidden + r * hidden_stride + n);
    }
  });
  for (int64_t r = 0; r < count; ++r) end_row<Product>(hidden + r * hidden_stride, in.hidden, 1);
  each_panel<A>(width, [&](int64_t n, int64_t columns) {
    times_panel<Product>(hidden, hidden_stride, count, packed.second.depth,
                         packed.second.panel(e, n), columns, rows + n, row_stride<A>(width));
  });
}

// out[n] = sum over k of weight[n, k] * rows[place[n, k]] for a number of tokens, in the order of
// k; a place of -1 adds nothing.
template <typename T, typename A>
void combine(const RoutedArgs& in, int64_t tokens, const A* rows, const int32_t* place,
             const T* weight, T* out) {
  constexpr int64_t kTokens = 64;
  const int64_t stride = row_stride<A>(in.width);
  parallel_for((tokens + kTokens - 1) / kTokens, in.threads, [&](int64_t item, int) {
    const Buffer<A> sum(in.width);
    for (int64_t n = item * kTokens; n < min64((item + 1) * kTokens, tokens); ++n) {
      for (int64_t d = 0; d < in.width; ++d) sum[d] = 0;
      for (int64_t flat = n * in.choices; flat < (n + 1) * in.choices; ++flat) {
        if (place[flat] < 0) continue;
        const A* row = rows + place[flat] * stride;
        const A factor = read<T, A>(weight + flat);
        for (int64_t d = 0; d < in.width; ++d) sum[d] += factor * row[d];
      }
      write_row<T, A>(sum, out + n * in.width, in.width);
    }
  });
}

template <typename Product, bool kGated>
void forward_chunks(const RoutedForward& args, const RoutedWeights<Product>& packed) {
  using T = typename Product::T;
  using A = typename Product::A;
  const RoutedArgs& in = args.in;
  const int64_t wanted = in.threads * kChunkPerThread, least = in.experts * kChunkPerExpert;
  const int64_t most = min64(in.tokens, (wanted > least ? wanted : least) / in.choices + 1);
  const int64_t stride = row_stride<A>(in.width);
  const Buffer<A> rows(most * in.choices * stride);
  const Buffer<int32_t> place(most * in.choices);
  RowBlocks blocks(most * in.choices, in, 1);
  for (int64_t first = 0; first < in.tokens; first += most) {
    const int64_t tokens = min64(most, in.tokens - first);
    const int64_t begin = first * in.choices, end = begin + tokens * in.choices;
    blocks.clear();
    for (int64_t e = 0; e < in.experts; ++e) {
      const int64_t last = in.offsets[e + 1];
      const int64_t from = find_row(in.permutation, in.offsets[e], last, begin);
      blocks.add(e, from, find_row(in.permutation, from, last, end));
    }
    std::memset(place, -1, tokens * in.choices * sizeof(int32_t));
    parallel_for(blocks.count, in.threads, [&](int64_t item, int) {
      const RowBlock& block = blocks.block[item];
      forward_block<Product, kGated>(args, packed, block, rows + block.at * stride);
      for (int64_t r = 0; r < block.count; ++r)
        place[in.permutation[block.first + r] - begin] = static_cast<int32_t>(block.at + r);
    });
    combine<T, A>(in, tokens, rows, place, static_cast<const T*>(in.weight) + begin,
                  static_cast<T*>(args.out) + first * in.width);
  }
}

template <typename Product>
void run_routed_forward(const RoutedForward& args) {
  const RoutedArgs& in = args.in;
  const int64_t width = in.width, hidden = in.hidden;
  const RoutedWeights<Product> packed{
      {in, in.w_in, in.w_in_stride, width, hidden, false, in.b_in},
      {in, in.w_out, width * hidden, hidden, width, false, in.b_out},
      {in, in.w_gate, in.w_gate_stride, width, hidden, false, in.b_gate},
  };
  with_gate(in, [&]<bool kGated>() { forward_chunks<Product, kGated>(args, packed); });
}

}  // namespace flmoe::FLMOE_ISA
