// Backward of routed_mlp.
//
// Rows are processed in pieces, by expert, so that what the passes over a piece exchange stays in
// the cache. First, one item is a block of up to 96 rows of one expert: it gathers their tokens and
// output gradients once, and computes the gradients of the hidden layer, a panel at a time, of the
// routing weights and of the tokens. Then an item owns 66 rows of the gradient of w_in, w_gate or
// (transposed) w_out and adds the products of the expert's rows to it in their order, in steps that
// do not depend on threads. The gradients of a token's rows are added in the order of its experts.
// bfloat16 products take pairs in depth. In the second step depth runs over rows, so a block keeps
// its own rows and copies them to the piece with pairs of rows interleaved.
// Bound: 8 D F FLOP per row, gated 12 D F.
#pragma once

#include "cpu/activations.h"
#include "cpu/routed_rows.h"

namespace flmoe::FLMOE_ISA {

constexpr int64_t kTokens = 1024;  // whose gradients an item adds
constexpr int64_t kOutBlock = 66;  // rows of a weight's gradient per item
constexpr int64_t kDepth = 192;    // rows per product
// Rows of a piece per thread: several blocks, and a multiple of kDepth.
constexpr int64_t kPiecePerThread = 6 * kDepth;

// Whether the gradient of the hidden layer is wanted, directly or for other gradients.
inline bool wants_hidden(const RoutedBackward& args) {
  return args.grad_x != nullptr || args.grad_weight != nullptr || args.grad_w_in != nullptr ||
         args.grad_b_in != nullptr || args.grad_w_gate != nullptr || args.grad_b_gate != nullptr;
}

// Rows [first, end) of the permutation: of whole experts [begin_expert, end_expert), or a part of
// one expert's rows.
struct Piece {
  int64_t begin_expert, end_expert, first, end;
};

// Of the rows of a piece, as depth of operands. weighted: routing weight times activated hidden
// layer.
template <typename Product>
struct PieceRows {
  using A = typename Product::A;
  using E = typename Product::E;

  RowBlocks blocks;
  int64_t rows, width_stride, hidden_stride, sum_stride;
  Buffer<E> x, grad_out, grad_hidden, grad_gate, weighted;
  Buffer<A> grad_x, weight;

  PieceRows(const RoutedArgs& in, int64_t most)
      : blocks(most, in, Product::kUnit),
        rows(most + (Product::kUnit - 1) * in.experts),
        width_stride(row_stride<E>(in.width)),
        hidden_stride(row_stride<E>(in.hidden)),
        sum_stride(row_stride<A>(in.width)),
        x(rows * width_stride),
        grad_out(rows * width_stride),
        grad_hidden(rows * hidden_stride),
        grad_gate(in.w_gate == nullptr ? 0 : rows * hidden_stride),
        weighted(rows * hidden_stride),
        grad_x(rows * sum_stride),
        weight(rows) {}
};

// One panel of a hidden row: saved pre-activations, the gradient by the row's output, and the
// results, which may be in its place. The gate's pointers are used only for gated experts.
template <typename Product>
struct HiddenRow {
  const typename Product::A *pre, *pre_gate, *grad;
  typename Product::E *grad_hidden, *grad_gate, *weighted;
};

// Fills the results, in whole vectors, and adds the products of output and gradient to a vector of
// sums.
template <typename Product, bool kGated>
void hidden_row_gradient(Activation act, typename Product::A weight, int64_t count,
                         const HiddenRow<Product>& row, typename Product::A* dots) {
  using A = typename Product::A;
  Vec<A> sums = load(dots);
  // Inlined once with a constant number of lanes, for which the copies are loads.
  const auto step = [&](int64_t d0, int64_t lanes) {
    Vec<A> x = {}, g = {}, slope;
    std::memcpy(&x, (kGated ? row.pre_gate : row.pre) + d0, lanes * sizeof(A));
    std::memcpy(&g, row.grad + d0, lanes * sizeof(A));
    Vec<A> value = activate<A>(act, x, &slope);
    Vec<A> down = weight * g * slope;
    if constexpr (kGated) {
      Vec<A> hidden = {};
      std::memcpy(&hidden, row.pre + d0, lanes * sizeof(A));
      Product::put(row.grad_hidden + d0, weight * g * value);
      down *= hidden;
      value *= hidden;
    }
    sums += g * value;
    Product::put((kGated ? row.grad_gate : row.grad_hidden) + d0, down);
    Product::put(row.weighted + d0, weight * value);
  };
  int64_t d0 = 0;
  for (; d0 + kLanes<A> <= count; d0 += kLanes<A>) step(d0, kLanes<A>);
  if (d0 < count) step(d0, count - d0);
  store(dots, sums);
}

// Gradients of the routing weights of a block's rows; dots: of its hidden rows, summed by lane.
template <typename Product>
void routing_gradient(const RoutedBackward& args, const RowBlock& block,
                      const typename Product::E* grad_out, const typename Product::A* dots) {
  using T = typename Product::T;
  using A = typename Product::A;
  using E = typename Product::E;
  const RoutedArgs& in = args.in;
  for (int64_t r = 0; r < block.count && args.grad_weight != nullptr; ++r) {
    A total = sum_lanes<A>(load(dots + r * kLanes<A>));
    if (in.b_out != nullptr) {
      const T* bias = static_cast<const T*>(in.b_out) + block.expert * in.width;
      const E* grad = grad_out + r * row_stride<E>(in.width);
      A dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < in.width; ++d) dot += read<E, A>(grad + d) * read<T, A>(bias + d);
      total += dot;
    }
    write<T, A>(static_cast<T*>(args.grad_weight) + in.permutation[block.first + r], total);
  }
}

