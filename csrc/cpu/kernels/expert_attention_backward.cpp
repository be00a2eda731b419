// Gradients of the softmax attention over packed problems.
//
// One item is (group, problem, head). It recomputes the probabilities from the log-sum-exp and
// forms all three gradients tile by tile; an item owns its outputs, so the result is deterministic.
// Few long problems are cut into ranges of rows, and an item is a range of queries with a range of
// keys: see Ranges.
#include "cpu/attention.h"
#include "cpu/gemm.h"

namespace flmoe::FLMOE_ISA {
namespace {

constexpr int64_t kBackwardTile = 48;  // the inner depth of two of the five products

// Ranges of rows into which the backward cuts every problem. In step t, range r of the queries
// meets range r - t of the keys (modulo their number), so the items of a step share no gradient,
// and the order of the sums is fixed. Depends only on the shape, so results do not depend on
// threads.
struct Ranges {
  int64_t count;

  explicit Ranges(const AttentionForward& args) {
    constexpr int64_t kItems = 32, kLeast = 4 * kKeyBlock;
    const int64_t items = args.groups * args.problems * args.heads;
    const int64_t wanted = items > 0 ? (kItems + items - 1) / items : 1;
    const int64_t most = longest_problem(args) / kLeast;
    count = most < 1 ? 1 : min64(wanted, most);
  }

  // The first row of a range, a multiple of kKeyBlock, or the end.
  int64_t start(const Problem& p, int64_t range) const {
    return min64(p.length, range * round_up((p.length + count - 1) / count, kKeyBlock));
  }
};

// What the items of the backward's steps share if there are several ranges; otherwise empty.
template <typename A>
struct BackwardSums {
  int64_t rows, padded;
  Buffer<A> grad_q, grad_k, grad_v, delta;

  BackwardSums(const AttentionForward& args, const Ranges& ranges)
      : rows(ranges.count > 1 ? args.groups * args.heads * args.rows : 0),
        padded(round_up(args.width, kLanes<A>)),
        grad_q(rows * padded),
        grad_k(rows * padded),
        grad_v(rows * padded),
        delta(rows) {}
};

// Queries [row0, row0 + rows) and keys [key0, key_end) of one problem and head.
template <typename T, typename A>
struct BackwardItem {
  // delta = out . grad_out, unless the output was rounded to half precision: the gradient of the
  // scores is then a difference of nearly equal numbers, so delta is summed from the probabilities
  // in a separate pass.
  static constexpr bool kExactOutput = sizeof(T) == sizeof(A);

  const AttentionBackward& args;
  const BackwardSums<A>& shared;
  const Problem& p;
  int64_t row0, rows;
  bool wants_q, wants_k, wants_v;
  int64_t width, padded;
  Dropout dropout;
  A kept;
  Buffer<A> q_copy, grad_out_copy, own_grad_q, lse, own_delta;            // all queries
  Buffer<A> keys_copy, keys_t, values_t, own_grad_keys, own_grad_values;  // one key block
  Buffer<A> probabilities, scores;                                        // one tile
  Rows<A> q, grad_out, keys;
  A *grad_q, *delta;

  BackwardItem(const AttentionBackward& args, const BackwardSums<A>& shared, const Problem& p,
               int64_t row0, int64_t row_end)
      : args(args),
        shared(shared),
        p(p),
        row0(row0),
        rows(row_end - row0),
        wants_q(args.grad_q.data != nullptr),
        wants_k(args.grad_k.data != nullptr),
        wants_v(args.grad_v.data != nullptr),
        width(args.forward.width),
        padded(round_up(width, kLanes<A>)),
        dropout(dropout_of(args.forward.dropout)),
        kept(keep_scale<A>(dropout)),
        q_copy(rows * padded),
        grad_out_copy(rows * padded),
        own_grad_q(shared.rows ? 0 : rows * padded),
        lse(rows),
        own_delta(shared.rows ? 0 : rows),
        keys_copy(kKeyBlock * padded),
        keys_t(width * kKeyBlock),
        values_t(width * kKeyBlock),
        own_grad_keys(shared.rows ? 0 : kKeyBlock * padded),
        own_grad_values(shared.rows ? 0 : kKeyBlock * padded),
        probabilities(kBackwardTile * kKeyBlock),
        scores(kBackwardTile * kKeyBlock),
        grad_q(shared.rows ? shared.grad_q + shared_row(row0) * padded : own_grad_q),
        delta(shared.rows ? shared.delta + shared_row(row0) : own_delta) {
    const AttentionForward& f = args.forward;
    q = packed_rows<T, A>(row_of<T>(f.q, p.group, p.first + row0, p.head), f.q.row_stride, rows,
                          width, padded, q_copy);
    grad_out = packed_rows<T, A>(row_of<T>(args.grad_out, p.group, p.first + row0, p.head),
                                 args.grad_out.row_stride, rows, width, padded, grad_out_copy);
    for (int64_t i = 0; i < rows; ++i) {
      lse[i] = static_cast<const A*>(f.lse)[element(row0 + i)];
      if (lse[i] == A(INFINITY)) lse[i] = A(NAN);  // so that all probabilities of the row are NaN
    }
  }

