// Products of a dense layer: blocks of rows times packed panels, and the gradient of a weight.
#pragma once

#include "cpu/panels.h"

namespace flmoe::FLMOE_ISA {

constexpr int64_t kRowBlock = 96;     // 16 register tiles; 96 KiB of input at width 256
constexpr int64_t kOutBlock = 48;     // rows of the weight gradient per item
constexpr int64_t kBiasBlock = 32;    // tokens of grad_bias summed in the compute type
constexpr int64_t kTokenBlock = 256;  // depth of one pass of the weight gradient

// out (rows x columns) = x (rows x depth) packed panels [+ bias], for one block of rows. X, T:
// types of x and of out.
template <typename X, typename T, typename A>
void rows_times_panels(const X* x, int64_t rows, int64_t depth, const A* panels, int64_t columns,
                       const T* bias, T* out) {
  const A* input;
  const Buffer<A> edge(rows * kPanel<A>), converted(sizeof(X) == sizeof(A) ? 0 : rows * depth);
  if constexpr (sizeof(X) == sizeof(A)) {
    input = x;
  } else {
    read_row<X, A>(x, converted, rows * depth);
    input = converted;
  }
  for (int64_t n0 = 0; n0 < columns; n0 += kPanel<A>) {
    const int64_t count = min64(kPanel<A>, columns - n0);
    const A* panel = panels + n0 * depth;
    const bool direct = sizeof(T) == sizeof(A) && count == kPanel<A>;
    A* tile = direct ? reinterpret_cast<A*>(out + n0) : edge;
    const int64_t tile_stride = direct ? columns : kPanel<A>;
    if (bias != nullptr) {
      for (int64_t i = 0; i < rows; ++i) read_row<T, A>(bias + n0, tile + i * tile_stride, count);
    }
    gemm<A>(rows, round_up(count, kLanes<A>), depth, input, depth, 1, panel, kPanel<A>, tile,
            tile_stride, bias != nullptr);
    if (!direct) {
      for (int64_t i = 0; i < rows; ++i)
        write_row<T, A>(tile + i * tile_stride, out + i * columns + n0, count);
    }
  }
}

// Rows [n0, n0 + count), a block, of grad_weight[e] = grad_out[e]^T x[e], and of grad_bias[e].
// Blocks of tokens are summed separately and then added: the rounding error grows with the block
// size and the number of blocks, not with the number of tokens. X, G, T: types of x, grad_out and
// the gradients.
template <typename X, typename G, typename T, typename A>
struct WeightGradient {
  const LinearArgs& args;
  int64_t e, n0, count, padded;
  Buffer<double> bias_total;
  Buffer<A> total, block, bias_block, x_block, grad_block;

  WeightGradient(const LinearArgs& args, int64_t e, int64_t out_block)
      : args(args),
        e(e),
        n0(out_block * kOutBlock),
        count(min64(kOutBlock, args.out_width - n0)),
        padded(round_up(args.in_width, kLanes<A>)),
        bias_total(kOutBlock),
        total(kOutBlock * padded),
        block(kOutBlock * padded),
        bias_block(kOutBlock),
        x_block(kTokenBlock * padded),
        grad_block(kTokenBlock * kOutBlock) {
    for (int64_t n = 0; n < kOutBlock; ++n) bias_total[n] = 0, bias_block[n] = 0;
    for (int64_t i = 0; i < kOutBlock * padded; ++i) total[i] = 0;
  }

  // The block's rows of x in the compute type, in place if they already have it.
  const A* load_x(int64_t first, int64_t tokens) {
    const int64_t width = args.in_width;
    const X* x = static_cast<const X*>(args.x) + (e * args.rows + first) * width;
    if constexpr (sizeof(X) == sizeof(A)) {
      if (padded == width) return reinterpret_cast<const A*>(x);
    }
    for (int64_t r = 0; r < tokens; ++r) {
      read_row<X, A>(x + r * width, x_block + r * padded, width);
      for (int64_t k = width; k < padded; ++k) x_block[r * padded + k] = 0;
    }
    return x_block;
  }

  void load_grad(int64_t first, int64_t tokens) {
    const G* grad =
        static_cast<const G*>(args.grad_out) + (e * args.rows + first) * args.out_width + n0;
    for (int64_t r = 0; r < tokens; ++r) {
      A* to = grad_block + r * kOutBlock;
      read_row<G, A>(grad + r * args.out_width, to, count);
      for (int64_t n = 0; n < count; ++n) bias_block[n] += to[n];
      if (r % kBiasBlock == kBiasBlock - 1 || r == tokens - 1) {
        for (int64_t n = 0; n < count; ++n) bias_total[n] += bias_block[n], bias_block[n] = 0;
      }
    }
  }

  void run() {
    for (int64_t first = 0; first < args.rows; first += kTokenBlock) {
      const int64_t tokens = min64(kTokenBlock, args.rows - first);
      load_grad(first, tokens);
      if (args.grad_weight == nullptr) continue;
      gemm<A>(count, padded, tokens, grad_block, 1, kOutBlock, load_x(first, tokens), padded, block,
              padded, false);
      for (int64_t i = 0; i < count * padded; ++i) total[i] += block[i];
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
