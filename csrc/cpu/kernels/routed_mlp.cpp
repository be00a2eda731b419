// routed_mlp: applies to every token the MLPs of its experts.
//
// Forward: one item is a block of up to 96 rows of one expert. It gathers their tokens, multiplies
// by the packed first weight, for gated experts also by the gate's, applies biases, activation and
// gate in place and multiplies by the last weight: the hidden layer stays in the cache (its
// pre-activations are written once, for the backward). The rows' outputs are then added per token
// in the order of its choices, so that the result depends neither on threads nor on which expert
// runs first. Backward: the same blocks compute the gradients of the hidden layer, the routing
// weights and the gathered tokens; then an item owns a block of rows of a weight's gradient and
// sums over the expert's tokens in order. Bound: 4 D F FLOP per row forward, 8 D F backward; gated
// 6 and 12.
#include "cpu/activations.h"
#include "cpu/panels.h"

namespace flmoe::FLMOE_ISA {
namespace {

constexpr int64_t kRowBlock = 96;     // 16 register tiles
constexpr int64_t kOutBlock = 96;     // rows of a weight's gradient per item
constexpr int64_t kTokenBlock = 256;  // depth of one pass of a weight's gradient

struct RowBlock {
  int64_t expert, first, count;
};

struct Blocks {
  Buffer<RowBlock> block;
  int64_t count = 0;

  explicit Blocks(const RoutedArgs& in) : block(in.tokens * in.choices / kRowBlock + in.experts) {
    for (int64_t e = 0; e < in.experts; ++e)
      for (int64_t r = in.offsets[e]; r < in.offsets[e + 1]; r += kRowBlock)
        block[count++] = {e, r, min64(kRowBlock, in.offsets[e + 1] - r)};
  }
};

// A weight of all experts, packed and shared by the threads. A null weight is not used.
template <typename T, typename A>
struct PackedWeight {
  int64_t size;  // of one expert
  Buffer<A> panels;

  // (depth x columns) per expert; element (k, n) of expert e lies at e * stride + k * ks + n * ns.
  PackedWeight(const RoutedArgs& in, const void* weight, int64_t stride, int64_t depth,
               int64_t columns, int64_t ks, int64_t ns)
      : size(packed_size<A>(depth, columns)), panels(weight == nullptr ? 0 : in.experts * size) {
    if (weight != nullptr)
      pack_all<T, A>(static_cast<const T*>(weight), in.experts, stride, depth, columns, ks, ns,
                     in.threads, panels);
  }

  const A* of(int64_t expert) const { return panels + expert * size; }
};

// The packed weights of one direction: forward w_in, w_out and w_gate, backward w_out, w_in and
// w_gate.
template <typename T, typename A>
struct PackedWeights {
  PackedWeight<T, A> first, second, gate;
};

// out (rows x columns, padded to panels) = in (rows x depth, in_stride) times packed panels, or is
// increased by it.
template <typename A>
void times_panels(const A* in, int64_t in_stride, int64_t rows, int64_t depth, const A* panels,
                  int64_t columns, A* out, int64_t out_stride, bool accumulate = false) {
  for (int64_t n = 0; n < columns; n += kPanel<A>)
    gemm<A>(rows, round_up(min64(kPanel<A>, columns - n), kLanes<A>), depth, in, in_stride, 1,
            panels + n * depth, kPanel<A>, out + n, out_stride, accumulate);
}

template <typename T, typename A>
void add_bias(const void* bias, int64_t e, int64_t rows, int64_t columns, A* x, int64_t stride) {
  if (bias == nullptr) return;
  const T* b = static_cast<const T*>(bias) + e * columns;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t d = 0; d < columns; ++d) x[r * stride + d] += read<T, A>(b + d);
}

template <typename T, typename A>
void gather_tokens(const RoutedArgs& in, const void* source, const RowBlock& block, A* out) {
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t token = in.permutation[block.first + r] / in.choices;
    read_row<T, A>(static_cast<const T*>(source) + token * in.width, out + r * in.width, in.width);
  }
}