// Gradients of the tokens of a block's rows.
template <typename Product, bool kGated>
void token_gradient(const RoutedArgs& in, const RoutedWeights<Product>& packed,
                    const RowBlock& block, typename Product::E* grad_hidden,
                    typename Product::E* grad_gate, const PieceRows<Product>& piece) {
  using A = typename Product::A;
  const int64_t e = block.expert, stride = piece.hidden_stride, to_stride = piece.sum_stride;
  for (int64_t r = 0; r < block.count; ++r) {
    end_row<Product>(grad_hidden + r * stride, in.hidden, 0);
    if constexpr (kGated) end_row<Product>(grad_gate + r * stride, in.hidden, 0);
  }
  each_panel<A>(in.width, [&](int64_t n, int64_t columns) {
    A* to = piece.grad_x + block.at * to_stride + n;
    times_panel<Product>(grad_hidden, stride, block.count, in.hidden, packed.second.panel(e, n),
                         columns, to, to_stride);
    if constexpr (kGated)
      times_panel<Product>(grad_gate, stride, block.count, in.hidden, packed.gate.panel(e, n),
                           columns, to, to_stride, true);
  });
}

// Gradients of the block's hidden layer, routing weights and tokens.
template <typename Product, bool kGated>
void backward_block(const RoutedBackward& args, const RoutedWeights<Product>& packed,
                    const RowBlock& block, const PieceRows<Product>& piece) {
  using T = typename Product::T;
  using A = typename Product::A;
  using E = typename Product::E;
  constexpr int64_t kUnit = Product::kUnit, kOwn = kUnit == 1 ? 0 : kRowBlock;
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(T));
  const RoutedArgs& in = args.in;
  const int64_t e = block.expert, width = in.width, count = block.count;
  const int64_t width_stride = piece.width_stride, hidden_stride = piece.hidden_stride;
  const int64_t at_width = block.at * width_stride, at_hidden = block.at * hidden_stride;
  A* weight = piece.weight + block.at;
  // The block's rows, if those of the piece are pairs.
  const Buffer<E> own_rows(kOwn * width_stride), own_hidden(kOwn * hidden_stride);
  const Buffer<E> own_gate(kGated ? kOwn * hidden_stride : 0), own_weighted(kOwn * kPanel<A>);
  const Buffer<A> own_panel(kOwn * kPanel<A>);
  const auto rows_of = [](const Buffer<E>& own, E* of_piece) {
    return kOwn == 0 ? of_piece : own.data();
  };
  const auto gather = [&](const void* source, E* of_piece) {
    E* to = rows_of(own_rows, of_piece);
    gather_tokens<Product>(in, source, block, to);
    Product::put_depth(to, width_stride, count, width, of_piece, width_stride);
    return to;
  };
  if (args.grad_w_in != nullptr || args.grad_w_gate != nullptr) gather(in.x, piece.x + at_width);
  const E* grad_out = gather(args.grad_out, piece.grad_out + at_width);
  E* grad_hidden = rows_of(own_hidden, piece.grad_hidden + at_hidden);
  E* grad_gate = kGated ? rows_of(own_gate, piece.grad_gate + at_hidden) : nullptr;
  for (int64_t r = 0; r < count; ++r)
    weight[r] = read<T, A>(static_cast<const T*>(in.weight) + in.permutation[block.first + r]);
  const Buffer<A> dots(count * kLanes<A>), pre(kPanel<A>), pre_gate(kPanel<A>);
  std::memset(dots, 0, count * kLanes<A> * sizeof(A));
  each_panel<A>(in.hidden, [&](int64_t n, int64_t columns) {
    A* panel = kOwn == 0 ? reinterpret_cast<A*>(grad_hidden + n) : own_panel.data();
    E* weighted = rows_of(own_weighted, piece.weighted + at_hidden + n);
    const int64_t stride = kOwn == 0 ? hidden_stride : kPanel<A>;  // of both
    // The saved rows are no longer in the cache; they are loaded during the product.
    const T* hidden = static_cast<const T*>(args.hidden) + block.first * in.hidden + n;
    const int64_t layer = in.tokens * in.choices * in.hidden;
    for (int64_t r = 0; r < (1 + kGated) * count; ++r)
      for (int64_t d = 0; d < columns; d += kLine)
        __builtin_prefetch(hidden + r / count * layer + r % count * in.hidden + d);
    // If not requested, the panel is undefined, and what is computed from it is discarded.
    if (wants_hidden(args))
      times_panel<Product>(grad_out, width_stride, count, width, packed.first.panel(e, n), columns,
                           panel, stride);
    for (int64_t r = 0; r < count; ++r) {
      const T* saved = hidden + r * in.hidden;
      read_row<T, A>(saved, pre, columns);
      if constexpr (kGated) read_row<T, A>(saved + layer, pre_gate, columns);
      const int64_t at = r * hidden_stride + n;
      const HiddenRow<Product> row{pre,
                                   pre_gate,
                                   panel + r * stride,
                                   grad_hidden + at,
                                   kGated ? grad_gate + at : nullptr,
                                   weighted + r * stride};
      hidden_row_gradient<Product, kGated>(static_cast<Activation>(in.act), weight[r], columns, row,
                                           dots + r * kLanes<A>);
    }
    const int64_t at = at_hidden + kUnit * n;
    Product::put_depth(weighted, stride, count, columns, piece.weighted + at, hidden_stride);
    Product::put_depth(grad_hidden + n, hidden_stride, count, columns, piece.grad_hidden + at,
                       hidden_stride);
    if constexpr (kGated)
      Product::put_depth(grad_gate + n, hidden_stride, count, columns, piece.grad_gate + at,
                         hidden_stride);
  });
  routing_gradient<Product>(args, block, grad_out, dots);
  if (args.grad_x != nullptr)
    token_gradient<Product, kGated>(in, packed, block, grad_hidden, grad_gate, piece);
}

