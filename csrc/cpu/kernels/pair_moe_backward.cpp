// pair_moe backward: gradients of q, k, a, c and the gate's bias; recomputes the probabilities.
//
// With G the gradient of y:
//
//     h_i   = (s2 + s3 a_i) * G_i
//     m_i   = grad mass_i + s1 G_i . a_i
//     dp_ij = m_i + h_i . c_j
//     d_ij  = p_e (dp_e - sum over experts of p dp)
//     dq_i  = scale sum_j d_ij k_j    dk_j = scale sum_i d_ij q_i    dbias = sum_ij d_ij
//     dc_j  = sum_i p_ij h_i          da_i = s1 G_i mass_i + s3 G_i * sum_j p_ij c_j
//
// Both sides are split into chunks. An item is a chunk of rows and processes the chunks of columns
// in rounds: within a round no two items share a row or a column, so every gradient is summed in a
// fixed order, without atomics. If one side is so short that too few items fit into a round, groups
// of items use copies of that side's gradients, which are summed at the end. Bound: 6 R FLOP per
// pair and expert, 4 V more if the message from side b varies with the row (with "pool" only for
// synergy), 2 V more for synergy; a gradient that is not wanted saves its products. Traffic: both
// sides once per pair of chunks.
#include "cpu/pair_gate.h"

namespace flmoe::FLMOE_ISA {
namespace {

template <typename A>
struct BackwardTile {
  A* pairs;     // logits in, d out
  A* messages;  // h . c in, for the experts of `products`; p out, for those of `kept`
  const A *bias, *row_part, *column_part;
  A* mass;       // += sums of p over columns
  A* grad_bias;  // += sums of d, a whole vector per expert
  A scale;       // of d as it is stored
  uint32_t products, kept;
  int64_t row_stride, rows, columns, top_k;  // row_stride: between experts of row_part and mass
};

struct BackwardGate {
  template <typename A, int E, bool kTopK>
  static void run(const BackwardTile<A>& tile) {
    Vec<A> bias_sums[E];
    for (int e = 0; e < E; ++e) bias_sums[e] = load(tile.grad_bias + e * kLanes<A>);
    for (int64_t i = 0; i < tile.rows; ++i) {
      A *at = tile.pairs + i * kTileRow, *with = tile.messages + i * kTileRow;
      Vec<A> sums[E] = {};
      for (int64_t j = 0; j < tile.columns; j += kLanes<A>) {
        Vec<A> p[E], dp[E], mean = {};
#pragma GCC unroll 8
        for (int e = 0; e < E; ++e) p[e] = load(at + e * kTileExpert + j) + tile.bias[e];
        gate<A, E, kTopK>(p, tile.top_k);
        if (j + kLanes<A> > tile.columns)
          for (int e = 0; e < E; ++e) p[e] = keep_first<A>(p[e], tile.columns - j);
#pragma GCC unroll 8
        for (int e = 0; e < E; ++e) {
          dp[e] =
              tile.row_part[e * tile.row_stride + i] + load(tile.column_part + e * kPairBlock + j);
          if (has(tile.products, e)) dp[e] += load(with + e * kTileExpert + j);
          // An expert that was not selected for the pair has no part, whatever its values are.
          if constexpr (kTopK) dp[e] = p[e] == A(0) ? Vec<A>{} : dp[e];
          mean += p[e] * dp[e];
        }
#pragma GCC unroll 8
        for (int e = 0; e < E; ++e) {
          Vec<A> d = p[e] * (dp[e] - mean);
          if constexpr (kTopK) d = p[e] == A(0) ? Vec<A>{} : d;
          sums[e] += p[e];
          bias_sums[e] += d;
          store(at + e * kTileExpert + j, d * tile.scale);
          if (has(tile.kept, e)) store(with + e * kTileExpert + j, p[e]);
        }
      }
      for (int e = 0; e < E; ++e) tile.mass[e * tile.row_stride + i] += sum_lanes<A>(sums[e]);
    }
    for (int e = 0; e < E; ++e) store(tile.grad_bias + e * kLanes<A>, bias_sums[e]);
  }
};

template <typename A>
void add(const A* in, A* out, int64_t n) {
  for (int64_t d = 0; d < n; ++d) out[d] += in[d];
}

// Destination of gradients: those of the call or a group's copies, null if not wanted, and whether
// to accumulate.
template <typename A>
struct Gradients {
  A *q, *k, *a, *c;
  bool add_rows = true, add_columns = true;
};

template <typename T, typename A>
struct BackwardItem {
  const PairBackward& args;
  const PairArgs& in;
  int64_t b, first_row, last_row, first_column, last_column;
  ExpertSets experts;
  int64_t rank_padded, width_padded;
  bool q_direct, k_direct, c_direct;  // products add to the call's gradients, not to a buffer
  int64_t most, block;  // (expert, row) and (expert, column) of the chunk and of one block
  int64_t rows = 0, valid = 0;
  Buffer<int64_t> row_index, column_index;
  Buffer<A> q_copy, h, a_part, mass, q_buffer, t;          // chunk of rows
  Buffer<A> keys, k_copy, values, c_copy;                  // block of columns
  Buffer<A> column_part, column_mass, k_buffer, c_buffer;  // block of columns
  Buffer<A> logits, messages, bias, bias_sums, grad_buffer;
  Rows<const A> q{}, k{}, c{};
  Rows<A> grad_q{}, grad_k{}, grad_c{};
  Gradients<A> gradients;
  A* grad_bias;