  int64_t element(int64_t row) const {
    return (p.group * args.forward.rows + p.first + row) * args.forward.heads + p.head;
  }

  int64_t shared_row(int64_t row) const {
    return (p.group * args.forward.heads + p.head) * args.forward.rows + p.first + row;
  }

  T* output_row(const RowView& grad, int64_t row) const {
    return const_cast<T*>(row_of<T>(grad, p.group, p.first + row, p.head));
  }

  void load_block(int64_t j0, int64_t count) {
    const AttentionForward& f = args.forward;
    const T* k = row_of<T>(f.k, p.group, p.first + j0, p.head);
    const T* v = row_of<T>(f.v, p.group, p.first + j0, p.head);
    keys = packed_rows<T, A>(k, f.k.row_stride, count, width, padded, keys_copy);
    pack_transposed<T, A>(k, f.k.row_stride, count, width, A(f.scale), keys_t);
    pack_transposed<T, A>(v, f.v.row_stride, count, width, A(1), values_t);
  }

  // One row of a tile: scores -> dropped probabilities (for grad_v), grad_out . v -> gradient of
  // the scores. With kOnlyDelta it only adds to delta[row] = sum over keys of probability * its
  // gradient.
  template <bool kOnlyDelta>
  void tile_row(int64_t i, int64_t row, int64_t j0, int64_t count) {
    A* prob = probabilities + i * kKeyBlock;
    A* grad = scores + i * kKeyBlock;
    Vec<A> sum = {};
    uint32_t bits[4];
    if (dropout.active())
      dropout_bits(dropout, static_cast<uint32_t>(p.group * args.forward.problems + p.index),
                   static_cast<uint32_t>(p.head), static_cast<uint32_t>(row0 + row),
                   static_cast<uint32_t>(j0 / kDropoutGroup), bits);
    for (int64_t j = 0; j < count; j += kLanes<A>) {
      const Vec<A> x = exp_nonpositive(load(prob + j) - lse[row]);
      Vec<A> dropped = x, g = load(grad + j);
      if (dropout.active()) {
        // A factor, not a selection: as in torch, a dropped NaN stays NaN.
        const Vec<A> factor = keep_lanes<A>(splat(kept), lane_bits<A>(bits, static_cast<int>(j)));
        dropped = x * factor;
        g *= factor;
      }
      if constexpr (kOnlyDelta) {
        const int64_t left = count - j;  // past the last key, x may be infinite
        sum += keep_lanes<A>(x * g, left < kLanes<A> ? (1u << left) - 1 : ~0u);
      } else {
        store(prob + j, dropped);
        store(grad + j, x * (g - delta[row]));
      }
    }
    if constexpr (kOnlyDelta) delta[row] += sum_lanes<A>(sum);
  }

  // Scores and, for the gradients of q and k, grad_out . v of a tile of rows against the loaded
  // block of keys.
  void tile_products(int64_t i0, int64_t tile_rows, int64_t keys_padded) {
    gemm<A>(tile_rows, keys_padded, width, q[i0], q.stride, 1, keys_t, kKeyBlock, probabilities,
            kKeyBlock, false);
    if (!wants_q && !wants_k) return;
    gemm<A>(tile_rows, keys_padded, width, grad_out[i0], grad_out.stride, 1, values_t, kKeyBlock,
            scores, kKeyBlock, false);
  }

