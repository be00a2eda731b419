// Definition of routing, row by row, shared by the CPU kernels, the GPU kernels and their
// simulation on the host. All functions are static, so that every instruction set has its own copy.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FLMOE_BOTH __host__ __device__
#else
#define FLMOE_BOTH
#endif

namespace flmoe {

// Whether value x of expert e comes before value y of expert f: NaN first, then the larger, then
// the lower expert. It is a total order, so that any tree of comparisons has the same result.
template <typename A>
static inline FLMOE_BOTH bool comes_before(A x, int64_t e, A y, int64_t f) {
  const bool x_nan = x != x, y_nan = y != y;
  if (x_nan != y_nan) return x_nan;
  if (!x_nan && x != y) return x > y;
  return e < f;
}

// Whether the row with number `place` of its expert (from 0) is kept; capacity -1 means no limit.
static inline FLMOE_BOTH bool has_room(int64_t place, int64_t capacity) {
  return capacity < 0 || place < capacity;
}

// Rows (tokens, top_k) by expert. mask (tokens): non-zero = valid, or null.
struct RoutingRows {
  const int64_t* index;
  const uint8_t* mask;
  int64_t rows;
  int32_t top_k, experts;
};

// The expert of a row, or -1 if it has none: dropped before, masked, or out of range.
static inline FLMOE_BOTH int32_t expert_of(const RoutingRows& in, int64_t row) {
  const int64_t e = in.index[row];
  const bool inside = e >= 0 && e < in.experts;
  // Rows fit 32 bits, whose division is several times faster on a GPU.
  const bool valid = in.mask == nullptr ||
                     in.mask[static_cast<uint32_t>(row) / static_cast<uint32_t>(in.top_k)] != 0;
  return inside && valid ? static_cast<int32_t>(e) : -1;
}

// How rows are split into blocks of a GPU. blocks = 1 and alone: one launch does everything.
struct RoutingPlan {
  int64_t blocks, rows_per_block;
  bool alone;
};

// Threads per block if there is a single block, and if there are many.
constexpr int kAloneThreads = 1024, kManyThreads = 256;
// Counters of a block in shared memory, 32 KiB: one per warp and bin, so many bins in one window.
constexpr int kTallies = 8192;

static inline int64_t ceil_div(int64_t n, int64_t by) {
  return (n + by - 1) / by;
}

// Bins are experts, and for dispatch one more bin for the dropped rows.
//
// A block processes its rows twice per window of bins, with 32 warps at a time if it is the only
// block: 8192 rows are 16 short steps, about the cost of two more launches. For more rows, blocks
// have 1024 rows, four steps of each warp's 32 lanes, so that 64 experts of 16384 tokens fill the
// GPU. The limits are 1024 blocks, all at once on the largest GPU, and 2^24 counters (64 MiB).
static inline RoutingPlan routing_plan(int64_t rows, int64_t bins) {
  constexpr int64_t kAloneRows = 8192, kBlockRows = 1024, kBlocks = 1024;
  constexpr int64_t kCounters = int64_t{1} << 24;
  if (rows * ceil_div(bins, kTallies / (kAloneThreads / 32)) <= kAloneRows) return {1, rows, true};
  int64_t most = kCounters / bins;
  most = most < 1 ? 1 : most < kBlocks ? most : kBlocks;
  const int64_t wanted = ceil_div(rows, kBlockRows);
  const int64_t blocks = wanted < most ? wanted : most;
  const int64_t each = ceil_div(ceil_div(rows, blocks), kBlockRows) * kBlockRows;
  return {ceil_div(rows, each), each, false};
}

// Counters between launches: one per bin and block.
static inline int64_t routing_counters(const RoutingPlan& plan, int64_t bins) {
  return plan.alone ? 0 : plan.blocks * bins;
}

}  // namespace flmoe