  BackwardItem(const PairBackward& args, int64_t b, const int64_t* bounds,
               const Gradients<A>& gradients, A* grad_bias)
      : args(args),
        in(args.in),
        b(b),
        first_row(bounds[0]),
        last_row(bounds[1]),
        first_column(bounds[2]),
        last_column(bounds[3]),
        experts(args.in, args.reduce),
        rank_padded(round_up(args.in.rank, kLanes<A>)),
        width_padded(round_up(args.in.width, kLanes<A>)),
        q_direct(in_place<A, A>(in.mask_a, in.rank)),
        k_direct(in_place<A, A>(in.mask_b, in.rank)),
        c_direct(in_place<A, A>(in.mask_b, in.width)),
        most(in.experts * (last_row - first_row)),
        block(in.experts * kPairBlock),
        row_index(last_row - first_row),
        column_index(last_column - first_column),
        q_copy(in_place<T, A>(in.mask_a, in.rank) ? 0 : most * rank_padded),
        h(most * width_padded),
        a_part(most),
        mass(most),
        q_buffer(q_direct ? 0 : most * rank_padded),
        t(most * width_padded),
        keys(block * in.rank),
        k_copy(in_place<T, A>(in.mask_b, in.rank) ? 0 : block * rank_padded),
        values(block * in.width),
        c_copy(in_place<T, A>(in.mask_b, in.width) ? 0 : block * width_padded),
        column_part(block),
        column_mass(block),
        k_buffer(k_direct ? 0 : block * rank_padded),
        c_buffer(c_direct ? 0 : block * width_padded),
        logits(in.experts * kTileExpert),
        messages(in.experts * kTileExpert),
        bias(in.experts),
        bias_sums(in.experts * kLanes<A>),
        grad_buffer(in.width),
        gradients(gradients),
        grad_bias(grad_bias) {}

  // The gradient of row i of y in the compute type; valid until the next call.
  const A* grad_y(int64_t e, int64_t i) const {
    if (args.reduce == PairReduce::kPool) return token<A>(args.grad_y, b, e, i);
    const T* g = token<T>(args.grad_y, b, e, i);
    if constexpr (sizeof(T) == sizeof(A)) {
      return reinterpret_cast<const A*>(g);
    } else {
      read_row<T, A>(g, grad_buffer, in.width);
      return grad_buffer;
    }
  }
  // If false, d is computed from undefined data and not read.
  bool wants_gate() const {
    return gradients.q != nullptr || gradients.k != nullptr || args.grad_bias != nullptr;
  }
  const Message& message(int64_t e) const { return kMessages[in.kinds[e]]; }

  A dot(const A* x, const T* y) const {
    A total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t d = 0; d < in.width; ++d) total += x[d] * read<T, A>(y + d);
    return total;
  }

  // Gradients of `length` tokens per expert from token `first` of this sample, or their buffer.
  Rows<A> destination(bool direct, A* gradient, A* buffer, int64_t length, int64_t first,
                      int64_t count, int64_t width) const {
    if (direct && gradient != nullptr)
      return {gradient + (b * in.experts * length + first) * width, length * width, width};
    const int64_t padded = round_up(width, kLanes<A>);
    return {buffer, count * padded, padded};
  }

  void load_rows() {
    q = rows_of<T, A>(in, in.q, in.mask_a, kAllExperts, b, row_index, rows, in.rank, q_copy);
    grad_q = destination(q_direct, gradients.q, q_buffer, in.rows, first_row, rows, in.rank);
    load_bias(in, bias.data());
    for (int64_t e = 0; e < in.experts; ++e)
      for (int64_t r = 0; r < rows; ++r) load_row(e, r);
    std::memset(mass, 0, in.experts * rows * sizeof(A));
  }

