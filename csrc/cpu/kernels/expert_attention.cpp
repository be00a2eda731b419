// Softmax attention over packed problems, with dropout, without an (L, L) buffer.
//
// Forward: one item is (group, problem, head, block of rows). Keys are processed in blocks of 128
// (one dropout group), transposed once per item so that scores are a plain register-tiled product;
// the softmax is online, so memory is one tile of scores. Bound: 4 * L * L * width FLOP per problem
// and head. Backward: one item is (group, problem, head). It recomputes the probabilities from the
// log-sum-exp and forms all three gradients tile by tile; an item owns its outputs, so the result
// is deterministic. Few long problems are cut into ranges of rows, and an item is a range of
// queries with a range of keys: see Ranges.
#include <cmath>

#include "cpu/gemm.h"
#include "cpu/kernels/entry.h"

namespace flmoe::FLMOE_ISA {
namespace {

constexpr int64_t kKeyBlock = kDropoutGroup;
constexpr int64_t kRowBlock =
    384;  // about; amortises the packing of a key block; 98 KiB of output at width 64
constexpr int64_t kForwardTile = 24;
constexpr int64_t kBackwardTile = 48;  // the inner depth of two of the five products

template <typename T>
const T* row_of(const RowView& view, int64_t group, int64_t row, int64_t head) {
  return static_cast<const T*>(view.data) + group * view.group_stride + row * view.row_stride +
         head * view.head_stride;
}

// rows x width of a view into rows x padded, zero padded and scaled.
template <typename T, typename A>
void pack_rows(const T* in, int64_t stride, int64_t rows, int64_t width, int64_t padded, A scale,
               A* out) {
  for (int64_t r = 0; r < rows; ++r) {
    A* to = out + r * padded;
    for (int64_t d = 0; d < width; ++d) to[d] = read<T, A>(in + r * stride + d) * scale;
    for (int64_t d = width; d < padded; ++d) to[d] = 0;
  }
}

// rows <= 128 keys into width x 128, zero padded to whole vectors of keys.
template <typename T, typename A>
void pack_transposed(const T* in, int64_t stride, int64_t rows, int64_t width, A* out) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t r0 = 0; r0 < rows; r0 += lanes) {
    const int64_t count = min64(lanes, rows - r0);
    int64_t d = 0;
    if constexpr (sizeof(T) == sizeof(A) && kHasTranspose) {
      for (; d + lanes <= width; d += lanes) {
        Vec<A> square[lanes] = {};
        for (int64_t r = 0; r < count; ++r)
          std::memcpy(&square[r], in + (r0 + r) * stride + d, sizeof square[r]);
        transpose_square<A>(square);
        for (int64_t r = 0; r < lanes; ++r) store(out + (d + r) * kKeyBlock + r0, square[r]);
      }
    }
    for (; d < width; ++d) {
      A* to = out + d * kKeyBlock + r0;
      for (int64_t r = 0; r < lanes; ++r)
        to[r] = r < count ? read<T, A>(in + (r0 + r) * stride + d) : A(0);
    }
  }
}

struct Problem {
  int64_t group, index, head, first, length;
};

Problem problem_of(const AttentionForward& args, int64_t item) {
  const int64_t head = item % args.heads, index = item / args.heads % args.problems;
  const int64_t group = item / args.heads / args.problems;
  return {group, index, head, args.cumulative[index],
          args.cumulative[index + 1] - args.cumulative[index]};
}

// Converts a row of scores to unnormalised probabilities; updates the row's running maximum and sum
// and returns the factor for the sums accumulated before.
template <typename A>
A softmax_row(A* scores, int64_t keys, A* maximum, A* total) {
  const int64_t padded = round_up(keys, kLanes<A>);
  for (int64_t j = keys; j < padded; ++j) scores[j] = -INFINITY;
  const A old = *maximum;
  Vec<A> best = splat(old);
  for (int64_t j = 0; j < padded; j += kLanes<A>) best = max_vec<A>(load(scores + j), best);
  A top = max_lanes<A>(best);
  if (std::isinf(top)) {
    // The maximum passes over NaN, which here would not be seen in the sum.
    for (int64_t j = 0; j < keys; ++j)
      if (scores[j] != scores[j]) top = scores[j];
    if (top == -INFINITY) {
      // Only -inf so far: no weight yet. If it stays so, the row has a total of 0 and becomes NaN,
      // as in torch.
      for (int64_t j = 0; j < padded; ++j) scores[j] = 0;
      return A(1);
    }
  }
  Vec<A> sum = {};
  for (int64_t j = 0; j < padded; j += kLanes<A>) {
    const Vec<A> p = exp_nonpositive(load(scores + j) - top);
    sum += p;
    store(scores + j, p);
  }
  const A factor = old == top ? A(1) : exp_nonpositive(splat(old - top))[0];
  *total = *total * factor + sum_lanes<A>(sum);
  *maximum = *total == *total || top == A(INFINITY) ? top : *total;
  return factor;
}

