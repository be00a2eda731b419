// Backward of routed_mlp.
//
// Rows are processed in pieces, by expert, so that what the passes over a piece exchange stays in
// the cache. First, one item is a block of up to 96 rows of one expert: it gathers their tokens and
// output gradients once, and computes the gradients of the hidden layer, a panel at a time, of the
// routing weights and of the tokens. Then an item owns 66 rows of the gradient of w_in, w_gate or
// (transposed) w_out and adds the products of the expert's rows to it in their order, in steps that
// do not depend on threads. The gradients of a token's rows are added in the order of its experts.
// Bound: 8 D F FLOP per row, gated 12 D F.
#include "cpu/activations.h"
#include "cpu/routed_rows.h"

namespace flmoe::FLMOE_ISA {
namespace {

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

// Of the rows of a piece. weighted: routing weight times activated hidden layer.
template <typename A>
struct PieceRows {
  int64_t width_stride, hidden_stride;
  Buffer<A> x, grad_out, grad_x, grad_hidden, grad_gate, weighted, weight;

  PieceRows(const RoutedArgs& in, int64_t rows)
      : width_stride(row_stride<A>(in.width)),
        hidden_stride(row_stride<A>(in.hidden)),
        x(rows * width_stride),
        grad_out(rows * width_stride),
        grad_x(rows * width_stride),
        grad_hidden(rows * hidden_stride),
        grad_gate(in.w_gate == nullptr ? 0 : rows * hidden_stride),
        weighted(rows * hidden_stride),
        weight(rows) {}
};

// One panel of a hidden row: saved pre-activations, and the results. grad_hidden holds the gradient
// by the row's output at first. The gate's pointers are used only for gated experts.
template <typename A>
struct HiddenRow {
  const A *pre, *pre_gate;
  A *grad_hidden, *grad_gate, *weighted;
};

// Fills the results, and adds the products of output and gradient to a vector of sums.
template <typename A, bool kGated>
void hidden_row_gradient(Activation act, A weight, int64_t count, const HiddenRow<A>& row,
                         A* dots) {
  Vec<A> sums = load(dots);
  // Inlined once with a constant number of lanes, for which the copies are loads and stores.
  const auto step = [&](int64_t d0, int64_t lanes) {
    Vec<A> x = {}, g = {}, slope;
    std::memcpy(&x, (kGated ? row.pre_gate : row.pre) + d0, lanes * sizeof(A));
    std::memcpy(&g, row.grad_hidden + d0, lanes * sizeof(A));
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
    sums += g * value;
    std::memcpy((kGated ? row.grad_gate : row.grad_hidden) + d0, &down, lanes * sizeof(A));
    std::memcpy(row.weighted + d0, &up, lanes * sizeof(A));
  };
  int64_t d0 = 0;
  for (; d0 + kLanes<A> <= count; d0 += kLanes<A>) step(d0, kLanes<A>);
  if (d0 < count) step(d0, count - d0);
  store(dots, sums);
}

// Gradients of the block's hidden layer, routing weights and tokens.
template <typename T, typename A, bool kGated>
void backward_block(const RoutedBackward& args, const PackedWeights<T, A>& packed,
                    const RowBlock& block, const PieceRows<A>& piece) {
  const RoutedArgs& in = args.in;
  const int64_t e = block.expert, width = in.width, count = block.count;
  const int64_t width_stride = piece.width_stride, hidden_stride = piece.hidden_stride;
  A* grad_out = piece.grad_out + block.at * width_stride;
  A *grad_hidden = piece.grad_hidden + block.at * hidden_stride, *weight = piece.weight + block.at;
  A* grad_gate = kGated ? piece.grad_gate + block.at * hidden_stride : nullptr;
  gather_tokens<T, A>(in, args.grad_out, block, grad_out);
  if (args.grad_w_in != nullptr || args.grad_w_gate != nullptr)
    gather_tokens<T, A>(in, in.x, block, piece.x + block.at * width_stride);
  for (int64_t r = 0; r < count; ++r)
    weight[r] = read<T, A>(static_cast<const T*>(in.weight) + in.permutation[block.first + r]);
  const Buffer<A> dots(count * kLanes<A>), pre(kPanel<A>), pre_gate(kPanel<A>);
  std::memset(dots, 0, count * kLanes<A> * sizeof(A));
  each_panel<A>(in.hidden, [&](int64_t n, int64_t columns) {
    // If not requested, grad_hidden is undefined, and what is computed from it is discarded.
    if (wants_hidden(args))
      times_panel<A>(grad_out, width_stride, count, width, packed.first.panel(e, n), columns,
                     grad_hidden + n, hidden_stride);
    for (int64_t r = 0; r < count; ++r) {
      const T* saved = static_cast<const T*>(args.hidden) + (block.first + r) * in.hidden + n;
      read_row<T, A>(saved, pre, columns);
      if constexpr (kGated)
        read_row<T, A>(saved + in.tokens * in.choices * in.hidden, pre_gate, columns);
      const int64_t at = r * hidden_stride + n;
      const HiddenRow<A> row{pre, pre_gate, grad_hidden + at, kGated ? grad_gate + at : nullptr,
                             piece.weighted + block.at * hidden_stride + at};
      hidden_row_gradient<A, kGated>(static_cast<Activation>(in.act), weight[r], columns, row,
                                     dots + r * kLanes<A>);
    }
  });
  for (int64_t r = 0; r < count && args.grad_weight != nullptr; ++r) {
    A total = sum_lanes<A>(load(dots + r * kLanes<A>));
    if (in.b_out != nullptr) {
      const T* bias = static_cast<const T*>(in.b_out) + e * width;
      const A* grad = grad_out + r * width_stride;
      A dot = 0;
#pragma omp simd reduction(+ : dot)
      for (int64_t d = 0; d < width; ++d) dot += grad[d] * read<T, A>(bias + d);
      total += dot;
    }
    write<T, A>(static_cast<T*>(args.grad_weight) + in.permutation[block.first + r], total);
  }
  if (args.grad_x == nullptr) return;
  A* rows = piece.grad_x + block.at * width_stride;
  each_panel<A>(width, [&](int64_t n, int64_t columns) {
    times_panel<A>(grad_hidden, hidden_stride, count, in.hidden, packed.second.panel(e, n), columns,
                   rows + n, width_stride);
    if constexpr (kGated)
      times_panel<A>(grad_gate, hidden_stride, count, in.hidden, packed.gate.panel(e, n), columns,
                     rows + n, width_stride, true);
  });
}

// sums += columns of m (rows x columns), each row times its weight unless that is null.
template <typename A>
void add_columns(const A* m, int64_t stride, int64_t rows, int64_t columns, const A* weight,
                 A* sums) {
  const Buffer<A> part(columns);  // bounds the rounding error, as in gemm
  std::memset(part, 0, columns * sizeof(A));
  for (int64_t r = 0; r < rows; ++r) {
    const A factor = weight == nullptr ? A(1) : weight[r];
    for (int64_t n = 0; n < columns; ++n) part[n] += factor * m[r * stride + n];
  }
  for (int64_t n = 0; n < columns; ++n) sums[n] += part[n];
}

// Gradient of one weight, left^T right over an expert's rows (hidden x width), and of its bias: the
// sums of left, or for w_out, whose gradient is transposed, of the weighted rows of right.
template <typename T, typename A>
struct WeightGradient {
  const RoutedArgs& in;
  const PieceRows<A>& rows;
  const A *left, *right;
  void *grad, *grad_bias;
  bool of_out;
  int64_t padded;
  Buffer<A> parts, bias_parts;  // of an expert with rows in several pieces

