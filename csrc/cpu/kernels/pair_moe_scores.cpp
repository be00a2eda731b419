// pair_map and top_pairs: the contributions of all pairs through a linear head w,
//
//     phi_ij = p_ij (m_i + n_j + h_i . c_j)
//     m_i = s1 a_i . w
//     n_j = s2 c_j . w
//     h_i = s3 a_i * w
//
// They are written to a map, or only the largest are kept. One item is (sample, block of rows), as
// in the forward; for top_pairs (sample, group of such blocks), with a heap per expert and one for
// the sum over experts. The worst kept pair is on top; a vector of contributions is skipped if no
// lane reaches it. The groups' heaps are merged at the end. Bound: 2 R FLOP per pair and expert and
// 2 V for synergy; traffic: both sides once per item, and the map.
#include "cpu/pair_gate.h"

namespace flmoe::FLMOE_ISA {
namespace {

// Whether x comes before y: NaN first, then the larger value, then the earlier pair.
bool before(const PairCandidate& x, const PairCandidate& y) {
  const bool x_nan = x.value != x.value, y_nan = y.value != y.value;
  if (x_nan != y_nan) return x_nan;
  if (!x_nan && x.value != y.value) return x.value > y.value;
  return x.pair < y.pair;
}

// The best `capacity` candidates so far, as a binary heap with the worst of them in front.
struct Best {
  PairCandidate* heap;
  int64_t size, capacity;

  // Values below this are not inserted.
  double threshold() const { return size < capacity ? -INFINITY : heap[0].value; }

  void offer(const PairCandidate& x) {
    if (size < capacity) {
      int64_t at = size++;
      while (at > 0 && before(heap[(at - 1) / 2], x)) {
        heap[at] = heap[(at - 1) / 2];
        at = (at - 1) / 2;
      }
      heap[at] = x;
    } else if (before(x, heap[0])) {
      sink(x, size);
    }
  }

  // Puts x in place of the front of heap[0, n).
  void sink(const PairCandidate& x, int64_t n) {
    int64_t at = 0;
    for (;;) {
      int64_t child = 2 * at + 1;
      if (child >= n) break;
      if (child + 1 < n && before(heap[child], heap[child + 1])) ++child;
      if (!before(x, heap[child])) break;
      heap[at] = heap[child];
      at = child;
    }
    heap[at] = x;
  }

  // Sorts from first to last.
  void sort() {
    for (int64_t n = size; n > 1; --n) {
      const PairCandidate last = heap[n - 1], front = heap[0];
      sink(last, n - 1);
      heap[n - 1] = front;
    }
  }
};

template <typename A>
struct ScoreTile {
  A* pairs;           // logits in, contributions out
  const A* messages;  // h . c, for the experts of `synergy`
  const A *bias, *row_part, *column_part;
  uint32_t synergy;
  int64_t row_stride, rows, columns, top_k;  // row_stride: between experts of row_part
};

struct ScoreGate {
  template <typename A, int E, bool kTopK>
  static void run(const ScoreTile<A>& tile) {
    for (int64_t i = 0; i < tile.rows; ++i) {
      A* at = tile.pairs + i * kTileRow;
      const A* with = tile.messages + i * kTileRow;
      for (int64_t j = 0; j < tile.columns; j += kLanes<A>) {
        Vec<A> p[E];
#pragma GCC unroll 8
        for (int e = 0; e < E; ++e) p[e] = load(at + e * kTileExpert + j) + tile.bias[e];
        gate<A, E, kTopK>(p, tile.top_k);
#pragma GCC unroll 8
        for (int e = 0; e < E; ++e) {
          Vec<A> value =
              tile.row_part[e * tile.row_stride + i] + load(tile.column_part + e * kPairBlock + j);
          if (has(tile.synergy, e)) value += load(with + e * kTileExpert + j);
          store(at + e * kTileExpert + j, p[e] * value);
        }
      }
    }
  }
};

template <typename T, typename A>
struct ScoreItem {
  const PairScores& args;
  const PairArgs& in;
  int64_t b, first, last;
  uint32_t synergy;
  int64_t rows = 0, valid = 0;
  Buffer<int64_t> row_index, column_index;
  Buffer<A> q_copy, h, a_part;          // whole item
  Buffer<A> keys, values, column_part;  // one block of columns
  Buffer<A> logits, messages, bias;
  Rows<const A> q{};
  Best* best;  // experts + 1 of them, or null for pair_map

