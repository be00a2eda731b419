// routed_mlp: applies to every token the MLPs of its experts.
//
// Forward: one item is a block of up to 96 rows of one expert. It gathers their tokens, multiplies
// by the packed first weight, applies bias and activation in place and multiplies by the second:
// the hidden layer stays in the cache (its pre-activation is written once, for the backward). The
// rows' outputs are then added per token in the order of its choices, so that the result depends
// neither on threads nor on which expert runs first. Backward: the same blocks compute the
// gradients of the hidden layer, the routing weights and the gathered tokens; then an item owns a
// block of rows of a weight's gradient and sums over the expert's tokens in order. Bound: 4 D F
// FLOP per row forward, 8 D F backward.
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

// Both weights packed for one direction, shared by the threads.
template <typename T, typename A>
struct PackedWeights {
  int64_t first_size, second_size;  // of one expert
  Buffer<A> first, second;

  // depth -> middle -> columns; element (k, n) of the first factor lies at k * ks1 + n * ns1. A
  // null weight is not used.
  PackedWeights(const RoutedArgs& in, const void* w1, int64_t ks1, int64_t ns1, const void* w2,
                int64_t ks2, int64_t ns2)
      : first_size(packed_size<A>(in.width, in.hidden)),
        second_size(packed_size<A>(in.hidden, in.width)),
        first(w1 == nullptr ? 0 : in.experts * first_size),
        second(w2 == nullptr ? 0 : in.experts * second_size) {
    if (w1 != nullptr)
      pack_all<T, A>(static_cast<const T*>(w1), in.experts, in.width, in.hidden, ks1, ns1,
                     in.threads, first);
    if (w2 != nullptr)
      pack_all<T, A>(static_cast<const T*>(w2), in.experts, in.hidden, in.width, ks2, ns2,
                     in.threads, second);
  }
};

// out (rows x columns, padded to panels) = in (rows x depth, in_stride) times packed panels.
template <typename A>
void times_panels(const A* in, int64_t in_stride, int64_t rows, int64_t depth, const A* panels,
                  int64_t columns, A* out, int64_t out_stride) {
  for (int64_t n = 0; n < columns; n += kPanel<A>)
    gemm<A>(rows, round_up(min64(kPanel<A>, columns - n), kLanes<A>), depth, in, in_stride, 1,
            panels + n * depth, kPanel<A>, out + n, out_stride, false);
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
  Buffer<A> tokens, hidden, rows;

  explicit BlockBuffers(const RoutedArgs& in)
      : hidden_stride(panels_of<A>(in.hidden) * kPanel<A>),
        width_stride(panels_of<A>(in.width) * kPanel<A>),
        tokens(kRowBlock * in.width),
        hidden(kRowBlock * hidden_stride),
        rows(kRowBlock * width_stride) {}
};

template <typename T, typename A>
void forward_block(const RoutedForward& args, const PackedWeights<T, A>& packed,
                   const RowBlock& block) {
  const RoutedArgs& in = args.in;
  const auto act = static_cast<Activation>(in.act);
  BlockBuffers<A> buffer(in);
  gather_tokens<T, A>(in, in.x, block, buffer.tokens);
  times_panels<A>(buffer.tokens, in.width, block.count, in.width,
                  packed.first + block.expert * packed.first_size, in.hidden, buffer.hidden,
                  buffer.hidden_stride);
  add_bias<T, A>(in.b_in, block.expert, block.count, in.hidden, buffer.hidden,
                 buffer.hidden_stride);
  for (int64_t r = 0; r < block.count; ++r) {
    A* row = buffer.hidden + r * buffer.hidden_stride;
    write_row<T, A>(row, static_cast<T*>(args.hidden) + (block.first + r) * in.hidden, in.hidden);
    for (int64_t d = 0; d < in.hidden; d += kLanes<A>)
      store(row + d, activate<A>(act, load(row + d), nullptr));
  }
  times_panels<A>(buffer.hidden, buffer.hidden_stride, block.count, in.hidden,
                  packed.second + block.expert * packed.second_size, in.width, buffer.rows,
                  buffer.width_stride);
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
         args.grad_b_in != nullptr;
}

