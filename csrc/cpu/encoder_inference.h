// Fusion encoders of all experts without gradients, from embedded rows to pooled latents.
//
// An item is an expert with a run of samples of about 96 rows or more. Its rows, queries, keys and
// values stay in the cache through all layers; other activations live for one block of 96 rows, so
// only weights and pooled means grow with the number of experts. Norms are the prologue, biases,
// GELU and residuals the epilogue of a product while its block is in the cache. The last MLP is
// pooled before its second product, because the mean of W h is W times the mean of h. If there are
// too few items for the threads, the blocks of a phase run in parallel instead; the results are the
// same.
//
// Weights are packed in every call. Kept copies would have to be compared with the weights, because
// a change through `.data` leaves the version of a tensor as it is.
//
// Product gives the operand type E and the type A of everything else. Operand B has b_row columns
// in its rows; element (k, n) starts at k * b_row + kUnit * n if k is a multiple of kUnit. Samples
// start at a multiple of kUnit; rows between them are 0.
#pragma once

#include "cpu/inference_item.h"

namespace flmoe::FLMOE_ISA {

template <typename T, typename Product>
struct Inference {
  using A = typename Product::A;
  using E = typename Product::E;
  using Run = Item<T, Product>;

  const EncoderInference& args;
  const Sizes<Product> sizes;
  const Weights<T, Product> weights;
  const Cut<Product> cut;
  const bool shares;  // the first layer's projections of the table are computed once
  const Buffer<E> shared;
  const Buffer<A> pooled, pooled_hidden;

  explicit Inference(const EncoderInference& args)
      : args(args),
        sizes(args),
        weights(args, sizes),
        cut(args),
        shares(args.index != nullptr && args.table < args.rows_total),
        shared(shares ? args.experts * 3 * sizes.blocks * args.table * sizes.block_row : 0),
        pooled(args.experts * args.segments * sizes.row),
        pooled_hidden(args.experts * args.segments * sizes.hidden_row) {}

  Run item_of(int64_t expert, int64_t i) const {
    return {args,
            sizes,
            cut,
            weights.data() + expert * args.layers * sizes.layer,
            shares ? shared.data() : nullptr,
            expert,
            i,
            pooled + expert * args.segments * sizes.row,
            pooled_hidden + expert * args.segments * sizes.hidden_row};
  }

  // Phases of a layer: projections, then everything else.
  void run_block(const Run& item, int64_t phase, int64_t r0, int64_t r1) const {
    const int64_t layer = phase / 2;
    if (phase % 2 == 0)
      item.project(layer, r0, r1);
    else if (!last(phase))
      item.layer_block(layer, r0, r1);
    else
      item.pool_block(r0, r1);
  }

  bool last(int64_t phase) const { return phase == 2 * args.layers - 1; }

  void run_items() const {
    parallel_for(args.experts * cut.items, args.threads, [&](int64_t place, int) {
      Run item = item_of(place / cut.items, place % cut.items);
      const Buffer<A> memory(Run::sums(sizes, item.rows));
      const Buffer<E> operands(Run::operands(sizes, item.rows));
      item.place(memory, operands);
      for (int64_t phase = 0; phase < 2 * args.layers; ++phase)
        for (int64_t r0 = 0, r1; r0 < item.rows; r0 = r1) {
          r1 = cut.block_end(item.index, r0, last(phase));
          run_block(item, phase, r0, r1);
        }
    });
  }