template <typename A>
struct BlockBuffers {
  int64_t hidden_stride, width_stride;
  Buffer<A> tokens, hidden, rows, gate;  // gate: only in the forward of gated experts

  BlockBuffers(const RoutedArgs& in, bool gated)
      : hidden_stride(panels_of<A>(in.hidden) * kPanel<A>),
        width_stride(panels_of<A>(in.width) * kPanel<A>),
        tokens(kRowBlock * in.width),
        hidden(kRowBlock * hidden_stride),
        rows(kRowBlock * width_stride),
        gate(gated ? kRowBlock * hidden_stride : 0) {}
};

// hidden = act(hidden) of one row, or act(gate) * hidden.
template <typename A, bool kGated>
void activate_row(Activation act, const A* gate, A* hidden, int64_t count) {
  for (int64_t d = 0; d < count; d += kLanes<A>) {
    if constexpr (kGated)
      store(hidden + d, activate<A>(act, load(gate + d), nullptr) * load(hidden + d));
    else
      store(hidden + d, activate<A>(act, load(hidden + d), nullptr));
  }
}

template <typename T, typename A, bool kGated>
void forward_block(const RoutedForward& args, const PackedWeights<T, A>& packed,
                   const RowBlock& block) {
  const RoutedArgs& in = args.in;
  const auto act = static_cast<Activation>(in.act);
  BlockBuffers<A> buffer(in, kGated);
  gather_tokens<T, A>(in, in.x, block, buffer.tokens);
  times_panels<A>(buffer.tokens, in.width, block.count, in.width, packed.first.of(block.expert),
                  in.hidden, buffer.hidden, buffer.hidden_stride);
  add_bias<T, A>(in.b_in, block.expert, block.count, in.hidden, buffer.hidden,
                 buffer.hidden_stride);
  if constexpr (kGated) {
    times_panels<A>(buffer.tokens, in.width, block.count, in.width, packed.gate.of(block.expert),
                    in.hidden, buffer.gate, buffer.hidden_stride);
    add_bias<T, A>(in.b_gate, block.expert, block.count, in.hidden, buffer.gate,
                   buffer.hidden_stride);
  }
  T* saved = static_cast<T*>(args.hidden) + block.first * in.hidden;
  T* saved_gate = saved + in.tokens * in.choices * in.hidden;
  for (int64_t r = 0; r < block.count; ++r) {
    A* row = buffer.hidden + r * buffer.hidden_stride;
    const A* gate = kGated ? buffer.gate + r * buffer.hidden_stride : nullptr;
    write_row<T, A>(row, saved + r * in.hidden, in.hidden);
    if constexpr (kGated) write_row<T, A>(gate, saved_gate + r * in.hidden, in.hidden);
    activate_row<A, kGated>(act, gate, row, in.hidden);
  }
  times_panels<A>(buffer.hidden, buffer.hidden_stride, block.count, in.hidden,
                  packed.second.of(block.expert), in.width, buffer.rows, buffer.width_stride);
  add_bias<T, A>(in.b_out, block.expert, block.count, in.width, buffer.rows, buffer.width_stride);
  for (int64_t r = 0; r < block.count; ++r) {
    const A weight = read<T, A>(static_cast<const T*>(in.weight) + in.permutation[block.first + r]);
    A* to = static_cast<A*>(args.rows) + (block.first + r) * in.width;
    for (int64_t d = 0; d < in.width; ++d)
      to[d] = weight * buffer.rows[r * buffer.width_stride + d];
  }
}

