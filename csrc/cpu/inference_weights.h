// Packed weights of the fusion encoders without gradients, see cpu/encoder_inference.h.
#pragma once

#include "cpu/panels.h"

namespace flmoe::FLMOE_ISA {

enum LayerTensor : int {
  kGain1,
  kShift1,
  kQ,
  kKV,
  kProj,
  kProjBias,
  kGain2,
  kShift2,
  kIn,
  kInBias,
  kOut,
  kOutBias,
  kLayerTensors
};

constexpr bool is_matrix(int t) {
  return t == kQ || t == kKV || t == kProj || t == kIn || t == kOut;
}

// A product's operands are of type E, its sums and all vectors of type A. B is packed in panels of
// kPanel<A> columns, whose depth is rounded up to kUnit.
template <typename Product>
struct Sizes {
  using A = typename Product::A;
  using E = typename Product::E;

  int64_t width, hidden, heads, head;
  int64_t blocks, block;               // as many heads as fit a panel are projected at once
  int64_t row, hidden_row, block_row;  // padded to whole vectors
  int64_t places[kLayerTensors];       // bytes from the start of a layer
  int64_t layer;                       // bytes

  explicit Sizes(const EncoderInference& args)
      : width(args.width),
        hidden(args.hidden),
        heads(args.heads),
        head(args.width / args.heads),
        row(round_up(width, kLanes<A>)),
        hidden_row(round_up(hidden, kLanes<A>)) {
    const int64_t fit = kPanel<A> % head == 0 && head % Product::kUnit == 0 ? kPanel<A> / head : 1;
    const int64_t each = heads % fit == 0 ? fit : 1;
    blocks = heads / each, block = each * head, block_row = round_up(block, kLanes<A>);
    layer = 0;
    for (int t = 0; t < kLayerTensors; ++t)
      places[t] = layer, layer += round_up(bytes(t), kVectorBytes);
  }

  static int64_t deep(int64_t depth) { return round_up(depth, Product::kUnit); }
  int64_t matrix(int64_t depth, int64_t columns) const {
    return packed_size<A>(deep(depth), columns);
  }

  // Elements of a tensor as given: columns x depth of a matrix.
  int64_t columns(int t) const {
    return t == kKV ? 2 * width : t == kIn || t == kInBias ? hidden : width;
  }
  int64_t depth(int t) const { return t == kOut ? hidden : is_matrix(t) ? width : 1; }

  // Bytes of a packed tensor.
  int64_t bytes(int t) const {
    if (t == kQ || t == kKV) return columns(t) / block * matrix(width, block) * sizeof(E);
    if (is_matrix(t)) return matrix(depth(t), columns(t)) * sizeof(E);
    return panels_of<A>(columns(t)) * kPanel<A> * sizeof(A);
  }
};

// The weights of a call, packed.
template <typename T, typename Product>
class Weights {
  using A = typename Product::A;
  using E = typename Product::E;

 public:
  Weights(const EncoderInference& args, const Sizes<Product>& sizes)
      : sizes_(sizes), packed_(args.experts * args.layers * sizes.layer) {
    const int64_t tensors = args.experts * args.layers * kLayerTensors;
    parallel_for(tensors, args.threads, [&](int64_t i, int) {
      const int t = static_cast<int>(i % kLayerTensors);
      pack(t, static_cast<const T*>(args.weights[i]),
           packed_ + i / kLayerTensors * sizes.layer + sizes.places[t]);
    });
  }

  const char* data() const { return packed_; }

 private:
  void pack(int t, const T* in, char* out) const {
    const int64_t columns = sizes_.columns(t), depth = sizes_.depth(t);
    if (!is_matrix(t)) {
      A* to = reinterpret_cast<A*>(out);
      read_row<T, A>(in, to, columns);
      for (int64_t i = columns; i < panels_of<A>(columns) * kPanel<A>; ++i) to[i] = 0;
      return;
    }
    const int64_t each = t == kQ || t == kKV ? sizes_.block : columns;
    E* to = reinterpret_cast<E*>(out);
    for (int64_t c = 0; c < columns; c += each)
      for (int64_t n0 = 0; n0 < each; n0 += kPanel<A>) {
        Product::template pack_panel<T>(in + (c + n0) * depth, depth, min64(kPanel<A>, each - n0),
                                        to);
        to += Sizes<Product>::deep(depth) * kPanel<A>;
      }
  }

  const Sizes<Product>& sizes_;
  const Buffer<char> packed_;
};

}  // namespace flmoe::FLMOE_ISA
