// pair_moe forward: computes the gate of every token pair and accumulates the messages.
//
// One item is (sample, block of rows). Columns are processed in blocks of 128: k is transposed and
// c packed once per block; then for every tile of 24 rows come the logits of all experts (one
// product each), the gate in place, and t += p c for the experts that need it. Bound: 2 R FLOP per
// pair and expert, and 2 V per pair and expert with a message from side b that varies with the row:
// a uniqueness expert of side a and a null expert have none, and with "pool" only synergy has one,
// because the sum over rows of p c_j is c_j times the column's mass. Traffic: an item reads side b
// once and its rows once and writes its rows of y; its own buffers (q, t and mass of at most 384
// rows, one block, one tile) stay in the second-level cache.
#include "cpu/pair_gate.h"

namespace flmoe::FLMOE_ISA {
namespace {

template <typename A>
struct ForwardTile {
  A* pairs;        // logits in, probabilities out
  const A* bias;   // (experts)
  A* mass;         // += sums over columns; experts mass_stride apart
  A* column_mass;  // += sums over rows, (experts, kPairBlock); null if not wanted
  int64_t mass_stride, rows, columns, top_k;
};

struct ForwardGate {
  template <typename A, int E, bool kTopK>
  static void run(const ForwardTile<A>& tile) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      A* at = tile.pairs + i * kTileRow;
      Vec<A> sums[E] = {};
      for (int64_t j = 0; j < tile.columns; j += kLanes<A>) {
        Vec<A> p[E];
#pragma GCC unroll 8
        for (int e = 0; e < E; ++e) p[e] = load(at + e * kTileExpert + j) + tile.bias[e];
        gate<A, E, kTopK>(p, tile.top_k);
        if (j + kLanes<A> > tile.columns)
          for (int e = 0; e < E; ++e) p[e] = keep_first<A>(p[e], tile.columns - j);
#pragma GCC unroll 8
        for (int e = 0; e < E; ++e) {
          sums[e] += p[e];
          store(at + e * kTileExpert + j, p[e]);
        }
        if (tile.column_mass != nullptr)
          for (int e = 0; e < E; ++e) {
            A* column = tile.column_mass + e * kPairBlock + j;
            store(column, load(column) + p[e]);
          }
      }
      for (int e = 0; e < E; ++e) tile.mass[e * tile.mass_stride + i] += sum_lanes<A>(sums[e]);
    }
  }
};

template <typename T, typename A>
struct ForwardItem {
  const PairForward& args;
  const PairArgs& in;
  int64_t b, first, last;
  ExpertSets experts;
  int64_t padded;  // width in whole vectors
  int64_t rows = 0, valid = 0;
  Buffer<int64_t> row_index, column_index;
  Buffer<A> q, t, mass;                 // whole item; t: sum of p c, then y
  Buffer<A> keys, values, column_mass;  // one block of columns
  Buffer<A> tile, bias;
  A* pooled;  // (experts, width) of this item, for "pool"

  ForwardItem(const PairForward& args, int64_t b, int64_t first, int64_t last, A* pooled)
      : args(args),
        in(args.in),
        b(b),
        first(first),
        last(last),
        experts(args.in, args.reduce),
        padded(round_up(args.in.width, kLanes<A>)),
        row_index(last - first),
        column_index(in.columns),
        q(in.experts * (last - first) * in.rank),
        t(in.experts * (last - first) * padded),
        mass(in.experts * (last - first)),
        keys(in.experts * kPairBlock * in.rank),
        values(in.experts * kPairBlock * padded),
        column_mass(in.experts * kPairBlock),
        tile(in.experts * kTileExpert),
        bias(in.experts),
        pooled(pooled) {}

  void load_rows() {
    rows = valid_tokens(in.mask_a ? in.mask_a + b * in.rows : nullptr, first, last, row_index);
    valid =
        valid_tokens(in.mask_b ? in.mask_b + b * in.columns : nullptr, 0, in.columns, column_index);
    for (int64_t e = 0; e < in.experts; ++e) {
      gather_rows<T, A>(in.q, b, e, row_index, rows, in.rank, in.rank, A(in.scale),
                        q + e * rows * in.rank);
      bias[e] = in.gate_bias ? static_cast<const A*>(in.gate_bias)[e] : A(0);
    }
    std::memset(t, 0, in.experts * rows * padded * sizeof(A));
    std::memset(mass, 0, in.experts * rows * sizeof(A));
    if (args.reduce == PairReduce::kPool) std::memset(pooled, 0, in.experts * in.width * sizeof(A));
  }

  void load_columns(int64_t j0, int64_t count) {
    for (int64_t e = 0; e < in.experts; ++e) {
      gather_columns<T, A>(in.k, b, e, column_index + j0, count, in.rank,
                           keys + e * in.rank * kPairBlock);
      if (has(experts.products | experts.columns, e))
        gather_rows<T, A>(in.c, b, e, column_index + j0, count, in.width, padded, A(1),
                          values + e * kPairBlock * padded);
    }
    std::memset(column_mass, 0, in.experts * kPairBlock * sizeof(A));
  }