  // m_i and, if it varies with the row, h_i.
  void load_row(int64_t e, int64_t r) {
    const int64_t i = row_index[r];
    const A* g = grad_y(e, i);
    const T* a = token<T>(in.a, b, e, i);
    const Message& m = message(e);
    A part = 0;
    if (args.grad_mass)
      part = static_cast<const A*>(args.grad_mass)[(b * in.experts + e) * in.rows + i];
    if (m.a != 0) part += A(m.a) * dot(g, a);
    a_part[e * rows + r] = part;
    if (!has(experts.products, e)) return;
    A* to = h + (e * rows + r) * width_padded;
    const A s2 = A(m.c), s3 = A(m.product);
    if (m.product != 0) {
      for (int64_t d = 0; d < in.width; ++d) to[d] = s3 * read<T, A>(a + d) * g[d];
    } else {
      for (int64_t d = 0; d < in.width; ++d) to[d] = s2 * g[d];
    }
    for (int64_t d = in.width; d < width_padded; ++d) to[d] = 0;
  }

  void load_columns(const int64_t* index, int64_t count) {
    k = rows_of<T, A>(in, in.k, in.mask_b, kAllExperts, b, index, count, in.rank, k_copy);
    c = rows_of<T, A>(in, in.c, in.mask_b, experts.synergy, b, index, count, in.width, c_copy);
    grad_k = destination(k_direct, gradients.k, k_buffer, in.columns, index[0], count, in.rank);
    grad_c = destination(c_direct, gradients.c, c_buffer, in.columns, index[0], count, in.width);
    for (int64_t e = 0; e < in.experts; ++e) {
      gather_columns<T, A>(in.k, b, e, index, count, in.rank, A(in.scale) * folded_unit<A>(in),
                           keys + e * kPairBlock * in.rank);
      if (has(experts.products, e))
        gather_columns<T, A>(in.c, b, e, index, count, in.width, A(1),
                             values + e * kPairBlock * in.width);
      for (int64_t j = 0; j < kPairBlock; ++j)
        column_part[e * kPairBlock + j] =
            has(experts.columns, e) && j < count
                ? A(message(e).c) * dot(grad_y(e, 0), token<T>(in.c, b, e, index[j]))
                : A(0);
    }
    std::memset(column_mass, 0, in.experts * kPairBlock * sizeof(A));
  }

  // The sums of rows start again with the first block of columns, those of columns with the first
  // tile.
  void run_tile(int64_t i0, int64_t tile_rows, int64_t j0, int64_t count) {
    const int64_t count_padded = round_up(count, kLanes<A>);
    for (int64_t e = 0; e < in.experts; ++e) {
      gemm<A>(tile_rows, count_padded, in.rank, q.at(e, i0), q.row, 1,
              keys + e * kPairBlock * in.rank, kPairBlock, logits + e * kTileExpert, kTileRow,
              false);
      if (has(experts.products, e) && wants_gate())
        gemm<A>(tile_rows, count_padded, in.width, h + (e * rows + i0) * width_padded, width_padded,
                1, values + e * kPairBlock * in.width, kPairBlock, messages + e * kTileExpert,
                kTileRow, false);
    }
    for_experts<BackwardGate, A>(in)(
        {logits, messages, bias, a_part + i0, column_part, mass + i0, bias_sums, A(in.scale),
         experts.products, experts.products | experts.columns, rows, tile_rows, count, in.top_k});
    const bool add_q = j0 > 0 || (q_direct && gradients.add_rows);
    const bool add_k = i0 > 0 || (k_direct && gradients.add_columns);
    const bool add_c = i0 > 0 || (c_direct && gradients.add_columns);
    for (int64_t e = 0; e < in.experts; ++e) {
      const A *d = logits + e * kTileExpert, *p = messages + e * kTileExpert;
      if (gradients.q != nullptr)
        gemm<A>(tile_rows, rank_padded, count, d, kTileRow, 1, k.at(e, 0), k.row, grad_q.at(e, i0),
                grad_q.row, add_q);
      if (gradients.k != nullptr)
        gemm<A>(count, rank_padded, tile_rows, d, 1, kTileRow, q.at(e, i0), q.row, grad_k.at(e, 0),
                grad_k.row, add_k);
      if (has(experts.products, e) && gradients.c != nullptr)
        gemm<A>(count, width_padded, tile_rows, p, 1, kTileRow, h + (e * rows + i0) * width_padded,
                width_padded, grad_c.at(e, 0), grad_c.row, add_c);
      if (has(experts.synergy, e) && gradients.a != nullptr)
        gemm<A>(tile_rows, width_padded, count, p, kTileRow, 1, c.at(e, 0), c.row,
                t + (e * rows + i0) * width_padded, width_padded, j0 > 0);
      if (has(experts.columns, e))
        add_columns(p, tile_rows, count_padded, column_mass + e * kPairBlock);
    }
  }