  WeightGradient(const RoutedArgs& args, const PieceRows<A>& piece, const A* left_rows,
                 const A* right_rows, void* weight, void* bias, bool is_out)
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
    int64_t r = begin > piece.first ? begin : piece.first;
    if (r == begin && has_bias) std::memset(bias, 0, biases * sizeof(A));
    if (begin == end) std::memset(total, 0, count * padded * sizeof(A));
    for (; r < stop; r += kDepth) {
      const int64_t depth = min64(kDepth, stop - r), at = r - piece.first;
      const A *l = left + at * rows.hidden_stride + n0, *t = right + at * rows.width_stride;
      if (grad != nullptr)
        gemm<A>(count, padded, depth, l, 1, rows.hidden_stride, t, rows.width_stride, total, padded,
                r > begin);
      if (has_bias && of_out)
        add_columns<A>(t, rows.width_stride, depth, biases, rows.weight + at, bias);
      else if (has_bias)
        add_columns<A>(l, rows.hidden_stride, depth, biases, nullptr, bias);
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
template <typename A>
void add_to_tokens(const RoutedArgs& in, const Piece& piece, const PieceRows<A>& rows,
                   int64_t first, int64_t end, A* sums) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(A)), kAhead = 4;
  for (int64_t e = piece.begin_expert; e < piece.end_expert; ++e) {
    const int64_t begin = in.offsets[e] > piece.first ? in.offsets[e] : piece.first;
    const int64_t stop = min64(in.offsets[e + 1], piece.end);
    const auto sum_of = [&](int64_t r) { return sums + in.permutation[r] / in.choices * in.width; };
    int64_t r = find_row(in.permutation, begin, stop, first * in.choices);
    for (; r < stop && in.permutation[r] < end * in.choices; ++r) {
      const A *row = rows.grad_x + (r - piece.first) * rows.width_stride, *ahead;
      // Tokens of an expert are not adjacent, so the processor does not prefetch them.
      ahead = sum_of(min64(r + kAhead, stop - 1));
      for (int64_t d = 0; d < in.width; d += kLine) __builtin_prefetch(ahead + d, 1);
      A* sum = sum_of(r);
#pragma omp simd
      for (int64_t d = 0; d < in.width; ++d) sum[d] += row[d];
    }
  }
}

template <typename T, typename A, bool kGated>
void backward_pieces(const RoutedBackward& args, const PackedWeights<T, A>& packed) {
  const RoutedArgs& in = args.in;
  const int64_t most = (in.threads > 1 ? in.threads : 1) * kPiecePerThread;
  const PieceRows<A> rows(in, min64(most, in.tokens * in.choices));
  const WeightGradient<T, A> gradients[] = {
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
  RowBlocks blocks(min64(most, in.tokens * in.choices), in);
  each_piece(in, most, [&](const Piece& piece) {
    blocks.clear();
    for (int64_t e = piece.begin_expert; e < piece.end_expert; ++e)
      blocks.add(e, piece.first > in.offsets[e] ? piece.first : in.offsets[e],
                 min64(piece.end, in.offsets[e + 1]));
    parallel_for(blocks.count, in.threads, [&](int64_t item, int) {
      backward_block<T, A, kGated>(args, packed, blocks.block[item], rows);
    });
    const int64_t products = (piece.end_expert - piece.begin_expert) * kinds * out_blocks;
    parallel_for(products + shares, in.threads, [&](int64_t item, int) {
      const auto& gradient = gradients[item / out_blocks % kinds];
      if (item >= products)
        add_to_tokens<A>(in, piece, rows, (item - products) * kTokens,
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

}  // namespace

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
    with_gate(in, [&]<bool kGated>() { backward_pieces<T, A, kGated>(args, packed); });
  });
}

}  // namespace flmoe::FLMOE_ISA
