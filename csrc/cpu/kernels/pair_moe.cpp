// pair_moe forward: computes the gate of every token pair and accumulates the messages.
//
// One item is (sample, block of rows). Columns are processed in groups of two blocks of 128, of
// which k is transposed once; then for every tile of 24 rows and block come the logits of all
// experts (one product each), the gate in place, and t += p c for the experts that need it. q and c
// are read in place if possible. After the last group a tile's rows of y are written while its t is
// in the first-level cache. Bound: 2 R FLOP per pair and expert, and 2 V per pair and expert with a
// message from side b that varies with the row: a uniqueness expert of side a and a null expert
// have none, and with "pool" only synergy has one, because the sum over rows of p c_j is c_j times
// the column's mass. Traffic: an item reads side b once and its rows once and writes its rows of y;
// its own buffers (t and mass of at most 384 rows, one group, one tile) and the group's rows of c
// stay in the second-level cache.
#include "cpu/pair_gate.h"

namespace flmoe::FLMOE_ISA {
namespace {

template <typename A>
struct ForwardTile {
  A* pairs;       // logits in, probabilities out
  const A* bias;  // (experts)
  A* mass;        // += sums over columns; experts mass_stride apart
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
      }
      for (int e = 0; e < E; ++e) tile.mass[e * tile.mass_stride + i] += sum_lanes<A>(sums[e]);
    }
  }
};

constexpr int64_t kGroup = 2 * kPairBlock;  // columns

template <typename T, typename A>
struct ForwardItem {
  const PairForward& args;
  const PairArgs& in;
  int64_t b, first, last;
  ExpertSets experts;
  int64_t padded;  // width in whole vectors
  int64_t rows = 0, valid = 0;
  Buffer<int64_t> row_index, column_index;
  Buffer<A> q_copy, t, mass;                 // whole item; t: sum of p c
  Buffer<A> keys, values_copy, column_mass;  // one group of columns
  Buffer<A> tile, bias, row_a, row_y, row_total;
  Rows<const A> q{}, values{};
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
        q_copy(in_place<T, A>(in.mask_a, in.rank)
                   ? 0
                   : in.experts * (last - first) * round_up(in.rank, kLanes<A>)),
        t(in.experts * (last - first) * padded),
        mass(in.experts * (last - first)),
        keys(in.experts * kGroup * in.rank),
        values_copy(in_place<T, A>(in.mask_b, in.width) ? 0 : in.experts * kGroup * padded),
        column_mass(in.experts * kGroup),
        tile(in.experts * kTileExpert),
        bias(in.experts),
        row_a(in.width),
        row_y(in.width),
        row_total(in.width),
        pooled(pooled) {}

  void load_rows() {
    rows = valid_tokens(in.mask_a ? in.mask_a + b * in.rows : nullptr, first, last, row_index);
    valid =
        valid_tokens(in.mask_b ? in.mask_b + b * in.columns : nullptr, 0, in.columns, column_index);
    q = rows_of<T, A>(in, in.q, in.mask_a, kAllExperts, b, row_index, rows, in.rank, q_copy);
    load_bias(in, bias.data());
    if (valid == 0) std::memset(t, 0, in.experts * rows * padded * sizeof(A));
    std::memset(mass, 0, in.experts * rows * sizeof(A));
    if (args.reduce == PairReduce::kPool) std::memset(pooled, 0, in.experts * in.width * sizeof(A));
  }

  // Block n of the group has its keys at n * experts * kPairBlock * rank.
  A* keys_of(int64_t j0, int64_t e) const {
    return keys + (j0 / kPairBlock * in.experts + e) * kPairBlock * in.rank;
  }

  void load_columns(const int64_t* index, int64_t count) {
    const A scale = A(in.scale) * folded_unit<A>(in);
    for (int64_t j0 = 0; j0 < count; j0 += kPairBlock)
      for (int64_t e = 0; e < in.experts; ++e)
        gather_columns<T, A>(in.k, b, e, index + j0, min64(kPairBlock, count - j0), in.rank, scale,
                             keys_of(j0, e));
    values = rows_of<T, A>(in, in.c, in.mask_b, experts.products | experts.columns, b, index, count,
                           in.width, values_copy);
    std::memset(column_mass, 0, in.experts * kGroup * sizeof(A));
  }

