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
// An item is a chunk of rows and one of columns; pair_rounds.h has their order. Gradients of q, k
// and c are accumulated in place if their rows are whole vectors and no token is masked. Bound: 6 R
// FLOP per pair and expert, 4 V more if the message from side b varies with the row (with "pool"
// only for synergy), 2 V more for synergy; a gradient that is not wanted saves its products.
// Traffic: both sides once per pair of chunks.
#include "cpu/pair_gate.h"
#include "cpu/pair_rounds.h"

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

template <typename T, typename A>
struct BackwardItem {
  const PairBackward& args;
  const PairArgs& in;
  const PairChunks<A> chunks;
  const PairGradients<A>& gradients;
  int64_t b;
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

  BackwardItem(const PairBackward& args, const PairChunks<A>& chunks)
      : args(args),
        in(args.in),
        chunks(chunks),
        gradients(this->chunks.gradients),
        b(chunks.b),
        experts(args.in, args.reduce),
        rank_padded(round_up(args.in.rank, kLanes<A>)),
        width_padded(round_up(args.in.width, kLanes<A>)),
        q_direct(in_place<A, A>(in.mask_a, in.rank)),
        k_direct(in_place<A, A>(in.mask_b, in.rank)),
        c_direct(in_place<A, A>(in.mask_b, in.width)),
        most(in.experts * (chunks.last_row - chunks.first_row)),
        block(in.experts * kPairBlock),
        row_index(chunks.last_row - chunks.first_row),
        column_index(chunks.last_column - chunks.first_column),
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
        grad_buffer(in.width) {}

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
    grad_q = destination(q_direct, gradients.q, q_buffer, in.rows, row_index[0], rows, in.rank);
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
    rows = valid_tokens(in.mask_a ? in.mask_a + b * in.rows : nullptr, chunks.first_row,
                        chunks.last_row, row_index);
    valid = valid_tokens(in.mask_b ? in.mask_b + b * in.columns : nullptr, chunks.first_column,
                         chunks.last_column, column_index);
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
      chunks.grad_bias[e] += sum_lanes<A>(load(bias_sums + e * kLanes<A>));
  }
};

template <typename T, typename A>
void backward(const PairBackward& args) {
  const PairArgs& in = args.in;
  if (args.grad_bias != nullptr) std::memset(args.grad_bias, 0, in.experts * sizeof(A));
  if (in.batch == 0 || in.rows == 0 || in.columns == 0) return;
  PairRounds<A>(args).run(
      [&](const PairChunks<A>& chunks) { BackwardItem<T, A>(args, chunks).run(); });
}

}  // namespace

void pair_backward(DType dtype, const PairBackward& args) {
  with_dtype(dtype, [&]<typename T>() { backward<T, typename Compute<T>::Type>(args); });
}

}  // namespace flmoe::FLMOE_ISA
