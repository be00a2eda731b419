// The interaction losses of all experts in one call: a triplet per uniqueness expert, cosines for
// synergy and redundancy. latents (experts, views, batch, width), views = modalities + 1. The last
// two experts are synergy and redundancy; before them, there is a uniqueness expert per modality,
// or none. A loss is a mean over the (sample, view) pairs that exist; 0 without any.
#include <cmath>

#include "cpu/kernels/entry.h"

namespace flmoe::FLMOE_ISA {
namespace {

constexpr double kMargin = 1.0;
constexpr double kTripletEps = 1e-7;
constexpr double kNormFloor = 1e-12;

bool exists(const LossArgs& args, int64_t sample, int64_t modality) {
  return !args.exists || args.exists[sample * (args.views - 1) + modality];
}

bool is_uniqueness(const LossArgs& args, int64_t expert) {
  return expert < args.experts - 2;
}

// Number of terms of an expert's loss in one sample.
int64_t terms_of(const LossArgs& args, int64_t expert, int64_t sample) {
  const int64_t m = args.views - 1;
  if (is_uniqueness(args, expert) && !exists(args, sample, expert)) return 0;
  int64_t count = 0;
  for (int64_t other = 0; other < m; ++other) count += exists(args, sample, other);
  return count - is_uniqueness(args, expert);
}

// 1 / number of terms of an expert's loss. No terms: 0, or inf for an empty batch, so that the loss
// is NaN as in torch.
template <typename A>
A share_of(const LossArgs& args, int64_t expert) {
  int64_t count = 0;
  for (int64_t b = 0; b < args.batch; ++b) count += terms_of(args, expert, b);
  return count || !args.batch ? A(1) / static_cast<A>(count) : A(0);
}

template <typename T, typename A>
struct Sample {
  const LossArgs& args;
  int64_t expert, index, width;
  Buffer<A> views, grads;  // (views, width) each

  Sample(const LossArgs& args, int64_t expert, int64_t index)
      : args(args),
        expert(expert),
        index(index),
        width(args.width),
        views(args.views * width),
        grads(args.views * width) {
    for (int64_t v = 0; v < args.views; ++v)
      read_row<T, A>(static_cast<const T*>(args.latents) + offset(v), views + v * width, width);
  }

  int64_t offset(int64_t v) const {
    return ((expert * args.views + v) * args.batch + index) * width;
  }
  int64_t modalities() const { return args.views - 1; }

  A distance(int64_t v) const {
    A total = 0;
    const A* other = views + v * width;
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < width; ++d) {
      const A diff = views[d] - other[d] + A(kTripletEps);
      total += diff * diff;
    }
    return std::sqrt(total);
  }

  A dot(int64_t v, int64_t w) const {
    return dot_of<A>(views + v * width, views + w * width, width);
  }

  A norm(int64_t v) const {
    const A length = std::sqrt(dot(v, v));
    return length < A(kNormFloor) ? A(kNormFloor) : length;
  }

  A cosine(int64_t v) const { return dot(0, v) / (norm(0) * norm(v)); }

  bool is_synergy() const { return expert == args.experts - 2; }

  // The sum of this sample's terms of the expert's loss.
  A loss() const {
    const int64_t m = modalities();
    A total = 0;
    if (!terms_of(args, expert, index)) return total;
    if (is_uniqueness(args, expert)) {
      const A negative = distance(1 + expert);
      for (int64_t other = 0; other < m; ++other) {
        if (other == expert || !exists(args, index, other)) continue;
        const A value = distance(1 + other) - negative + A(kMargin);
        total += value > 0 || value != value ? value : A(0);
      }
      return total;
    }
    for (int64_t v = 1; v <= m; ++v)
      if (exists(args, index, v - 1)) total += is_synergy() ? cosine(v) : A(1) - cosine(v);
    return total;
  }

  // Adds factor * d(distance to view v) to the gradients.
  void add_distance(int64_t v, A factor) {
    const A length = distance(v);
    if (length == 0) return;
    for (int64_t d = 0; d < width; ++d) {
      const A part = factor * (views[d] - views[v * width + d] + A(kTripletEps)) / length;
      grads[d] += part;
      grads[v * width + d] -= part;
    }
  }

  void add_cosine(int64_t v, A factor) {
    const A length0 = norm(0), length = norm(v), both = length0 * length;
    const A cos = dot(0, v) / both;
    // Below the floor, the length is a constant.
    const A back0 = length0 > A(kNormFloor) ? cos / (length0 * length0) : A(0);
    const A back = length > A(kNormFloor) ? cos / (length * length) : A(0);
    for (int64_t d = 0; d < width; ++d) {
      const A x = views[d], y = views[v * width + d];
      grads[d] += factor * (y / both - back0 * x);
      grads[v * width + d] += factor * (x / both - back * y);
    }
  }

  // grad: of one term of the loss.
  void backward(A grad) {
    const int64_t m = modalities();
    for (int64_t i = 0; i < args.views * width; ++i) grads[i] = 0;
    if (is_uniqueness(args, expert)) {
      const A negative = distance(1 + expert);
      for (int64_t other = 0; other < m; ++other) {
        if (other == expert || !exists(args, index, other) || !exists(args, index, expert))
          continue;
        if (distance(1 + other) - negative + A(kMargin) < 0) continue;
        add_distance(1 + other, grad);
        add_distance(1 + expert, -grad);
      }
    } else {
      for (int64_t v = 1; v <= m; ++v)
        if (exists(args, index, v - 1)) add_cosine(v, is_synergy() ? grad : -grad);
    }
    for (int64_t v = 0; v < args.views; ++v)
      write_row<T, A>(grads + v * width, static_cast<T*>(args.grad_latents) + offset(v), width);
  }
};

}  // namespace

void loss_forward(DType dtype, const LossArgs& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    parallel_for(args.experts, args.threads, [&](int64_t e, int) {
      A total = 0;
      for (int64_t b = 0; b < args.batch; ++b) total += Sample<T, A>(args, e, b).loss();
      write<T, A>(static_cast<T*>(args.losses) + e, total * share_of<A>(args, e));
    });
  });
}

void loss_backward(DType dtype, const LossArgs& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    Buffer<A> grads(args.experts);  // of one term of each expert's loss
    for (int64_t e = 0; e < args.experts; ++e)
      grads[e] = read<T, A>(static_cast<const T*>(args.grad_losses) + e) * share_of<A>(args, e);
    parallel_for(args.experts * args.batch, args.threads, [&](int64_t item, int) {
      const int64_t e = item / args.batch;
      Sample<T, A>(args, e, item % args.batch).backward(grads[e]);
    });
  });
}

}  // namespace flmoe::FLMOE_ISA