  void run_tiles(int64_t count) {
    const int64_t count_padded = round_up(count, kLanes<A>);
    const auto gate_tile = for_experts<ForwardGate, A>(in);
    for (int64_t i0 = 0; i0 < rows; i0 += kPairTile) {
      const int64_t tile_rows = min64(kPairTile, rows - i0);
      for (int64_t e = 0; e < in.experts; ++e)
        gemm<A>(tile_rows, count_padded, in.rank, q + (e * rows + i0) * in.rank, in.rank, 1,
                keys + e * in.rank * kPairBlock, kPairBlock, tile + e * kTileExpert, kTileRow,
                false);
      gate_tile({tile, bias, mass + i0, experts.columns != 0 ? column_mass.data() : nullptr, rows,
                 tile_rows, count, in.top_k});
      for (int64_t e = 0; e < in.experts; ++e)
        if (has(experts.products, e))
          gemm<A>(tile_rows, padded, count, tile + e * kTileExpert, kTileRow, 1,
                  values + e * kPairBlock * padded, padded, t + (e * rows + i0) * padded, padded,
                  true);
    }
  }

  // pooled[e] += share of c_j times the mass of column j.
  void pool_columns(int64_t count) {
    for (int64_t e = 0; e < in.experts; ++e) {
      if (!has(experts.columns, e)) continue;
      const A share = A(kMessages[in.kinds[e]].c);
      for (int64_t j = 0; j < count; ++j) {
        const A weight = share * column_mass[e * kPairBlock + j];
        const A* c = values + (e * kPairBlock + j) * padded;
        for (int64_t d = 0; d < in.width; ++d) pooled[e * in.width + d] += weight * c[d];
      }
    }
  }

  // t becomes y: row by row, s1 a mass + s2 t + s3 a t.
  void finish_row(int64_t e, int64_t row, A* a) {
    const Message& message = kMessages[in.kinds[e]];
    const A s1 = A(message.a) * mass[e * rows + row], s2 = A(message.c), s3 = A(message.product);
    A* y = t + (e * rows + row) * padded;
    if (message.a != 0 || message.product != 0)
      read_row<T, A>(token<T>(in.a, b, e, row_index[row]), a, in.width);
    if (message.product != 0) {
      for (int64_t d = 0; d < in.width; ++d) y[d] *= s3 * a[d];
    } else if (has(experts.products, e)) {
      for (int64_t d = 0; d < in.width; ++d) y[d] *= s2;
    }
    if (message.a != 0)
      for (int64_t d = 0; d < in.width; ++d) y[d] += s1 * a[d];
  }

  void write() {
    A* a = values;  // no longer needed
    for (int64_t e = 0; e < in.experts; ++e)
      for (int64_t r = 0; r < rows; ++r) {
        finish_row(e, r, a);
        const A* y = t + (e * rows + r) * padded;
        const int64_t at = (b * in.experts + e) * in.rows + row_index[r];
        static_cast<A*>(args.mass)[at] = mass[e * rows + r];
        if (args.reduce == PairReduce::kNone)
          write_row<T, A>(y, static_cast<T*>(args.y) + at * in.width, in.width);
        else if (args.reduce == PairReduce::kPool)
          for (int64_t d = 0; d < in.width; ++d) pooled[e * in.width + d] += y[d];
        else if (e > 0)
          for (int64_t d = 0; d < in.width; ++d) t[r * padded + d] += y[d];
      }
    if (args.reduce == PairReduce::kExperts)
      for (int64_t r = 0; r < rows; ++r)
        write_row<T, A>(t + r * padded,
                        static_cast<T*>(args.y) + (b * in.rows + row_index[r]) * in.width,
                        in.width);
  }

  void run() {
    load_rows();
    for (int64_t j0 = 0; j0 < valid && rows > 0; j0 += kPairBlock) {
      const int64_t count = min64(kPairBlock, valid - j0);
      load_columns(j0, count);
      run_tiles(count);
      pool_columns(count);
    }
    write();
  }
};

template <typename T, typename A>
void forward(const PairForward& args) {
  const PairArgs& in = args.in;
  const RowBlocks cut(in);
  const int64_t each = cut.each, blocks = cut.count;
  const int64_t pool_size = in.experts * in.width;
  const bool pool = args.reduce == PairReduce::kPool;
  const Buffer<A> partial(pool ? in.batch * blocks * pool_size : 0);
  parallel_for(in.batch * blocks, in.threads, [&](int64_t item, int) {
    const int64_t b = item / blocks, first = item % blocks * each;
    A* pooled = pool ? partial + item * pool_size : nullptr;
    ForwardItem<T, A>(args, b, first, min64(first + each, in.rows), pooled).run();
  });
  if (!pool) return;
  for (int64_t b = 0; b < in.batch; ++b)
    for (int64_t d = 0; d < pool_size; ++d) {
      A total = 0;
      for (int64_t block = 0; block < blocks; ++block)
        total += partial[(b * blocks + block) * pool_size + d];
      static_cast<A*>(args.y)[b * pool_size + d] = total;
    }
}

}  // namespace

void pair_forward(DType dtype, const PairForward& args) {
  with_dtype(dtype, [&]<typename T>() { forward<T, typename Compute<T>::Type>(args); });
}

}  // namespace flmoe::FLMOE_ISA