// sums += columns of m (rows x columns, as depth of an operand), each row times its weight unless
// that is null.
template <typename Product>
void add_columns(const typename Product::E* m, int64_t stride, int64_t rows, int64_t columns,
                 const typename Product::A* weight, typename Product::A* sums) {
  using A = typename Product::A;
  constexpr int64_t kUnit = Product::kUnit;
  const Buffer<A> part(columns);  // bounds the rounding error, as in gemm
  std::memset(part, 0, columns * sizeof(A));
  for (int64_t r = 0; r < rows; r += kUnit) {
    A factor[kUnit];
    for (int64_t i = 0; i < kUnit; ++i)
      factor[i] = r + i >= rows ? A(0) : weight == nullptr ? A(1) : weight[r + i];
    Product::add_depth(m + r * stride, factor, columns, part);
  }
  for (int64_t n = 0; n < columns; ++n) sums[n] += part[n];
}

// Gradient of one weight, left^T right over an expert's rows (hidden x width), and of its bias: the
// sums of left, or for w_out, whose gradient is transposed, of the weighted rows of right.
template <typename Product>
struct RoutedGradient {
  using T = typename Product::T;
  using A = typename Product::A;
  using E = typename Product::E;
  static constexpr int64_t kUnit = Product::kUnit;

  const RoutedArgs& in;
  const PieceRows<Product>& rows;
  const E *left, *right;
  void *grad, *grad_bias;
  bool of_out;
  int64_t padded;
  Buffer<A> parts, bias_parts;  // of an expert with rows in several pieces