  // to = [to +] scale * x
  static void put(bool add, const A* x, A scale, A* to, int64_t n) {
    if (add) {
      for (int64_t d = 0; d < n; ++d) to[d] += scale * x[d];
    } else {
      for (int64_t d = 0; d < n; ++d) to[d] = scale * x[d];
    }
  }

  void put_columns(const int64_t* index, int64_t count) {
    const bool add = gradients.add_columns;
    for (int64_t e = 0; e < in.experts; ++e)
      for (int64_t j = 0; j < count; ++j) {
        const int64_t at = (b * in.experts + e) * in.columns + index[j];
        if (gradients.k != nullptr && !k_direct)
          put(add, grad_k.at(e, j), A(1), gradients.k + at * in.rank, in.rank);
        if (gradients.c == nullptr) continue;
        A* to = gradients.c + at * in.width;
        if (has(experts.products, e)) {
          if (!c_direct) put(add, grad_c.at(e, j), A(1), to, in.width);
        } else if (has(experts.columns, e)) {
          put(add, grad_y(e, 0), A(message(e).c) * column_mass[e * kPairBlock + j], to, in.width);
        } else if (!add) {
          std::memset(to, 0, in.width * sizeof(A));
        }
      }
  }

  void put_rows() {
    const bool add = gradients.add_rows;
    for (int64_t e = 0; e < in.experts; ++e)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = row_index[r], at = (b * in.experts + e) * in.rows + i;
        if (gradients.q != nullptr && !q_direct)
          put(add, grad_q.at(e, r), A(1), gradients.q + at * in.rank, in.rank);
        if (gradients.a == nullptr) continue;
        const Message& m = message(e);
        A* to = gradients.a + at * in.width;
        const A* g = grad_y(e, i);
        if (m.product != 0) {
          A* sum = t + (e * rows + r) * width_padded;
          for (int64_t d = 0; d < in.width; ++d) sum[d] *= g[d];
          put(add, sum, A(m.product), to, in.width);
        } else if (m.a != 0) {
          put(add, g, A(m.a) * mass[e * rows + r], to, in.width);
        } else if (!add) {
          std::memset(to, 0, in.width * sizeof(A));
        }
      }
  }

  void run() {
    rows =
        valid_tokens(in.mask_a ? in.mask_a + b * in.rows : nullptr, first_row, last_row, row_index);
    valid = valid_tokens(in.mask_b ? in.mask_b + b * in.columns : nullptr, first_column,
                         last_column, column_index);
    if (rows == 0 || valid == 0) return;
    load_rows();
    std::memset(bias_sums, 0, in.experts * kVectorBytes);
    for (int64_t j0 = 0; j0 < valid; j0 += kPairBlock) {
      const int64_t count = min64(kPairBlock, valid - j0);
      load_columns(column_index + j0, count);
      for (int64_t i0 = 0; i0 < rows; i0 += kPairTile)
        run_tile(i0, min64(kPairTile, rows - i0), j0, count);
      put_columns(column_index + j0, count);
    }
    put_rows();
    for (int64_t e = 0; e < in.experts; ++e)
      grad_bias[e] += sum_lanes<A>(load(bias_sums + e * kLanes<A>));
  }
};

constexpr int64_t kItems = 8;  // enough for a few threads; more would pack both sides more often

// Chunks of one side: at most 256 tokens, which keeps an item's buffers in the second-level cache,
// and down to 64 if the batch alone is too small for many threads.
struct Cut {
  int64_t each, count;

  Cut(int64_t length, int64_t batch) {
    const int64_t least = (length + 255) / 256, most = (length + 63) / 64;
    const int64_t wanted = (kItems + batch - 1) / batch;
    int64_t chunks = wanted < most ? wanted : most;
    if (chunks < least) chunks = least;
    each = round_up((length + chunks - 1) / chunks, 2 * kPairTile);  // whole tiles and vectors
    count = (length + each - 1) / each;
  }
};

