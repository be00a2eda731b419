// Schedule of pair_moe's backward: which chunks of both sides are processed together.
//
// An item is a chunk of rows and processes the chunks of columns in rounds: within a round no two
// items share a row or a column, so every gradient is summed in a fixed order, without atomics. If
// one side is so short that too few items fit into a round, groups of items use copies of that
// side's gradients, which are summed at the end. Everything depends only on the shape.
#pragma once

#include "cpu/pair_gate.h"

namespace flmoe::FLMOE_ISA {

// Destination of gradients: those of the call or a group's copies, null if not wanted, and whether
// to accumulate.
template <typename A>
struct PairGradients {
  A *q, *k, *a, *c;
  bool add_rows = true, add_columns = true;
};

// An item of one round.
template <typename A>
struct PairChunks {
  int64_t b, first_row, last_row, first_column, last_column;
  PairGradients<A> gradients;
  A* grad_bias;  // (experts), accumulated
};

constexpr int64_t kRoundItems =
    8;  // enough for a few threads; more would pack both sides more often

// Chunks of one side: at most 256 tokens, which keeps an item's buffers in the second-level cache,
// and down to 64 if the batch alone is too small for many threads.
struct PairCut {
  int64_t each, count;

  PairCut(int64_t length, int64_t batch) {
    const int64_t least = (length + 255) / 256, most = (length + 63) / 64;
    const int64_t wanted = (kRoundItems + batch - 1) / batch;
    int64_t chunks = wanted < most ? wanted : most;
    if (chunks < least) chunks = least;
    each = round_up((length + chunks - 1) / chunks, 2 * kPairTile);  // whole tiles and vectors
    count = (length + each - 1) / each;
  }
};

// The chunks of the longer side form squares with those of the shorter side, and `groups` squares
// are processed at a time.
template <typename A>
struct PairRounds {
  const PairBackward& args;
  const PairArgs& in;
  PairCut row_cut, column_cut;
  bool short_columns;
  int64_t side, squares, groups, items, copy_size;
  Buffer<A> copies, grad_bias;

  explicit PairRounds(const PairBackward& args)
      : args(args),
        in(args.in),
        row_cut(args.in.rows, args.in.batch),
        column_cut(args.in.columns, args.in.batch),
        short_columns(column_cut.count <= row_cut.count),
        side(short_columns ? column_cut.count : row_cut.count),
        squares(((short_columns ? row_cut.count : column_cut.count) + side - 1) / side),
        groups(min64((kRoundItems + in.batch * side - 1) / (in.batch * side), squares)),
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

  PairGradients<A> gradients(int64_t group) const {
    PairGradients<A> all{static_cast<A*>(args.grad_q), static_cast<A*>(args.grad_k),
                         static_cast<A*>(args.grad_a), static_cast<A*>(args.grad_c)};
    if (group == 0) return all;
    A*& of_rank = short_columns ? all.k : all.q;
    A*& of_width = short_columns ? all.c : all.a;
    if (of_rank != nullptr) of_rank = rank_copy(group);
    if (of_width != nullptr) of_width = width_copy(group);
    return all;
  }

  template <typename F>
  void run_item(int64_t item, int64_t step, int64_t turn, const F& body) const {
    const int64_t i = item % side, group = item / side % groups, b = item / side / groups;
    const int64_t far = (step * groups + group) * side + i, near = (i + turn) % side;
    const int64_t row = short_columns ? far : near, column = short_columns ? near : far;
    if (row >= row_cut.count || column >= column_cut.count) return;
    PairGradients<A> to = gradients(group);
    // A chunk is first used in the first turn of its first step (shorter side: by group 0).
    const bool far_is_new = turn == 0, near_is_new = turn == 0 && step == 0 && group == 0;
    if (args.fresh) {
      to.add_rows = !(short_columns ? far_is_new : near_is_new);
      to.add_columns = !(short_columns ? near_is_new : far_is_new);
    }
    body(PairChunks<A>{b, row * row_cut.each, min64((row + 1) * row_cut.each, in.rows),
                       column * column_cut.each, min64((column + 1) * column_cut.each, in.columns),
                       to, grad_bias + item * in.experts});
  }

  static void add(const A* in, A* out, int64_t n) {
    for (int64_t d = 0; d < n; ++d) out[d] += in[d];
  }

  // Calls body(PairChunks) for every pair of chunks.
  template <typename F>
  void run(const F& body) const {
    for (int64_t step = 0; step * groups < squares; ++step)
      for (int64_t turn = 0; turn < side; ++turn)
        parallel_for(items, in.threads,
                     [&](int64_t item, int) { run_item(item, step, turn, body); });
    const PairGradients<A> all = gradients(0);
    A *of_rank = short_columns ? all.k : all.q, *of_width = short_columns ? all.c : all.a;
    for (int64_t group = 1; group < groups; ++group) {
      if (of_rank != nullptr) add(rank_copy(group), of_rank, copy_size * in.rank);
      if (of_width != nullptr) add(width_copy(group), of_width, copy_size * in.width);
    }
    for (int64_t item = 0; item < items && args.grad_bias != nullptr; ++item)
      add(grad_bias + item * in.experts, static_cast<A*>(args.grad_bias), in.experts);
  }
};

}  // namespace flmoe::FLMOE_ISA