template <typename A>
void drop_row(A* probabilities, int64_t keys, const Dropout& dropout, const Problem& problem,
              int64_t problem_id, int64_t row, int64_t group) {
  uint32_t bits[4];
  dropout_bits(dropout, static_cast<uint32_t>(problem_id), static_cast<uint32_t>(problem.head),
               static_cast<uint32_t>(row), static_cast<uint32_t>(group), bits);
  for (int64_t j = 0; j < keys; j += kLanes<A>)
    store(probabilities + j,
          keep_lanes<A>(load(probabilities + j), lane_bits<A>(bits, static_cast<int>(j))));
}

template <typename T, typename A>
void forward_item(const AttentionForward& args, const Problem& p, int64_t row0, int64_t rows) {
  const int64_t width = args.width, padded = round_up(width, kLanes<A>);
  const Dropout dropout = dropout_of(args.dropout);
  const Buffer<A> q(rows * padded), out(rows * padded), maximum(rows), total(rows);
  const Buffer<A> keys(width * kKeyBlock), values(kKeyBlock * padded);
  const Buffer<A> tile(kForwardTile * kKeyBlock);
  pack_rows<T, A>(row_of<T>(args.q, p.group, p.first + row0, p.head), args.q.row_stride, rows,
                  width, padded, A(args.scale), q);
  for (int64_t i = 0; i < rows; ++i) maximum[i] = -INFINITY, total[i] = 0;

  for (int64_t j0 = 0; j0 < p.length; j0 += kKeyBlock) {
    const int64_t count = min64(kKeyBlock, p.length - j0);
    const int64_t count_padded = round_up(count, kLanes<A>);
    pack_transposed<T, A>(row_of<T>(args.k, p.group, p.first + j0, p.head), args.k.row_stride,
                          count, width, keys);
    pack_rows<T, A>(row_of<T>(args.v, p.group, p.first + j0, p.head), args.v.row_stride, count,
                    width, padded, A(1), values);
    for (int64_t i0 = 0; i0 < rows; i0 += kForwardTile) {
      const int64_t tile_rows = min64(kForwardTile, rows - i0);
      gemm<A>(tile_rows, count_padded, width, q + i0 * padded, padded, 1, keys, kKeyBlock, tile,
              kKeyBlock, false);
      for (int64_t i = 0; i < tile_rows; ++i) {
        const A factor =
            softmax_row<A>(tile + i * kKeyBlock, count, maximum + i0 + i, total + i0 + i);
        if (j0 > 0 && factor != A(1))
          for (int64_t d = 0; d < padded; ++d) out[(i0 + i) * padded + d] *= factor;
        if (dropout.active())
          drop_row<A>(tile + i * kKeyBlock, count, dropout, p, p.group * args.problems + p.index,
                      row0 + i0 + i, j0 / kDropoutGroup);
      }
      gemm<A>(tile_rows, padded, count, tile, kKeyBlock, 1, values, padded, out + i0 * padded,
              padded, j0 > 0);
    }
  }
  const A kept = keep_scale<A>(dropout);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (p.group * args.rows + p.first + row0 + i) * args.heads + p.head;
    const A scale = kept / total[i];
    for (int64_t d = 0; d < padded; ++d) out[i * padded + d] *= scale;
    write_row<T, A>(out + i * padded, static_cast<T*>(args.out) + at * width, width);
    // With a score of inf the sum and all probabilities are NaN, and the log-sum-exp is inf, as in
    // torch.
    static_cast<A*>(args.lse)[at] =
        maximum[i] == A(INFINITY) ? maximum[i] : maximum[i] + std::log(total[i]);
  }
}