// Gradients of the block's hidden layer, routing weights and tokens.
template <typename T, typename A>
void backward_block(const RoutedBackward& args, const PackedWeights<T, A>& packed,
                    const RowBlock& block) {
  const RoutedArgs& in = args.in;
  const auto act = static_cast<Activation>(in.act);
  BlockBuffers<A> buffer(in);
  gather_tokens<T, A>(in, args.grad_out, block, buffer.tokens);
  // If not requested, buffer.hidden is undefined, and what is computed from it is discarded.
  if (wants_hidden(args))
    times_panels<A>(buffer.tokens, in.width, block.count, in.width,
                    packed.first + block.expert * packed.first_size, in.hidden, buffer.hidden,
                    buffer.hidden_stride);
  const Buffer<A> pre(in.hidden);  // of one row
  for (int64_t r = 0; r < block.count; ++r) {
    const int64_t row = block.first + r, flat = in.permutation[row];
    const A weight = read<T, A>(static_cast<const T*>(in.weight) + flat);
    read_row<T, A>(static_cast<const T*>(args.hidden) + row * in.hidden, pre, in.hidden);
    A* grad = buffer.hidden + r * buffer.hidden_stride;
    A* grad_hidden = static_cast<A*>(args.grad_hidden) + row * in.hidden;
    A* weighted = static_cast<A*>(args.weighted) + row * in.hidden;
    A grad_weight = 0;
    for (int64_t d0 = 0; d0 < in.hidden; d0 += kLanes<A>) {
      const int64_t lanes = min64(kLanes<A>, in.hidden - d0);
      Vec<A> x = {}, slope;
      std::memcpy(&x, pre + d0, lanes * sizeof(A));
      const Vec<A> value = activate<A>(act, x, &slope), g = load(grad + d0);
      const Vec<A> down = weight * g * slope, up = weight * value, product = g * value;
      for (int64_t lane = 0; lane < lanes; ++lane) grad_weight += product[lane];
      std::memcpy(grad_hidden + d0, &down, lanes * sizeof(A));
      std::memcpy(weighted + d0, &up, lanes * sizeof(A));
    }
    if (in.b_out != nullptr) {
      const T* bias = static_cast<const T*>(in.b_out) + block.expert * in.width;
      for (int64_t d = 0; d < in.width; ++d)
        grad_weight += buffer.tokens[r * in.width + d] * read<T, A>(bias + d);
    }
    if (args.grad_weight != nullptr)
      write<T, A>(static_cast<T*>(args.grad_weight) + flat, grad_weight);
  }
  if (args.grad_x == nullptr) return;
  times_panels<A>(static_cast<const A*>(args.grad_hidden) + block.first * in.hidden, in.hidden,
                  block.count, in.hidden, packed.second + block.expert * packed.second_size,
                  in.width, buffer.rows, buffer.width_stride);
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

}  // namespace

void routed_forward(DType dtype, const RoutedForward& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    const RoutedArgs& in = args.in;
    const PackedWeights<T, A> packed(in, in.w_in, 1, in.width, in.w_out, 1, in.hidden);
    const Blocks blocks(in);
    parallel_for(blocks.count, in.threads,
                 [&](int64_t item, int) { forward_block<T, A>(args, packed, blocks.block[item]); });
    combine<T, A>(in, static_cast<const A*>(args.rows), static_cast<T*>(args.out));
  });
}

void routed_backward(DType dtype, const RoutedBackward& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    const RoutedArgs& in = args.in;
    const PackedWeights<T, A> packed(in, wants_hidden(args) ? in.w_out : nullptr, in.hidden, 1,
                                     args.grad_x != nullptr ? in.w_in : nullptr, in.width, 1);
    const Blocks blocks(in);
    parallel_for(blocks.count, in.threads, [&](int64_t item, int) {
      backward_block<T, A>(args, packed, blocks.block[item]);
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
