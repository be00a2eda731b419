// The MLP of an encoder layer, all experts in one call: linear, GELU, dropout, linear.
//
// Forward: an item is a block of rows of one expert. Its hidden rows are written once, for the
// backward; their activation stays in the cache and is the input of the second product. Backward:
// the gradient of a block's activation is computed, turned into that of the hidden rows and
// multiplied with w_in while it is in the cache. It and the recomputed activation are also kept,
// for as many experts as fit into kGroupBytes, because the gradients of the weights are sums over
// all rows. Bound: the products, 4 * rows * F * D FLOP forward and 8 backward. Items own their
// outputs, so results depend neither on the groups nor on the number of threads.
#pragma once

#include "cpu/dense.h"

namespace flmoe::FLMOE_ISA {

constexpr int64_t kGroupBytes = int64_t{24} << 20;

template <typename Product>
struct Mlp {
  using T = typename Product::T;
  using A = typename Product::A;
  using E = typename Product::E;

  const MlpArgs& args;
  Dropout dropout;
  A kept;
  int64_t width;  // hidden width
  PackedWeights<Product> w_in, w_out;

  Mlp(const MlpArgs& args, bool backward)
      : args(args),
        dropout(dropout_of(args.dropout)),
        kept(keep_scale<A>(dropout)),
        width(args.hidden_width),
        w_in(args.w_in, args.experts, args.in_width, width, backward, args.threads),
        w_out(args.w_out, args.experts, width, args.out_width, backward, args.threads) {}

  // Row `r` of expert `e`: its hidden row, padded to whole vectors, becomes its activation and,
  // with kGrad, the gradient of the activation becomes that of the hidden row.
  template <bool kGrad>
  void activate_row(int64_t e, int64_t r, A* hidden, A* grad) const {
    uint32_t bits[4];
    for (int64_t c0 = 0; c0 < width; c0 += kDropoutGroup) {
      if (dropout.active())
        dropout_bits(dropout, 0, static_cast<uint32_t>(e), static_cast<uint32_t>(r),
                     static_cast<uint32_t>(c0 / kDropoutGroup), bits);
      const int64_t end = min64(kDropoutGroup, width - c0);
      for (int64_t c = 0; c < end; c += kLanes<A>) {
        Vec<A> cdf, pdf;
        A* at = hidden + c0 + c;
        const Vec<A> x = load(at);
        normal_cdf_pdf(x, &cdf, &pdf);
        const auto drop = [&](Vec<A> v) {
          if (!dropout.active()) return v;
          return keep_lanes<A>(v * kept, lane_bits<A>(bits, static_cast<int>(c)));
        };
        store(at, drop(x * cdf));
        if constexpr (kGrad) store(grad + c0 + c, drop(load(grad + c0 + c)) * (cdf + x * pdf));
      }
    }
  }

  // Activations of a block of rows, and with kGrad the gradients of its hidden rows from those of
  // the activations, which may be in place.
  template <bool kGrad>
  void activate(int64_t e, int64_t row, int64_t rows, E* activation, const A* grad_activation,
                E* grad) const {
    const int64_t padded = round_up(width, kLanes<A>);
    const Buffer<A> x(padded), g(padded);
    const T* hidden = static_cast<const T*>(args.hidden) + (e * args.rows + row) * width;
    for (int64_t r = 0; r < rows; ++r) {
      read_row<T, A>(hidden + r * width, x, width);
      if constexpr (kGrad) read_row<A, A>(grad_activation + r * width, g, width);
      activate_row<kGrad>(e, row + r, x, g);
      write_row<E, A>(x, activation + r * width, width);
      if constexpr (kGrad) write_row<E, A>(g, grad + r * width, width);
    }
  }

  template <typename P>
  P* rows_of(P* base, int64_t e, int64_t row, int64_t columns) const {
    return base + (e * args.rows + row) * columns;
  }