int64_t longest_problem(const AttentionForward& args) {
  int64_t longest = 0;
  for (int64_t p = 0; p < args.problems; ++p) {
    const int64_t length = args.cumulative[p + 1] - args.cumulative[p];
    longest = length > longest ? length : longest;
  }
  return longest;
}

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
  Buffer<A> q, grad_out, own_grad_q, lse, own_delta;                 // all queries
  Buffer<A> keys, keys_t, values_t, own_grad_keys, own_grad_values;  // one key block
  Buffer<A> probabilities, scores;                                   // one tile
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
        q(rows * padded),
        grad_out(rows * padded),
        own_grad_q(shared.rows ? 0 : rows * padded),
        lse(rows),
        own_delta(shared.rows ? 0 : rows),
        keys(kKeyBlock * padded),
        keys_t(width * kKeyBlock),
        values_t(width * kKeyBlock),
        own_grad_keys(shared.rows ? 0 : kKeyBlock * padded),
        own_grad_values(shared.rows ? 0 : kKeyBlock * padded),
        probabilities(kBackwardTile * kKeyBlock),
        scores(kBackwardTile * kKeyBlock),
        grad_q(shared.rows ? shared.grad_q + shared_row(row0) * padded : own_grad_q),
        delta(shared.rows ? shared.delta + shared_row(row0) : own_delta) {
    const AttentionForward& f = args.forward;
    pack_rows<T, A>(row_of<T>(f.q, p.group, p.first + row0, p.head), f.q.row_stride, rows, width,
                    padded, A(f.scale), q);
    pack_rows<T, A>(row_of<T>(args.grad_out, p.group, p.first + row0, p.head),
                    args.grad_out.row_stride, rows, width, padded, A(1), grad_out);
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
    pack_rows<T, A>(k, f.k.row_stride, count, width, padded, A(1), keys);
    pack_transposed<T, A>(k, f.k.row_stride, count, width, keys_t);
    pack_transposed<T, A>(v, f.v.row_stride, count, width, values_t);
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
    gemm<A>(tile_rows, keys_padded, width, q + i0 * padded, padded, 1, keys_t, kKeyBlock,
            probabilities, kKeyBlock, false);
    if (!wants_q && !wants_k) return;
    gemm<A>(tile_rows, keys_padded, width, grad_out + i0 * padded, padded, 1, values_t, kKeyBlock,
            scores, kKeyBlock, false);
  }

  void fill_delta() {
    if (!wants_q && !wants_k) return;
    if constexpr (kExactOutput) {
      for (int64_t i = 0; i < rows; ++i)
        delta[i] = dot_of<A>(static_cast<const A*>(args.forward.out) + element(row0 + i) * width,
                             grad_out + i * padded, width);
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
        const A *q_tile = q + i0 * padded, *go_tile = grad_out + i0 * padded;
        tile_products(i0, tile_rows, count_padded);
        for (int64_t i = 0; i < tile_rows; ++i) tile_row<false>(i, i0 + i, j0, count);
        if (wants_v)
          gemm<A>(count, padded, tile_rows, probabilities, 1, kKeyBlock, go_tile, padded,
                  grad_values, padded, !first || i0 > 0);
        if (wants_k)
          gemm<A>(count, padded, tile_rows, scores, 1, kKeyBlock, q_tile, padded, grad_keys, padded,
                  !first || i0 > 0);
        if (wants_q)
          gemm<A>(tile_rows, padded, count, scores, kKeyBlock, 1, keys, padded,
                  grad_q + i0 * padded, padded, !first || j0 > key0);
      }
      if (!last) continue;
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

// Rows of a group outside all problems are zero.
template <typename T>
void clear_uncovered(const AttentionForward& args, const RowView& view, int64_t width) {
  const int64_t first = args.cumulative[0], last = args.cumulative[args.problems];
  for (int64_t g = 0; g < args.groups; ++g)
    for (int64_t r = 0; r < args.rows; ++r)
      if (r < first || r >= last)
        for (int64_t h = 0; h < args.heads; ++h)
          std::memset(const_cast<T*>(row_of<T>(view, g, r, h)), 0, width * sizeof(T));
}

RowView contiguous(void* data, const AttentionForward& args, int64_t width) {
  return {data, args.rows * args.heads * width, args.heads * width, width};
}

}  // namespace

void attention_forward(DType dtype, const AttentionForward& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    clear_uncovered<T>(args, contiguous(args.out, args, args.width), args.width);
    clear_uncovered<A>(args, contiguous(args.lse, args, 1), 1);
    // Equal blocks: a short last one would load all keys for few rows.
    const int64_t longest = longest_problem(args);
    if (longest == 0) return;
    const int64_t blocks = longest > kRowBlock ? (longest + kRowBlock / 2) / kRowBlock : 1;
    const int64_t each = round_up((longest + blocks - 1) / blocks, kForwardTile);
    const int64_t items = args.groups * args.problems * args.heads * blocks;
    parallel_for(items, args.threads, [&](int64_t item, int) {
      const Problem p = problem_of(args, item / blocks);
      const int64_t row0 = item % blocks * each;
      if (row0 < p.length) forward_item<T, A>(args, p, row0, min64(each, p.length - row0));
    });
  });
}

void attention_backward(DType dtype, const AttentionBackward& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    const AttentionForward& f = args.forward;
    for (const RowView& grad : {args.grad_q, args.grad_k, args.grad_v})
      if (grad.data != nullptr) clear_uncovered<T>(f, grad, f.width);
    const Ranges ranges(f);
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
    if (ranges.count > 1) for_items([&](BackwardItem<T, A>& item, int64_t) { item.fill_delta(); });
    for (int64_t step = 0; step < ranges.count; ++step)
      for_items([&](BackwardItem<T, A>& item, int64_t range) {
        if (ranges.count == 1) item.fill_delta();
        const int64_t other = (range + ranges.count - step) % ranges.count;
        item.run(ranges.start(item.p, other), ranges.start(item.p, other + 1), step == 0,
                 step == ranges.count - 1);
      });
  });
}

}  // namespace flmoe::FLMOE_ISA