  // Adds the pairs of tile_rows rows and of the block of columns at j0 of the group.
  void run_tile(int64_t i0, int64_t tile_rows, int64_t j0, int64_t count, bool accumulate) {
    const int64_t count_padded = round_up(count, kLanes<A>);
    for (int64_t e = 0; e < in.experts; ++e)
      gemm<A>(tile_rows, count_padded, in.rank, q.at(e, i0), q.row, 1, keys_of(j0, e), kPairBlock,
              tile + e * kTileExpert, kTileRow, false);
    for_experts<ForwardGate, A>(in)({tile, bias, mass + i0, rows, tile_rows, count, in.top_k});
    for (int64_t e = 0; e < in.experts; ++e) {
      if (has(experts.products, e))
        gemm<A>(tile_rows, padded, count, tile + e * kTileExpert, kTileRow, 1, values.at(e, j0),
                values.row, t + (e * rows + i0) * padded, padded, accumulate);
      if (has(experts.columns, e))
        add_columns(tile + e * kTileExpert, tile_rows, count_padded, column_mass + e * kGroup + j0);
    }
  }

  // pooled[e] += share of c_j times the mass of column j.
  void pool_columns(int64_t count) {
    for (int64_t e = 0; e < in.experts; ++e) {
      if (!has(experts.columns, e)) continue;
      const A share = A(kMessages[in.kinds[e]].c);
      for (int64_t j = 0; j < count; ++j)
        add_scaled(values.at(e, j), share * column_mass[e * kGroup + j], pooled + e * in.width);
    }
  }

  void add_scaled(const A* x, A scale, A* to) const {
    for (int64_t d = 0; d < in.width; ++d) to[d] += scale * x[d];
  }

  // Row r of expert e: s1 a mass + s2 t + s3 a t.
  void finish_row(int64_t e, int64_t r, A* y) {
    const Message& message = kMessages[in.kinds[e]];
    const A s1 = A(message.a) * mass[e * rows + r], s2 = A(message.c), s3 = A(message.product);
    const A* sum = t + (e * rows + r) * padded;
    const A* a = row_a;
    if (message.a != 0 || message.product != 0) {
      const T* from = token<T>(in.a, b, e, row_index[r]);
      if constexpr (sizeof(T) == sizeof(A))
        a = from;
      else
        read_row<T, A>(from, row_a, in.width);
    }
    if (message.product != 0) {
      for (int64_t d = 0; d < in.width; ++d) y[d] = s3 * a[d] * sum[d];
    } else if (!has(experts.products, e)) {
      for (int64_t d = 0; d < in.width; ++d) y[d] = message.a != 0 ? s1 * a[d] : A(0);
    } else if (message.a != 0) {
      for (int64_t d = 0; d < in.width; ++d) y[d] = s2 * sum[d] + s1 * a[d];
    } else {
      for (int64_t d = 0; d < in.width; ++d) y[d] = s2 * sum[d];
    }
  }

  void write(int64_t i0, int64_t tile_rows) {
    for (int64_t r = i0; r < i0 + tile_rows; ++r) {
      std::memset(row_total, 0, in.width * sizeof(A));
      for (int64_t e = 0; e < in.experts; ++e) {
        const int64_t at = (b * in.experts + e) * in.rows + row_index[r];
        static_cast<A*>(args.mass)[at] = mass[e * rows + r];
        A* y = row_y;
        if constexpr (sizeof(T) == sizeof(A))
          if (args.reduce == PairReduce::kNone) y = static_cast<A*>(args.y) + at * in.width;
        finish_row(e, r, y);
        if (args.reduce == PairReduce::kPool)
          add_scaled(y, A(1), pooled + e * in.width);
        else if (args.reduce == PairReduce::kExperts)
          add_scaled(y, A(1), row_total);
        else if (y == row_y)
          write_row<T, A>(y, static_cast<T*>(args.y) + at * in.width, in.width);
      }
      if (args.reduce == PairReduce::kExperts)
        write_row<T, A>(
            row_total, static_cast<T*>(args.y) + (b * in.rows + row_index[r]) * in.width, in.width);
    }
  }

  void run() {
    load_rows();
    if (rows == 0) return;
    int64_t g0 = 0;
    do {
      const int64_t group = min64(kGroup, valid - g0);
      load_columns(column_index + g0, group);
      for (int64_t i0 = 0; i0 < rows; i0 += kPairTile) {
        const int64_t tile_rows = min64(kPairTile, rows - i0);
        for (int64_t j0 = 0; j0 < group; j0 += kPairBlock)
          run_tile(i0, tile_rows, j0, min64(kPairBlock, group - j0), g0 + j0 > 0);
        if (g0 + group == valid) write(i0, tile_rows);
      }
      pool_columns(group);
      g0 += group;
    } while (g0 < valid);
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