  void forward() const {
    for_row_blocks(args.experts, args.rows, args.threads,
                   [&](int64_t e, int64_t row, int64_t rows) {
                     const Buffer<E> activation(rows * width);
                     w_in.times(rows_of(static_cast<const T*>(args.x), e, row, args.in_width), rows,
                                e, static_cast<const T*>(args.b_in) + e * width,
                                rows_of(static_cast<T*>(args.hidden), e, row, width));
                     activate<false>(e, row, rows, activation, nullptr, nullptr);
                     w_out.times(activation.data(), rows, e,
                                 static_cast<const T*>(args.b_out) + e * args.out_width,
                                 rows_of(static_cast<T*>(args.out), e, row, args.out_width));
                   });
  }

  void backward() const {
    const bool weights = args.grad_w_in != nullptr || args.grad_b_in != nullptr ||
                         args.grad_w_out != nullptr || args.grad_b_out != nullptr;
    const int64_t each = args.rows * width, bytes = 2 * each * static_cast<int64_t>(sizeof(E));
    int64_t group = args.experts;
    if (bytes * group > kGroupBytes) group = bytes > kGroupBytes ? 1 : kGroupBytes / bytes;
    const Buffer<E> activations(weights ? group * each : 0), grads(weights ? group * each : 0);
    for (int64_t e0 = 0; e0 < args.experts; e0 += group) {
      const int64_t experts = min64(group, args.experts - e0);
      for_row_blocks(experts, args.rows, args.threads, [&](int64_t i, int64_t row, int64_t rows) {
        const int64_t own = weights ? 0 : rows * width, at = (i * args.rows + row) * width;
        const Buffer<E> own_activation(own), own_grad(own);
        E* activation = weights ? activations + at : own_activation.data();
        E* grad = weights ? grads + at : own_grad.data();
        block_backward(e0 + i, row, rows, activation, grad);
      });
      if (weights) weight_gradients(e0, experts, activations, grads);
    }
  }

  void block_backward(int64_t e, int64_t row, int64_t rows, E* activation, E* grad) const {
    constexpr bool kInPlace = sizeof(E) == sizeof(A);
    const Buffer<A> sums(kInPlace ? 0 : rows * width);
    A* grad_activation = kInPlace ? reinterpret_cast<A*>(grad) : sums.data();
    w_out.times(rows_of(static_cast<const T*>(args.grad_out), e, row, args.out_width), rows, e,
                nullptr, grad_activation);
    activate<true>(e, row, rows, activation, grad_activation, grad);
    if (args.grad_x == nullptr) return;
    w_in.times(static_cast<const E*>(grad), rows, e, nullptr,
               rows_of(static_cast<T*>(args.grad_x), e, row, args.in_width));
  }

  // Gradients of both weights and biases of some experts: `activations` and `grads` are theirs.
  void weight_gradients(int64_t e0, int64_t experts, const E* activations, const E* grads) const {
    const auto shifted = [e0](void* grad, int64_t size) {
      return grad == nullptr ? nullptr : static_cast<void*>(static_cast<T*>(grad) + e0 * size);
    };
    LinearArgs in{}, out{};
    in.x = rows_of(static_cast<const T*>(args.x), e0, 0, args.in_width), in.grad_out = grads;
    in.grad_weight = shifted(args.grad_w_in, width * args.in_width);
    in.grad_bias = shifted(args.grad_b_in, width);
    in.rows = args.rows, in.in_width = args.in_width, in.out_width = width;
    out.x = activations;
    out.grad_out = rows_of(static_cast<const T*>(args.grad_out), e0, 0, args.out_width);
    out.grad_weight = shifted(args.grad_w_out, args.out_width * width);
    out.grad_bias = shifted(args.grad_b_out, args.out_width);
    out.rows = args.rows, out.in_width = width, out.out_width = args.out_width;
    using GradientIn = WeightGradient<T, E, Product>;
    using GradientOut = WeightGradient<E, T, Product>;
    const int64_t first = GradientIn::items(in), all = first + GradientOut::items(out);
    parallel_for(experts * all, args.threads, [&](int64_t item, int) {
      const int64_t e = item / all, block = item % all;
      if (block < first)
        GradientIn(in, e, block).run();
      else
        GradientOut(out, e, block - first).run();
    });
  }
};

}  // namespace flmoe::FLMOE_ISA