// The rounds: the chunks of the longer side form squares with those of the shorter side, and
// `groups` squares are processed at a time. Everything depends only on the shape.
template <typename T, typename A>
struct Rounds {
  const PairBackward& args;
  const PairArgs& in;
  Cut row_cut, column_cut;
  bool short_columns;
  int64_t side, squares, groups, items, copy_size;
  Buffer<A> copies, grad_bias;

  explicit Rounds(const PairBackward& args)
      : args(args),
        in(args.in),
        row_cut(args.in.rows, args.in.batch),
        column_cut(args.in.columns, args.in.batch),
        short_columns(column_cut.count <= row_cut.count),
        side(short_columns ? column_cut.count : row_cut.count),
        squares(((short_columns ? row_cut.count : column_cut.count) + side - 1) / side),
        groups(min64((kItems + in.batch * side - 1) / (in.batch * side), squares)),
        items(in.batch * groups * side),
        copy_size(in.batch * in.experts * (short_columns ? in.columns : in.rows)),
        copies((groups - 1) * copy_size * (in.rank + in.width)),
        grad_bias(items * in.experts) {
    std::memset(copies, 0, (groups - 1) * copy_size * (in.rank + in.width) * sizeof(A));
    std::memset(grad_bias, 0, items * in.experts * sizeof(A));
  }

  A* rank_copy(int64_t group) const {
    return copies + (group - 1) * copy_size * (in.rank + in.width);
  }
  A* width_copy(int64_t group) const { return rank_copy(group) + copy_size * in.rank; }

  Gradients<A> gradients(int64_t group) const {
    Gradients<A> all{static_cast<A*>(args.grad_q),
                     static_cast<A*>(args.grad_k),
                     static_cast<A*>(args.grad_a),
                     static_cast<A*>(args.grad_c),
                     true,
                     true};
    if (group == 0) return all;
    A*& of_rank = short_columns ? all.k : all.q;
    A*& of_width = short_columns ? all.c : all.a;
    if (of_rank != nullptr) of_rank = rank_copy(group);
    if (of_width != nullptr) of_width = width_copy(group);
    return all;
  }

  void run_item(int64_t item, int64_t step, int64_t turn) const {
    const int64_t i = item % side, group = item / side % groups, b = item / side / groups;
    const int64_t far = (step * groups + group) * side + i, near = (i + turn) % side;
    const int64_t row = short_columns ? far : near, column = short_columns ? near : far;
    if (row >= row_cut.count || column >= column_cut.count) return;
    const int64_t bounds[4] = {row * row_cut.each, min64((row + 1) * row_cut.each, in.rows),
                               column * column_cut.each,
                               min64((column + 1) * column_cut.each, in.columns)};
    Gradients<A> to = gradients(group);
    // A chunk is first used in the first turn of its first step (shorter side: by group 0).
    const bool far_is_new = turn == 0, near_is_new = turn == 0 && step == 0 && group == 0;
    if (args.fresh) {
      to.add_rows = !(short_columns ? far_is_new : near_is_new);
      to.add_columns = !(short_columns ? near_is_new : far_is_new);
    }
    BackwardItem<T, A>(args, b, bounds, to, grad_bias + item * in.experts).run();
  }

  void run() const {
    for (int64_t step = 0; step * groups < squares; ++step)
      for (int64_t turn = 0; turn < side; ++turn)
        parallel_for(items, in.threads, [&](int64_t item, int) { run_item(item, step, turn); });
    const Gradients<A> all = gradients(0);
    A *of_rank = short_columns ? all.k : all.q, *of_width = short_columns ? all.c : all.a;
    for (int64_t group = 1; group < groups; ++group) {
      if (of_rank != nullptr) add(rank_copy(group), of_rank, copy_size * in.rank);
      if (of_width != nullptr) add(width_copy(group), of_width, copy_size * in.width);
    }
    for (int64_t item = 0; item < items && args.grad_bias != nullptr; ++item)
      add(grad_bias + item * in.experts, static_cast<A*>(args.grad_bias), in.experts);
  }
};

template <typename T, typename A>
void backward(const PairBackward& args) {
  const PairArgs& in = args.in;
  if (args.grad_bias != nullptr) std::memset(args.grad_bias, 0, in.experts * sizeof(A));
  if (in.batch > 0 && in.rows > 0 && in.columns > 0) Rounds<T, A>(args).run();
}

}  // namespace

void pair_backward(DType dtype, const PairBackward& args) {
  with_dtype(dtype, [&]<typename T>() { backward<T, typename Compute<T>::Type>(args); });
}

}  // namespace flmoe::FLMOE_ISA