  // The same, with the blocks of a phase in parallel.
  void run_phases() const {
    const Buffer<int64_t> sum_starts(cut.items + 1), operand_starts(cut.items + 1);
    int64_t blocks = 0;
    sum_starts[0] = operand_starts[0] = 0;
    for (int64_t i = 0; i < cut.items; ++i) {
      sum_starts[i + 1] = sum_starts[i] + Run::sums(sizes, cut.rows(i));
      operand_starts[i + 1] = operand_starts[i] + Run::operands(sizes, cut.rows(i));
      for (int64_t r0 = 0; r0 < cut.rows(i); r0 = cut.block_end(i, r0, false)) ++blocks;
    }
    const int64_t sums = sum_starts[cut.items], operands = operand_starts[cut.items];
    const Buffer<A> memory(args.experts * sums);
    const Buffer<E> operand_memory(args.experts * operands);
    const Buffer<int64_t> block(3 * blocks);
    for (int64_t phase = 0; phase < 2 * args.layers; ++phase) {
      int64_t count = 0;
      for (int64_t i = 0; i < cut.items; ++i)
        for (int64_t r0 = 0, r1; r0 < cut.rows(i); r0 = r1) {
          r1 = cut.block_end(i, r0, last(phase));
          block[3 * count] = i, block[3 * count + 1] = r0, block[3 * count++ + 2] = r1;
        }
      parallel_for(args.experts * count, args.threads, [&](int64_t place, int) {
        const int64_t *at = block + place % count * 3, expert = place / count;
        Run item = item_of(expert, at[0]);
        item.place(memory + expert * sums + sum_starts[at[0]],
                   operand_memory + expert * operands + operand_starts[at[0]]);
        run_block(item, phase, at[1], at[2]);
      });
    }
  }

  // q, k and v of every row of the table in the first layer.
  void project_table() const {
    const int64_t blocks = (args.table + kInferenceRows - 1) / kInferenceRows;
    parallel_for(args.experts * blocks, args.threads, [&](int64_t place, int) {
      const int64_t expert = place / blocks, r0 = place % blocks * kInferenceRows;
      const int64_t count = min64(kInferenceRows, args.table - r0);
      const Buffer<A> row(sizes.row), buffer(sizes.row);
      const Buffer<E> normed(count * sizes.row);
      const Run item = item_of(expert, 0);
      const T* table = static_cast<const T*>(args.rows) +
                       ((args.row_sets > 1 ? expert : 0) * args.table + r0) * sizes.width;
      for (int64_t r = 0; r < count; ++r) {
        read_row<T, A>(table + r * sizes.width, row, sizes.width);
        normalize<A, E>(row, sizes.width, sizes.row, item.vector(0, kGain1),
                        item.vector(0, kShift1), A(args.eps), buffer, normed + r * sizes.row);
      }
      for (int64_t role = 0; role < 3; ++role)
        for (int64_t b = 0; b < sizes.blocks; ++b)
          item.heads_of(normed, 0, count, role, b,
                        shared + (((expert * 3 + role) * sizes.blocks + b) * args.table + r0) *
                                     sizes.block_row);
    });
  }

  void write_latents() const {
    const int64_t blocks = (args.segments + kInferenceRows - 1) / kInferenceRows;
    parallel_for(args.experts * blocks, args.threads, [&](int64_t place, int) {
      const int64_t expert = place / blocks, s0 = place % blocks * kInferenceRows;
      const int64_t count = min64(kInferenceRows, args.segments - s0);
      const int64_t at = expert * args.segments + s0, layer = args.layers - 1;
      const Run item = item_of(expert, 0);
      const Buffer<E> converted(sizeof(E) == sizeof(A) ? 0 : count * sizes.hidden_row);
      A* hidden = pooled_hidden + at * sizes.hidden_row;
      times<Product>(Product::operand(hidden, sizes.hidden_row, count, converted), sizes.hidden_row,
                     count, sizes.hidden, item.matrix(layer, kOut), item.vector(layer, kOutBias),
                     sizes.width, pooled + at * sizes.row, sizes.row, true);
      for (int64_t s = 0; s < count; ++s) {
        A* latent = pooled + (at + s) * sizes.row;
        if (args.cu_segments[s0 + s] == args.cu_segments[s0 + s + 1])
          std::memset(latent, 0, sizes.width * sizeof(A));
        write_row<T, A>(latent, static_cast<T*>(args.out) + (at + s) * sizes.width, sizes.width);
      }
    });
  }

  void run() const {
    std::memset(pooled, 0, args.experts * args.segments * sizes.row * sizeof(A));
    std::memset(pooled_hidden, 0, args.experts * args.segments * sizes.hidden_row * sizeof(A));
    if (shares) project_table();
    if (args.experts * cut.items >= 4 * args.threads)
      run_items();
    else
      run_phases();
    write_latents();
  }
};

}  // namespace flmoe::FLMOE_ISA