  void fill_delta() {
    if (!wants_q && !wants_k) return;
    if constexpr (kExactOutput) {
      for (int64_t i = 0; i < rows; ++i)
        delta[i] = dot_of<A>(static_cast<const A*>(args.forward.out) + element(row0 + i) * width,
                             grad_out[i], width);
      return;
    }
    for (int64_t i = 0; i < rows; ++i) delta[i] = 0;
    for (int64_t j0 = 0; j0 < p.length; j0 += kKeyBlock) {
      const int64_t count = min64(kKeyBlock, p.length - j0);
      load_block(j0, count);
      for (int64_t i0 = 0; i0 < rows; i0 += kBackwardTile) {
        const int64_t tile_rows = min64(kBackwardTile, rows - i0);
        tile_products(i0, tile_rows, round_up(count, kLanes<A>));
        for (int64_t i = 0; i < tile_rows; ++i) tile_row<true>(i, i0 + i, j0, count);
      }
    }
  }

  // first, last: whether this is the first or the last step of the item's queries and keys.
  void run(int64_t key0, int64_t key_end, bool first, bool last) {
    for (int64_t j0 = key0; j0 < key_end; j0 += kKeyBlock) {
      const int64_t count = min64(kKeyBlock, key_end - j0);
      const int64_t count_padded = round_up(count, kLanes<A>);
      A* grad_keys = shared.rows ? shared.grad_k + shared_row(j0) * padded : own_grad_keys;
      A* grad_values = shared.rows ? shared.grad_v + shared_row(j0) * padded : own_grad_values;
      load_block(j0, count);
      for (int64_t i0 = 0; i0 < rows; i0 += kBackwardTile) {
        const int64_t tile_rows = min64(kBackwardTile, rows - i0);
        tile_products(i0, tile_rows, count_padded);
        for (int64_t i = 0; i < tile_rows; ++i) tile_row<false>(i, i0 + i, j0, count);
        if (wants_v)
          gemm<A>(count, padded, tile_rows, probabilities, 1, kKeyBlock, grad_out[i0],
                  grad_out.stride, grad_values, padded, !first || i0 > 0);
        if (wants_k)
          gemm<A>(count, padded, tile_rows, scores, 1, kKeyBlock, q[i0], q.stride, grad_keys,
                  padded, !first || i0 > 0);
        if (wants_q)
          gemm<A>(tile_rows, padded, count, scores, kKeyBlock, 1, keys.data, keys.stride,
                  grad_q + i0 * padded, padded, !first || j0 > key0);
      }
      if (!last) continue;
      if (wants_k)
        for (int64_t i = 0; i < count * padded; ++i) grad_keys[i] *= A(args.forward.scale);
      for (int64_t j = 0; j < count; ++j) {
        if (wants_k)
          write_row<T, A>(grad_keys + j * padded, output_row(args.grad_k, j0 + j), width);
        if (wants_v)
          write_row<T, A>(grad_values + j * padded, output_row(args.grad_v, j0 + j), width);
      }
    }
    if (!wants_q || !last) return;
    for (int64_t i = 0; i < rows * padded; ++i) grad_q[i] *= A(args.forward.scale);
    for (int64_t i = 0; i < rows; ++i)
      write_row<T, A>(grad_q + i * padded, output_row(args.grad_q, row0 + i), width);
  }
};

}  // namespace

void attention_backward(DType dtype, const AttentionBackward& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    const AttentionForward& f = args.forward;
    const Ranges ranges(f);
    if (ranges.count == 1) {
      const BackwardSums<A> none(f, ranges);
      each_backward_item<T>(args, [&](const Problem& p) {
        BackwardItem<T, A> item(args, none, p, 0, p.length);
        item.fill_delta();
        item.run(0, p.length, true, true);
      });
      return;
    }
    clear_gradients<T>(args);
    const BackwardSums<A> shared(f, ranges);
    const int64_t items = f.groups * f.problems * f.heads * ranges.count;
    const auto for_items = [&](const auto& body) {
      parallel_for(items, f.threads, [&](int64_t item, int) {
        const Problem p = problem_of(f, item / ranges.count);
        const int64_t range = item % ranges.count;
        if (p.length == 0) return;
        BackwardItem<T, A> part(args, shared, p, ranges.start(p, range),
                                ranges.start(p, range + 1));
        body(part, range);
      });
    };
    for_items([&](BackwardItem<T, A>& item, int64_t) { item.fill_delta(); });
    for (int64_t step = 0; step < ranges.count; ++step)
      for_items([&](BackwardItem<T, A>& item, int64_t range) {
        const int64_t other = (range + ranges.count - step) % ranges.count;
        item.run(ranges.start(item.p, other), ranges.start(item.p, other + 1), step == 0,
                 step == ranges.count - 1);
      });
  });
}

}  // namespace flmoe::FLMOE_ISA
