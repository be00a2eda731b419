// Dense layers of all experts in one call: out[e] = x[e] weight[e]^T + bias[e].
//
// Why not torch's matmul: MKL uses only AVX2 on processors that are not Intel's; measurements are
// in bench/results.
#pragma once

#include "cpu/dense.h"

namespace flmoe::FLMOE_ISA {

// All rows of all experts times their weights.
template <typename Product>
void batched_rows(const LinearArgs& args, const void* x, bool depth_is_out, const void* bias,
                  void* out) {
  using T = typename Product::T;
  const PackedWeights<Product> weights(args.weight, args.experts, args.in_width, args.out_width,
                                       depth_is_out, args.threads);
  for_row_blocks(args.experts, args.rows, args.threads, [&](int64_t e, int64_t row, int64_t rows) {
    const int64_t first = e * args.rows + row;
    weights.times(static_cast<const T*>(x) + first * weights.depth, rows, e,
                  bias == nullptr ? nullptr : static_cast<const T*>(bias) + e * weights.columns,
                  static_cast<T*>(out) + first * weights.columns);
  });
}

template <typename Product>
void run_linear_backward(const LinearArgs& args) {
  using T = typename Product::T;
  using Gradient = WeightGradient<T, T, Product>;
  if (args.grad_x != nullptr)
    batched_rows<Product>(args, args.grad_out, true, nullptr, args.grad_x);
  const int64_t items = Gradient::items(args);
  parallel_for(args.experts * items, args.threads,
               [&](int64_t item, int) { Gradient(args, item / items, item % items).run(); });
}

}  // namespace flmoe::FLMOE_ISA