  ScoreItem(const PairScores& args, int64_t b, int64_t first, int64_t last, Best* best)
      : args(args),
        in(args.in),
        b(b),
        first(first),
        last(last),
        synergy(ExpertSets(args.in, PairReduce::kPool).synergy),
        row_index(last - first),
        column_index(in.columns),
        q_copy(in_place<T, A>(in.mask_a, in.rank)
                   ? 0
                   : in.experts * (last - first) * round_up(in.rank, kLanes<A>)),
        h(in.experts * (last - first) * in.width),
        a_part(in.experts * (last - first)),
        keys(in.experts * kPairBlock * in.rank),
        values(in.experts * kPairBlock * in.width),
        column_part(in.experts * kPairBlock),
        logits(in.experts * kTileExpert),
        messages(in.experts * kTileExpert),
        bias(in.experts),
        best(best) {}

  const T* head(int64_t e) const { return token<T>(args.head, b, e, 0); }

  A dot(const T* x, const T* y) const {
    A total = 0;
    for (int64_t d = 0; d < in.width; ++d) total += read<T, A>(x + d) * read<T, A>(y + d);
    return total;
  }

  void load_rows() {
    rows = valid_tokens(in.mask_a ? in.mask_a + b * in.rows : nullptr, first, last, row_index);
    valid =
        valid_tokens(in.mask_b ? in.mask_b + b * in.columns : nullptr, 0, in.columns, column_index);
    q = rows_of<T, A>(in, in.q, in.mask_a, kAllExperts, b, row_index, rows, in.rank, q_copy);
    load_bias(in, bias.data());
    for (int64_t e = 0; e < in.experts; ++e) {
      const Message& message = kMessages[in.kinds[e]];
      for (int64_t r = 0; r < rows; ++r) {
        const T* a = token<T>(in.a, b, e, row_index[r]);
        a_part[e * rows + r] = message.a != 0 ? A(message.a) * dot(a, head(e)) : A(0);
        if (!has(synergy, e)) continue;
        A* to = h + (e * rows + r) * in.width;
        for (int64_t d = 0; d < in.width; ++d)
          to[d] = A(message.product) * read<T, A>(a + d) * read<T, A>(head(e) + d);
      }
    }
  }

  void load_columns(const int64_t* index, int64_t count) {
    for (int64_t e = 0; e < in.experts; ++e) {
      const A s2 = A(kMessages[in.kinds[e]].c);
      gather_columns<T, A>(in.k, b, e, index, count, in.rank, A(in.scale) * folded_unit<A>(in),
                           keys + e * kPairBlock * in.rank);
      if (has(synergy, e))
        gather_columns<T, A>(in.c, b, e, index, count, in.width, A(1),
                             values + e * kPairBlock * in.width);
      for (int64_t j = 0; j < kPairBlock; ++j)
        column_part[e * kPairBlock + j] =
            s2 != 0 && j < count ? s2 * dot(token<T>(in.c, b, e, index[j]), head(e)) : A(0);
    }
  }

  void offer_vector(Vec<A> phi, int64_t lanes, int64_t row, const int64_t* index, Best& kept) {
    // Not "phi >= threshold": NaN has to pass.
    const auto below = phi < splat(static_cast<A>(kept.threshold()));
    bool any = false;
    for (int64_t lane = 0; lane < lanes; ++lane) any |= below[lane] == 0;
    if (!any) return;
    for (int64_t lane = 0; lane < lanes; ++lane)
      if (below[lane] == 0) kept.offer({phi[lane], row_index[row] * in.columns + index[lane]});
  }

  void keep_best(int64_t i, int64_t row, const int64_t* index, int64_t count) {
    const A* at = logits + i * kTileRow;
    for (int64_t j = 0; j < count; j += kLanes<A>) {
      const int64_t lanes = min64(kLanes<A>, count - j);
      Vec<A> total = {};
      for (int64_t e = 0; e < in.experts; ++e) {
        const Vec<A> phi = load(at + e * kTileExpert + j);
        total += phi;
        offer_vector(phi, lanes, row, index + j, best[e]);
      }
      offer_vector(total, lanes, row, index + j, best[in.experts]);
    }
  }

  void write_map(int64_t i, int64_t row, const int64_t* index, int64_t count) {
    for (int64_t e = 0; e < in.experts; ++e) {
      A* to = static_cast<A*>(args.map) +
              ((b * in.experts + e) * in.rows + row_index[row]) * in.columns;
      const A* at = logits + e * kTileExpert + i * kTileRow;
      for (int64_t j = 0; j < count; ++j) to[index[j]] = at[j];
    }
  }

