// Dense layers of all experts: blocks of rows times packed panels, and the gradient of a weight.
//
// A weight is packed once per call into column panels as wide as the register tile. An item is a
// block of rows of one expert; it processes all panels, so its rows stay in the L2 cache and a
// panel in L1/L2. An item of the weight gradient owns a block of its rows and sums over tokens in
// order, so results do not depend on the number of threads.
#pragma once

#include "cpu/panels.h"

namespace flmoe::FLMOE_ISA {

constexpr int64_t kRowBlock = 96;   // 16 register tiles; 96 KiB of float32 at width 256
constexpr int64_t kBiasBlock = 32;  // tokens of grad_bias summed in the type A

// Products in the compute type.
template <typename Storage>
struct PlainDense : PlainOperands<Storage> {
  using typename PlainOperands<Storage>::A;
  using typename PlainOperands<Storage>::E;
  static constexpr int64_t kOutBlock = 48;     // rows of the weight gradient per item
  static constexpr int64_t kTokenBlock = 256;  // depth of one pass of the weight gradient

  // Contiguous rows as operand A, in place if they can be.
  template <typename X>
  static const E* rows(const X* x, int64_t count, int64_t depth, E* out) {
    if constexpr (sizeof(X) == sizeof(E)) return x;
    read_row<X, A>(x, out, count * depth);
    return out;
  }

  // A block of `depth` rows as operand with that depth and `padded` columns.
  template <typename X>
  static const E* depth_rows(const X* x, int64_t stride, int64_t depth, int64_t columns,
                             int64_t padded, E* out) {
    if constexpr (sizeof(X) == sizeof(E)) {
      if (padded == stride) return x;
    }
    for (int64_t r = 0; r < depth; ++r) {
      read_row<X, A>(x + r * stride, out + r * padded, columns);
      for (int64_t k = columns; k < padded; ++k) out[r * padded + k] = 0;
    }
    return out;
  }
};

// Weights (experts, out, in), packed in parallel as B of x weight^T or, with depth_is_out, of
// grad_out weight.
template <typename Product>
struct PackedWeights {
  using T = typename Product::T;
  using A = typename Product::A;
  using E = typename Product::E;

  int64_t depth, columns, padded_depth, panels;
  Buffer<E> data;

  PackedWeights(const void* weight, int64_t experts, int64_t in_width, int64_t out_width,
                bool depth_is_out, int threads)
      : depth(depth_is_out ? out_width : in_width),
        columns(depth_is_out ? in_width : out_width),
        padded_depth(round_up(depth, Product::kUnit)),
        panels(panels_of<A>(columns)),
        data(experts * packed_size<A>(padded_depth, columns)) {
    parallel_for(experts * panels, threads, [&](int64_t item, int) {
      const int64_t n0 = item % panels * kPanel<A>;
      const T* from = static_cast<const T*>(weight) + item / panels * in_width * out_width;
      Product::pack(from + n0 * (depth_is_out ? 1 : in_width), in_width, depth_is_out, depth,
                    min64(kPanel<A>, columns - n0), data + item * kPanel<A> * padded_depth);
    });
  }

  // out (rows x columns) = x (rows x depth) B [+ bias] for one block of rows of an expert.
  template <typename X, typename Y>
  void times(const X* x, int64_t rows, int64_t expert, const T* bias, Y* out) const {
    const Buffer<E> copy(rows * padded_depth);
    const Buffer<A> edge(rows * kPanel<A>);
    const E* input = Product::rows(x, rows, depth, copy.data());
    for (int64_t n0 = 0; n0 < columns; n0 += kPanel<A>) {
      const int64_t count = min64(kPanel<A>, columns - n0);
      const E* panel = data + (expert * panels * kPanel<A> + n0) * padded_depth;
      const bool direct = sizeof(Y) == sizeof(A) && count == kPanel<A>;
      A* tile = direct ? reinterpret_cast<A*>(out + n0) : edge;
      const int64_t tile_stride = direct ? columns : kPanel<A>;
      if (bias != nullptr) {
        for (int64_t i = 0; i < rows; ++i) read_row<T, A>(bias + n0, tile + i * tile_stride, count);
      }
      Product::gemm(rows, round_up(count, kLanes<A>), depth, input, padded_depth, Product::kUnit,
                    panel, Product::kUnit * kPanel<A>, tile, tile_stride, bias != nullptr);
      if (!direct) {
        for (int64_t i = 0; i < rows; ++i)
          write_row<Y, A>(tile + i * tile_stride, out + i * columns + n0, count);
      }
    }
  }
};

// Calls body(expert, first row, rows) for the blocks of rows of some experts, in parallel.
template <typename F>
void for_row_blocks(int64_t experts, int64_t rows, int threads, const F& body) {
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  parallel_for(experts * blocks, threads, [&](int64_t item, int) {
    const int64_t row = item % blocks * kRowBlock;
    body(item / blocks, row, min64(kRowBlock, rows - row));
  });
}

// Rows [n0, n0 + count), a block, of grad_weight[e] = grad_out[e]^T x[e], and of grad_bias[e].
// Blocks of tokens are summed separately and then added: the rounding error grows with the block
// size and the number of blocks, not with the number of tokens. X, G: types of x and grad_out.
template <typename X, typename G, typename Product>
struct WeightGradient {
  using T = typename Product::T;
  using A = typename Product::A;
  using E = typename Product::E;
  static constexpr int64_t kOutBlock = Product::kOutBlock, kTokenBlock = Product::kTokenBlock;