// out[n] = sum over k of rows[place of (n, k)], in the order of k; 0 for a token without experts.
template <typename T, typename A>
void combine(const RoutedArgs& in, const A* rows, T* out) {
  const int64_t total = in.tokens * in.choices;
  const Buffer<int32_t> place(total);
  for (int64_t r = 0; r < total; ++r)
    place[in.permutation[r]] = r < in.offsets[in.experts] ? static_cast<int32_t>(r) : -1;
  const int64_t blocks = (in.tokens + kRowBlock - 1) / kRowBlock;
  parallel_for(blocks, in.threads, [&](int64_t item, int) {
    const Buffer<A> sum(in.width);
    for (int64_t n = item * kRowBlock; n < min64((item + 1) * kRowBlock, in.tokens); ++n) {
      for (int64_t d = 0; d < in.width; ++d) sum[d] = 0;
      for (int64_t k = 0; k < in.choices; ++k) {
        const int64_t r = place[n * in.choices + k];
        if (r < 0) continue;
        for (int64_t d = 0; d < in.width; ++d) sum[d] += rows[r * in.width + d];
      }
      write_row<T, A>(sum, out + n * in.width, in.width);
    }
  });
}

// Whether the gradient of the hidden layer is wanted, directly or for other gradients.
inline bool wants_hidden(const RoutedBackward& args) {
  return args.grad_x != nullptr || args.grad_weight != nullptr || args.grad_w_in != nullptr ||
         args.grad_b_in != nullptr || args.grad_w_gate != nullptr || args.grad_b_gate != nullptr;
}

// One row of the hidden layer in the backward: its saved pre-activations, the gradient by its
// output, and the results. The gate's pointers are used only for gated experts.
template <typename A>
struct HiddenRow {
  const A *pre, *pre_gate, *grad;
  A *grad_hidden, *grad_gate, *weighted;
};

// Fills the results of a row, and returns the inner product of its output and gradient.
template <typename A, bool kGated>
A hidden_row_gradient(Activation act, A weight, int64_t count, const HiddenRow<A>& row) {
  Vec<A> dots = {};
  // Inlined once with a constant number of lanes, for which the copies are loads and stores.
  const auto step = [&](int64_t d0, int64_t lanes) {
    Vec<A> x = {}, g = {}, slope;
    std::memcpy(&x, (kGated ? row.pre_gate : row.pre) + d0, lanes * sizeof(A));
    std::memcpy(&g, row.grad + d0, lanes * sizeof(A));
    Vec<A> value = activate<A>(act, x, &slope);
    Vec<A> down = weight * g * slope;
    if constexpr (kGated) {
      Vec<A> hidden = {};
      std::memcpy(&hidden, row.pre + d0, lanes * sizeof(A));
      const Vec<A> through = weight * g * value;
      std::memcpy(row.grad_hidden + d0, &through, lanes * sizeof(A));
      down *= hidden;
      value *= hidden;
    }
    const Vec<A> up = weight * value;
    dots += g * value;
    std::memcpy((kGated ? row.grad_gate : row.grad_hidden) + d0, &down, lanes * sizeof(A));
    std::memcpy(row.weighted + d0, &up, lanes * sizeof(A));
  };
  int64_t d0 = 0;
  for (; d0 + kLanes<A> <= count; d0 += kLanes<A>) step(d0, kLanes<A>);
  if (d0 < count) step(d0, count - d0);
  return sum_lanes<A>(dots);
}