  RoutedGradient(const RoutedArgs& args, const PieceRows<Product>& piece, const E* left_rows,
                 const E* right_rows, void* weight, void* bias, bool is_out)
      : in(args),
        rows(piece),
        left(left_rows),
        right(right_rows),
        grad(weight),
        grad_bias(bias),
        of_out(is_out),
        padded(round_up(args.width, kLanes<A>)),
        parts(requested() ? args.hidden * padded : 0),
        bias_parts(requested() ? args.hidden + args.width : 0) {}

  bool requested() const { return grad != nullptr || grad_bias != nullptr; }

  // Adds the piece's rows of expert e to the rows [n0, n0 + count) of the gradient; stores them
  // after the expert's last row.
  void run(const Piece& piece, int64_t e, int64_t n0) const {
    const int64_t count = min64(kOutBlock, in.hidden - n0), begin = in.offsets[e];
    const int64_t end = in.offsets[e + 1], stop = min64(end, piece.end);
    const bool whole = piece.first <= begin && stop == end;
    const Buffer<A> own(whole ? count * padded : 0), own_bias(whole ? in.hidden + in.width : 0);
    A* total = whole ? own.data() : parts + n0 * padded;
    A* bias = (whole ? own_bias : bias_parts) + (of_out ? 0 : n0);
    const bool has_bias = grad_bias != nullptr && (!of_out || n0 == 0);
    const int64_t biases = of_out ? in.width : count;
    int64_t r = begin > piece.first ? begin : piece.first, at = rows.blocks.start[e];
    if (r == begin && has_bias) std::memset(bias, 0, biases * sizeof(A));
    if (begin == end) std::memset(total, 0, count * padded * sizeof(A));
    for (; r < stop; r += kDepth, at += kDepth) {
      const int64_t depth = min64(kDepth, stop - r);
      const E* l = left + at * rows.hidden_stride + kUnit * n0;
      const E* t = right + at * rows.width_stride;
      if (grad != nullptr)
        Product::gemm(count, padded, depth, l, kUnit, kUnit * rows.hidden_stride, t,
                      kUnit * rows.width_stride, total, padded, r > begin);
      if (has_bias && of_out)
        add_columns<Product>(t, rows.width_stride, depth, biases, rows.weight + at, bias);
      else if (has_bias)
        add_columns<Product>(l, rows.hidden_stride, depth, biases, nullptr, bias);
    }
    if (stop < end) return;
    if (grad != nullptr) store_rows(e, n0, count, total);
    if (has_bias)
      write_row<T, A>(bias, static_cast<T*>(grad_bias) + (of_out ? e * biases : e * in.hidden + n0),
                      biases);
  }

  void store_rows(int64_t e, int64_t n0, int64_t count, const A* total) const {
    T* to = static_cast<T*>(grad) + e * in.hidden * in.width;
    if (of_out) {
      for (int64_t d = 0; d < in.width; ++d)
        for (int64_t n = 0; n < count; ++n)
          write<T, A>(to + d * in.hidden + n0 + n, total[n * padded + d]);
    } else {
      for (int64_t n = 0; n < count; ++n)
        write_row<T, A>(total + n * padded, to + (n0 + n) * in.width, in.width);
    }
  }
};

// Calls body(piece) with pieces of up to `most` rows: many experts, or a part of one.
template <typename F>
void each_piece(const RoutedArgs& in, int64_t most, const F& body) {
  const int32_t* offsets = in.offsets;
  for (int64_t e = 0, next; e < in.experts; e = next) {
    for (next = e; next < in.experts && offsets[next + 1] - offsets[e] <= most;) ++next;
    if (next > e) {
      body(Piece{e, next, offsets[e], offsets[next]});
      continue;
    }
    next = e + 1;
    for (int64_t first = offsets[e]; first < offsets[next]; first += most)
      body(Piece{e, next, first, min64(first + most, offsets[next])});
  }
}

// Adds the gradients of a piece's rows to the sums of the tokens [first, end), by expert.
template <typename Product>
void add_to_tokens(const RoutedArgs& in, const Piece& piece, const PieceRows<Product>& rows,
                   int64_t first, int64_t end, typename Product::A* sums) {
  using A = typename Product::A;
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A)), kAhead = 4;
  for (int64_t e = piece.begin_expert; e < piece.end_expert; ++e) {
    const int64_t begin = in.offsets[e] > piece.first ? in.offsets[e] : piece.first;
    const int64_t stop = min64(in.offsets[e + 1], piece.end);
    const auto sum_of = [&](int64_t r) { return sums + in.permutation[r] / in.choices * in.width; };
    int64_t r = find_row(in.permutation, begin, stop, first * in.choices);
    for (; r < stop && in.permutation[r] < end * in.choices; ++r) {
      const int64_t at = rows.blocks.start[e] + r - begin;
      const A *row = rows.grad_x + at * rows.sum_stride, *ahead;
      // Tokens of an expert are not adjacent, so the processor does not prefetch them.
      ahead = sum_of(min64(r + kAhead, stop - 1));
      for (int64_t d = 0; d < in.width; d += kLine) __builtin_prefetch(ahead + d, 1);
      A* sum = sum_of(r);
#pragma omp simd
      for (int64_t d = 0; d < in.width; ++d) sum[d] += row[d];
    }
  }
}

