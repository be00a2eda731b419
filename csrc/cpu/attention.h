// Parts of expert_attention that do not depend on how its products are computed: items, softmax,
// dropout.
#pragma once

#include "cpu/kernels/entry.h"
#include "cpu/softmax.h"

namespace flmoe::FLMOE_ISA {

constexpr int64_t kKeyBlock = kDropoutGroup;
constexpr int64_t kForwardTile = 24;
constexpr int64_t kShort = 128;  // rows of a problem that are read in place
constexpr int64_t kCacheLine = 64;
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
        Vec<A> square[lanes];
        if (count == lanes)
          for (int64_t r = 0; r < lanes; ++r) square[r] = load(in + (r0 + r) * stride + d);
        else
          for (int64_t r = 0; r < lanes; ++r)
            square[r] = r < count ? load(in + (r0 + r) * stride + d) : Vec<A>{};
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

inline int64_t longest_problem(const AttentionForward& args) {
  int64_t longest = 0;
  for (int64_t p = 0; p < args.problems; ++p) {
    const int64_t length = args.cumulative[p + 1] - args.cumulative[p];
    longest = length > longest ? length : longest;
  }
  return longest;
}

// Requests part `part` of `parts` of a problem's rows, all heads, to read or to write them.
template <typename T, bool kWrite>
void prefetch_rows(const AttentionForward& args, const RowView& view, const Problem& p,
                   int64_t part, int64_t parts) {
  if (view.data == nullptr || view.head_stride != args.width) return;
  const int64_t bytes = args.heads * args.width * sizeof(T);
  for (int64_t r = part; r < p.length; r += parts) {
    const char* row = reinterpret_cast<const char*>(row_of<T>(view, p.group, p.first + r, 0));
    for (int64_t at = 0; at < bytes; at += kCacheLine) {
      __builtin_prefetch(row + at, kWrite, 3);
      asm volatile("" : : "r"(row));  // else the compiler removes the loop: it computes nothing
    }
  }
}

// Calls item(problem) for every problem and head. If problems are many and short, a task takes up
// to 8 in turn, all heads of each, and prefetches the rows of the next problem. Each head touches
// only a few cache lines of every row, which the hardware prefetcher does not predict.
template <typename T, typename F>
void each_problem(const AttentionForward& args, std::initializer_list<RowView> inputs,
                  std::initializer_list<RowView> outputs, const F& item) {
  constexpr int64_t kMany = 64, kRun = 8, kAverage = 128;
  const int64_t problems = args.groups * args.problems;
  const bool few = problems < kMany || args.rows > kAverage * args.problems;
  const int64_t run = few ? 1 : min64(kRun, problems / (kMany / 4)), heads = few ? 1 : args.heads;
  const int64_t count = problems * args.heads / heads;
  parallel_for((count + run - 1) / run, args.threads, [&](int64_t index, int) {
    const int64_t end = min64(count, (index + 1) * run);
    for (int64_t i = index * run; i < end; ++i)
      for (int64_t h = 0; h < heads; ++h) {
        if (i + 1 < end) {
          const Problem next = problem_of(args, (i + 1) * heads);
          for (const RowView& view : inputs) prefetch_rows<T, false>(args, view, next, h, heads);
          for (const RowView& view : outputs) prefetch_rows<T, true>(args, view, next, h, heads);
        }
        const Problem p = problem_of(args, i * heads + h);
        if (p.length > 0) item(p);
      }
  });
}

// Calls item(args, problem, first row, rows) for each block of rows of every problem and head.
template <typename T, typename A, typename F>
void each_forward_item(const AttentionForward& args, const F& item) {
  clear_uncovered<T>(args, contiguous(args.out, args, args.width), args.width);
  clear_uncovered<A>(args, contiguous(args.lse, args, 1), 1);
  const int64_t longest = longest_problem(args);
  if (longest == 0) return;
  if (longest <= kRowBlock) {
    each_problem<T>(args, {args.q, args.k, args.v}, {contiguous(args.out, args, args.width)},
                    [&](const Problem& p) { item(args, p, 0, p.length); });
    return;
  }
  // Equal blocks: a short last one would load all keys for few rows.
  const int64_t blocks = (longest + kRowBlock / 2) / kRowBlock;
  const int64_t each = round_up((longest + blocks - 1) / blocks, kForwardTile);
  parallel_for(args.groups * args.problems * args.heads * blocks, args.threads,
               [&](int64_t index, int) {
                 const int64_t row0 = index % blocks * each;
                 const Problem p = problem_of(args, index / blocks);
                 if (row0 < p.length) item(args, p, row0, min64(each, p.length - row0));
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
  const RowView out = contiguous(const_cast<void*>(f.out), f, f.width);
  each_problem<T>(f, {f.q, f.k, f.v, args.grad_out, out}, {args.grad_q, args.grad_k, args.grad_v},
                  item);
}

}  // namespace flmoe::FLMOE_ISA