// Gradients of the block's hidden layer, routing weights and tokens.
template <typename T, typename A, bool kGated>
void backward_block(const RoutedBackward& args, const PackedWeights<T, A>& packed,
                    const RowBlock& block) {
  const RoutedArgs& in = args.in;
  const auto act = static_cast<Activation>(in.act);
  BlockBuffers<A> buffer(in, false);
  gather_tokens<T, A>(in, args.grad_out, block, buffer.tokens);
  // If not requested, buffer.hidden is undefined, and what is computed from it is discarded.
  if (wants_hidden(args))
    times_panels<A>(buffer.tokens, in.width, block.count, in.width, packed.first.of(block.expert),
                    in.hidden, buffer.hidden, buffer.hidden_stride);
  const Buffer<A> pre(in.hidden), pre_gate(kGated ? in.hidden : 0);  // of one row
  const int64_t gate = in.tokens * in.choices * in.hidden;           // the gate's rows start there
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t row = block.first + r, flat = in.permutation[row], at = row * in.hidden;
    const A weight = read<T, A>(static_cast<const T*>(in.weight) + flat);
    const T* saved = static_cast<const T*>(args.hidden) + at;
    read_row<T, A>(saved, pre, in.hidden);
    if constexpr (kGated) read_row<T, A>(saved + gate, pre_gate, in.hidden);
    A* grad_hidden = static_cast<A*>(args.grad_hidden) + at;
    A grad_weight = hidden_row_gradient<A, kGated>(
        act, weight, in.hidden,
        {pre, pre_gate, buffer.hidden + r * buffer.hidden_stride, grad_hidden, grad_hidden + gate,
         static_cast<A*>(args.weighted) + at});
    if (in.b_out != nullptr) {
      const T* bias = static_cast<const T*>(in.b_out) + block.expert * in.width;
      const A* grad_out = buffer.tokens + r * in.width;
      A dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < in.width; ++d) dot += grad_out[d] * read<T, A>(bias + d);
      grad_weight += dot;
    }
    if (args.grad_weight != nullptr)
      write<T, A>(static_cast<T*>(args.grad_weight) + flat, grad_weight);
  }
  if (args.grad_x == nullptr) return;
  const A* grad_hidden = static_cast<const A*>(args.grad_hidden) + block.first * in.hidden;
  times_panels<A>(grad_hidden, in.hidden, block.count, in.hidden, packed.second.of(block.expert),
                  in.width, buffer.rows, buffer.width_stride);
  if constexpr (kGated)
    times_panels<A>(grad_hidden + gate, in.hidden, block.count, in.hidden,
                    packed.gate.of(block.expert), in.width, buffer.rows, buffer.width_stride, true);
  for (int64_t r = 0; r < block.count; ++r)
    std::memcpy(static_cast<A*>(args.rows) + (block.first + r) * in.width,
                buffer.rows + r * buffer.width_stride, in.width * sizeof(A));
}

// Rows [n0, n0 + count) of grad[e] = left^T right over the expert's rows, tokens in order. One side
// is a sorted buffer (rows x hidden), the other gathered tokens (rows x width).
template <typename T, typename A>
struct WeightGradient {
  const RoutedArgs& in;
  const A* sorted;     // (rows, hidden)
  const void* tokens;  // (N, width)
  bool tokens_left;    // grad is (width, hidden), else (hidden, width)
  bool weighted_bias;  // the bias of tokens_left is weighted by the routing weights
  void *grad, *grad_bias;

  void run(int64_t e, int64_t n0, int64_t count) const {
    const int64_t columns = tokens_left ? in.hidden : in.width;
    const int64_t padded = round_up(columns, kLanes<A>);
    const int64_t sums = kOutBlock * padded;
    const Buffer<A> total(sums), right(kTokenBlock * padded), left(kTokenBlock * kOutBlock);
    const Buffer<A> bias(kOutBlock), part(kOutBlock);
    std::memset(total, 0, sums * sizeof(A));
    std::memset(bias, 0, kOutBlock * sizeof(A));
    for (int64_t first = in.offsets[e]; first < in.offsets[e + 1]; first += kTokenBlock) {
      const int64_t depth = min64(kTokenBlock, in.offsets[e + 1] - first);
      std::memset(part, 0, kOutBlock * sizeof(A));
      load(first, depth, n0, count, columns, padded, left, right, part);
      for (int64_t n = 0; n < count; ++n) bias[n] += part[n];
      if (grad == nullptr) continue;
      gemm<A>(count, padded, depth, left, 1, kOutBlock, right, padded, total, padded, true);
    }
    const int64_t rows = tokens_left ? in.width : in.hidden;
    for (int64_t n = 0; n < count; ++n) {
      const int64_t at = e * rows + n0 + n;
      if (grad) write_row<T, A>(total + n * padded, static_cast<T*>(grad) + at * columns, columns);
      if (grad_bias) write<T, A>(static_cast<T*>(grad_bias) + at, bias[n]);
    }
  }