template <typename Product, bool kGated>
void backward_pieces(const RoutedBackward& args, const RoutedWeights<Product>& packed) {
  using T = typename Product::T;
  using A = typename Product::A;
  const RoutedArgs& in = args.in;
  const int64_t most = (in.threads > 1 ? in.threads : 1) * kPiecePerThread;
  PieceRows<Product> rows(in, min64(most, in.tokens * in.choices));
  const RoutedGradient<Product> gradients[] = {
      {in, rows, rows.grad_hidden, rows.x, args.grad_w_in, args.grad_b_in, false},
      {in, rows, rows.weighted, rows.grad_out, args.grad_w_out, args.grad_b_out, true},
      {in, rows, rows.grad_gate, rows.x, args.grad_w_gate, args.grad_b_gate, false}};
  const int64_t out_blocks = (in.hidden + kOutBlock - 1) / kOutBlock, kinds = 2 + kGated;
  // Sums of the tokens' gradients: grad_x itself, unless its type is narrower.
  constexpr bool kDirect = sizeof(T) == sizeof(A);
  const int64_t shares = args.grad_x == nullptr ? 0 : (in.tokens + kTokens - 1) / kTokens;
  const Buffer<A> own_sums(kDirect || shares == 0 ? 0 : in.tokens * in.width);
  A* sums = kDirect ? static_cast<A*>(args.grad_x) : own_sums.data();
  const auto each_share = [&](const auto& body) {
    parallel_for(shares, in.threads, [&](int64_t item, int) {
      body(item * kTokens, min64((item + 1) * kTokens, in.tokens));
    });
  };
  each_share([&](int64_t first, int64_t end) {
    std::memset(sums + first * in.width, 0, (end - first) * in.width * sizeof(A));
  });
  RowBlocks& blocks = rows.blocks;
  each_piece(in, most, [&](const Piece& piece) {
    blocks.clear();
    for (int64_t e = piece.begin_expert; e < piece.end_expert; ++e)
      blocks.add(e, piece.first > in.offsets[e] ? piece.first : in.offsets[e],
                 min64(piece.end, in.offsets[e + 1]));
    parallel_for(blocks.count, in.threads, [&](int64_t item, int) {
      backward_block<Product, kGated>(args, packed, blocks.block[item], rows);
    });
    const int64_t products = (piece.end_expert - piece.begin_expert) * kinds * out_blocks;
    parallel_for(products + shares, in.threads, [&](int64_t item, int) {
      const auto& gradient = gradients[item / out_blocks % kinds];
      if (item >= products)
        add_to_tokens<Product>(in, piece, rows, (item - products) * kTokens,
                               min64((item - products + 1) * kTokens, in.tokens), sums);
      else if (gradient.requested())
        gradient.run(piece, piece.begin_expert + item / out_blocks / kinds,
                     item % out_blocks * kOutBlock);
    });
  });
  if constexpr (!kDirect)
    each_share([&](int64_t first, int64_t end) {
      write_row<T, A>(sums + first * in.width, static_cast<T*>(args.grad_x) + first * in.width,
                      (end - first) * in.width);
    });
}

template <typename Product>
void run_routed_backward(const RoutedBackward& args) {
  const RoutedArgs& in = args.in;
  const int64_t width = in.width, hidden = in.hidden;
  const bool wants_x = args.grad_x != nullptr;
  const RoutedWeights<Product> packed{
      {in, wants_hidden(args) ? in.w_out : nullptr, width * hidden, width, hidden, true},
      {in, wants_x ? in.w_in : nullptr, in.w_in_stride, hidden, width, true},
      {in, wants_x ? in.w_gate : nullptr, in.w_gate_stride, hidden, width, true},
  };
  with_gate(in, [&]<bool kGated>() { backward_pieces<Product, kGated>(args, packed); });
}

}  // namespace flmoe::FLMOE_ISA