  const LinearArgs& args;
  int64_t e, n0, count, padded;
  Buffer<double> bias_total;
  Buffer<A> total, bias_block, grad_row;
  Buffer<E> x_block, grad_block;

  WeightGradient(const LinearArgs& args, int64_t e, int64_t out_block)
      : args(args),
        e(e),
        n0(out_block * kOutBlock),
        count(min64(kOutBlock, args.out_width - n0)),
        padded(round_up(args.in_width, kLanes<A>)),
        bias_total(kOutBlock),
        total(kOutBlock * padded),
        bias_block(kOutBlock),
        grad_row(kOutBlock),
        x_block(kTokenBlock * padded),
        grad_block(kTokenBlock * kOutBlock) {
    for (int64_t n = 0; n < kOutBlock; ++n) bias_total[n] = 0, bias_block[n] = 0;
    for (int64_t i = 0; i < kOutBlock * padded; ++i) total[i] = 0;
  }

  // Items of one expert; none if neither gradient is wanted.
  static int64_t items(const LinearArgs& args) {
    const bool wanted = args.grad_weight != nullptr || args.grad_bias != nullptr;
    return wanted ? (args.out_width + kOutBlock - 1) / kOutBlock : 0;
  }

  const G* grad_of(int64_t token) const {
    return static_cast<const G*>(args.grad_out) + (e * args.rows + token) * args.out_width + n0;
  }

  void add_bias(int64_t first, int64_t tokens) {
    for (int64_t r = 0; r < tokens; ++r) {
      read_row<G, A>(grad_of(first + r), grad_row, count);
      for (int64_t n = 0; n < count; ++n) bias_block[n] += grad_row[n];
      if (r % kBiasBlock == kBiasBlock - 1 || r == tokens - 1) {
        for (int64_t n = 0; n < count; ++n) bias_total[n] += bias_block[n], bias_block[n] = 0;
      }
    }
  }

  // The product sums a block of tokens before it adds to the total.
  void add_weight(int64_t first, int64_t tokens) {
    const int64_t width = args.in_width;
    const X* x = static_cast<const X*>(args.x) + (e * args.rows + first) * width;
    const E* grad = Product::depth_rows(grad_of(first), args.out_width, tokens, count, count,
                                        grad_block.data());
    Product::gemm(count, padded, tokens, grad, Product::kUnit, Product::kUnit * count,
                  Product::depth_rows(x, width, tokens, width, padded, x_block.data()),
                  Product::kUnit * padded, total, padded, true);
  }

  void run() {
    for (int64_t first = 0; first < args.rows; first += kTokenBlock) {
      const int64_t tokens = min64(kTokenBlock, args.rows - first);
      if (args.grad_bias != nullptr) add_bias(first, tokens);
      if (args.grad_weight != nullptr) add_weight(first, tokens);
    }
    const int64_t row = e * args.out_width + n0;
    if (args.grad_weight != nullptr) {
      T* out = static_cast<T*>(args.grad_weight) + row * args.in_width;
      for (int64_t n = 0; n < count; ++n)
        write_row<T, A>(total + n * padded, out + n * args.in_width, args.in_width);
    }
    if (args.grad_bias != nullptr) {
      for (int64_t n = 0; n < count; ++n)
        write<T, A>(static_cast<T*>(args.grad_bias) + row + n, static_cast<A>(bias_total[n]));
    }
  }
};

}  // namespace flmoe::FLMOE_ISA