  void run() {
    load_rows();
    if (rows == 0) return;
    for (int64_t j0 = 0; j0 < valid; j0 += kPairBlock) {
      const int64_t count = min64(kPairBlock, valid - j0);
      const int64_t padded = round_up(count, kLanes<A>);
      const int64_t* index = column_index + j0;
      load_columns(index, count);
      for (int64_t i0 = 0; i0 < rows; i0 += kPairTile) {
        const int64_t tile_rows = min64(kPairTile, rows - i0);
        for (int64_t e = 0; e < in.experts; ++e) {
          gemm<A>(tile_rows, padded, in.rank, q.at(e, i0), q.row, 1,
                  keys + e * kPairBlock * in.rank, kPairBlock, logits + e * kTileExpert, kTileRow,
                  false);
          if (has(synergy, e))
            gemm<A>(tile_rows, padded, in.width, h + (e * rows + i0) * in.width, in.width, 1,
                    values + e * kPairBlock * in.width, kPairBlock, messages + e * kTileExpert,
                    kTileRow, false);
        }
        for_experts<ScoreGate, A>(in)({logits, messages, bias, a_part + i0, column_part, synergy,
                                       rows, tile_rows, count, in.top_k});
        for (int64_t i = 0; i < tile_rows; ++i) {
          if (best != nullptr)
            keep_best(i, i0 + i, index, count);
          else
            write_map(i, i0 + i, index, count);
        }
      }
    }
  }
};

template <typename T, typename A>
void map(const PairScores& args) {
  const PairArgs& in = args.in;
  const RowBlocks cut(in);
  const int64_t each = cut.each, blocks = cut.count;
  parallel_for(in.batch * blocks, in.threads, [&](int64_t item, int) {
    const int64_t first = item % blocks * each;
    ScoreItem<T, A>(args, item / blocks, first, min64(first + each, in.rows), nullptr).run();
  });
}

template <typename A>
void write_best(const PairScores& args, Best& found, int64_t slot) {
  found.sort();
  A* values = static_cast<A*>(args.values) + slot * args.count;
  int64_t *i = args.i + slot * args.count, *j = args.j + slot * args.count;
  for (int64_t n = 0; n < args.count; ++n) {
    const bool there = n < found.size;
    values[n] = there ? static_cast<A>(found.heap[n].value) : A(-INFINITY);
    i[n] = there ? found.heap[n].pair / args.in.columns : -1;
    j[n] = there ? found.heap[n].pair % args.in.columns : -1;
  }
}

template <typename T, typename A>
void top(const PairScores& args) {
  const PairArgs& in = args.in;
  const RowBlocks cut(in);
  const int64_t groups = top_groups(in, args.count), slots = in.experts + 1;
  const int64_t entries = top_entries(in, args.count);
  const int64_t blocks = (cut.count + groups - 1) / groups;  // of one group
  const Buffer<Best> best(in.batch * groups * slots);
  for (int64_t n = 0; n < in.batch * groups * slots; ++n)
    best[n] = {static_cast<PairCandidate*>(args.candidates) + n * entries, 0, entries};
  parallel_for(in.batch * groups, in.threads, [&](int64_t item, int) {
    const int64_t begin = item % groups * blocks, end = min64(begin + blocks, cut.count);
    for (int64_t block = begin; block < end; ++block)
      ScoreItem<T, A>(args, item / groups, block * cut.each, min64((block + 1) * cut.each, in.rows),
                      best + item * slots)
          .run();
  });
  parallel_for(in.batch * slots, in.threads, [&](int64_t slot, int) {
    Best* own = best + slot / slots * groups * slots + slot % slots;
    for (int64_t group = 1; group < groups; ++group)
      for (int64_t n = 0; n < own[group * slots].size; ++n)
        own[0].offer(own[group * slots].heap[n]);
    write_best<A>(args, own[0], slot);
  });
}

}  // namespace

void pair_map(DType dtype, const PairScores& args) {
  with_dtype(dtype, [&]<typename T>() { map<T, typename Compute<T>::Type>(args); });
}

void pair_top(DType dtype, const PairScores& args) {
  with_dtype(dtype, [&]<typename T>() { top<T, typename Compute<T>::Type>(args); });
}

}  // namespace flmoe::FLMOE_ISA