  void load(int64_t first, int64_t depth, int64_t n0, int64_t count, int64_t columns,
            int64_t padded, A* left, A* right, A* bias) const {
    for (int64_t r = 0; r < depth; ++r) {
      const int64_t flat = in.permutation[first + r];
      const T* token = static_cast<const T*>(tokens) + flat / in.choices * in.width;
      const A* own = sorted + (first + r) * in.hidden;
      A *l = left + r * kOutBlock, *to = right + r * padded;
      if (tokens_left) {
        read_row<T, A>(token + n0, l, count);
        std::memcpy(to, own, columns * sizeof(A));
      } else {
        std::memcpy(l, own + n0, count * sizeof(A));
        read_row<T, A>(token, to, columns);
      }
      for (int64_t d = columns; d < padded; ++d) to[d] = 0;
      const A weight = weighted_bias ? read<T, A>(static_cast<const T*>(in.weight) + flat) : A(1);
      for (int64_t n = 0; n < count; ++n) bias[n] += weight * l[n];
    }
  }

  void run_all() const {
    if (grad == nullptr && grad_bias == nullptr) return;
    const int64_t rows = tokens_left ? in.width : in.hidden;
    const int64_t blocks = (rows + kOutBlock - 1) / kOutBlock;
    parallel_for(in.experts * blocks, in.threads, [&](int64_t item, int) {
      const int64_t n0 = item % blocks * kOutBlock;
      run(item / blocks, n0, min64(kOutBlock, rows - n0));
    });
  }
};

// Calls body.template operator()<whether the experts are gated>().
template <typename F>
void with_gate(const RoutedArgs& in, const F& body) {
  if (in.w_gate != nullptr)
    body.template operator()<true>();
  else
    body.template operator()<false>();
}

}  // namespace

void routed_forward(DType dtype, const RoutedForward& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    const RoutedArgs& in = args.in;
    const int64_t width = in.width, hidden = in.hidden;
    const PackedWeights<T, A> packed{
        {in, in.w_in, in.w_in_stride, width, hidden, 1, width},
        {in, in.w_out, width * hidden, hidden, width, 1, hidden},
        {in, in.w_gate, in.w_gate_stride, width, hidden, 1, width},
    };
    const Blocks blocks(in);
    with_gate(in, [&]<bool kGated>() {
      parallel_for(blocks.count, in.threads, [&](int64_t item, int) {
        forward_block<T, A, kGated>(args, packed, blocks.block[item]);
      });
    });
    combine<T, A>(in, static_cast<const A*>(args.rows), static_cast<T*>(args.out));
  });
}

void routed_backward(DType dtype, const RoutedBackward& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    const RoutedArgs& in = args.in;
    const int64_t width = in.width, hidden = in.hidden;
    const bool wants_x = args.grad_x != nullptr;
    const PackedWeights<T, A> packed{
        {in, wants_hidden(args) ? in.w_out : nullptr, width * hidden, width, hidden, hidden, 1},
        {in, wants_x ? in.w_in : nullptr, in.w_in_stride, hidden, width, width, 1},
        {in, wants_x ? in.w_gate : nullptr, in.w_gate_stride, hidden, width, width, 1},
    };
    const Blocks blocks(in);
    with_gate(in, [&]<bool kGated>() {
      parallel_for(blocks.count, in.threads, [&](int64_t item, int) {
        backward_block<T, A, kGated>(args, packed, blocks.block[item]);
      });
    });
    if (args.grad_x != nullptr)
      combine<T, A>(in, static_cast<const A*>(args.rows), static_cast<T*>(args.grad_x));
    WeightGradient<T, A>{in,
                         static_cast<const A*>(args.grad_hidden),
                         in.x,
                         false,
                         false,
                         args.grad_w_in,
                         args.grad_b_in}
        .run_all();
    WeightGradient<T, A>{in,
                         static_cast<const A*>(args.grad_hidden) + in.tokens * in.choices * hidden,
                         in.x,
                         false,
                         false,
                         args.grad_w_gate,
                         args.grad_b_gate}
        .run_all();
    WeightGradient<T, A>{in,
                         static_cast<const A*>(args.weighted),
                         args.grad_out,
                         true,
                         true,
                         args.grad_w_out,
                         args.grad_b_out}
        .run_all();
  });
}

}  // namespace flmoe::FLMOE_ISA
