// Parts of expert_attention that do not depend on how its products are computed: items, softmax,
// dropout.
#pragma once

#include "cpu/kernels/entry.h"
#include "cpu/softmax.h"

namespace flmoe::FLMOE_ISA {

constexpr int64_t kKeyBlock = kDropoutGroup;
constexpr int64_t kForwardTile = 24;
constexpr int64_t kShort = 32;  // rows of a short problem
constexpr int64_t kRowBlock =
    384;  // approximate; amortises the packing of a key block (98 KiB of output at width 64)

template <typename T>
const T* row_of(const RowView& view, int64_t group, int64_t row, int64_t head) {
  return static_cast<const T*>(view.data) + group * view.group_stride + row * view.row_stride +
         head * view.head_stride;
}

struct Problem {
  int64_t group, index, head, first, length;
};

inline Problem problem_of(const AttentionForward& args, int64_t item) {
  const int64_t head = item % args.heads, index = item / args.heads % args.problems;
  const int64_t group = item / args.heads / args.problems;
  return {group, index, head, args.cumulative[index],
          args.cumulative[index + 1] - args.cumulative[index]};
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

template <typename A>
struct Rows {
  const A* data;
  int64_t stride;
  const A* operator[](int64_t row) const { return data + row * stride; }
};

// Rows of a view in the compute type, zero padded: in place if nothing has to be converted or
// padded and they are few, because many rows with a large stride do not stay in the cache; else a
// copy.
template <typename T, typename A>
Rows<A> packed_rows(const T* in, int64_t stride, int64_t rows, int64_t width, int64_t padded,
                    A* copy) {
  if constexpr (sizeof(T) == sizeof(A)) {
    if (rows <= kShort && padded == width) return {reinterpret_cast<const A*>(in), stride};
  }
  for (int64_t r = 0; r < rows; ++r) {
    A* to = copy + r * padded;
    for (int64_t d = 0; d < width; ++d) to[d] = read<T, A>(in + r * stride + d);
    for (int64_t d = width; d < padded; ++d) to[d] = 0;
  }
  return {copy, padded};
}

// rows <= 128 keys into width x 128, scaled and zero padded to whole vectors of keys.
template <typename T, typename A>
void pack_transposed(const T* in, int64_t stride, int64_t rows, int64_t width, A scale, A* out) {
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
        for (int64_t r = 0; r < lanes; ++r)
          store(out + (d + r) * kKeyBlock + r0, square[r] * scale);
      }
    }
    for (; d < width; ++d) {
      A* to = out + d * kKeyBlock + r0;
      for (int64_t r = 0; r < lanes; ++r)
        to[r] = r < count ? read<T, A>(in + (r0 + r) * stride + d) * scale : A(0);
    }
  }
}

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

inline RowView contiguous(void* data, const AttentionForward& args, int64_t width) {
  return {data, args.rows * args.heads * width, args.heads * width, width};
}

// Heads of a problem in one item: all if the problems are short and many. One head alone takes less
// time than scheduling an item.
inline int64_t heads_of_item(const AttentionForward& args) {
  constexpr int64_t kMany = 64;
  const bool together = args.groups * args.problems >= kMany && args.rows <= kShort * args.problems;
  return together ? args.heads : 1;
}

inline int64_t longest_problem(const AttentionForward& args) {
  int64_t longest = 0;
  for (int64_t p = 0; p < args.problems; ++p) {
    const int64_t length = args.cumulative[p + 1] - args.cumulative[p];
    longest = length > longest ? length : longest;
  }
  return longest;
}

// Calls item(args, problem, first row, rows) for each block of rows of every problem and head.
template <typename T, typename A, typename F>
void each_forward_item(const AttentionForward& args, const F& item) {
  clear_uncovered<T>(args, contiguous(args.out, args, args.width), args.width);
  clear_uncovered<A>(args, contiguous(args.lse, args, 1), 1);
  const int64_t longest = longest_problem(args);
  if (longest == 0) return;
  // Equal blocks: a short last one would load all keys for few rows.
  const int64_t blocks = longest > kRowBlock ? (longest + kRowBlock / 2) / kRowBlock : 1;
  const int64_t each = round_up((longest + blocks - 1) / blocks, kForwardTile);
  const int64_t heads = heads_of_item(args);
  const int64_t items = args.groups * args.problems * args.heads / heads * blocks;
  parallel_for(items, args.threads, [&](int64_t index, int) {
    const int64_t row0 = index % blocks * each;
    for (int64_t h = 0; h < heads; ++h) {
      const Problem p = problem_of(args, index / blocks * heads + h);
      if (row0 < p.length) item(args, p, row0, min64(each, p.length - row0));
    }
  });
}

template <typename T>
void clear_gradients(const AttentionBackward& args) {
  for (const RowView& grad : {args.grad_q, args.grad_k, args.grad_v})
    if (grad.data != nullptr) clear_uncovered<T>(args.forward, grad, args.forward.width);
}

// Calls item(problem) for every problem and head that has rows.
template <typename T, typename F>
void each_backward_item(const AttentionBackward& args, const F& item) {
  const AttentionForward& f = args.forward;
  clear_gradients<T>(args);
  const int64_t heads = heads_of_item(f);
  parallel_for(f.groups * f.problems * f.heads / heads, f.threads, [&](int64_t index, int) {
    for (int64_t h = 0; h < heads; ++h) {
      const Problem p = problem_of(f, index * heads + h);
      if (p.length > 0) item(p);
    }
  });
}

}  // namespace flmoe::FLMOE_ISA
