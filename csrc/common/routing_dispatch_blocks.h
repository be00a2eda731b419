// limit and dispatch on a GPU: the work of each block of each launch, in terms of
// common/routing_block.h.
//
// Blocks never read what other blocks of a launch write; launches of a stream run in order.
#pragma once

#include "common/routing.h"
#include "common/routing_block.h"

namespace flmoe::routing {

// Rows of one warp are consecutive, so that the order of warps is that of rows.
struct Run {
  int64_t begin, end;
};

FLMOE_BODY Run run_of(const RoutingRows& in, const RoutingPlan& plan, int64_t block, int warp,
                      int warps) {
  const int64_t first = block * plan.rows_per_block;
  const int64_t last =
      first + plan.rows_per_block < in.rows ? first + plan.rows_per_block : in.rows;
  const int64_t steps = (plan.rows_per_block + warps * kLanes - 1) / (warps * kLanes);
  const int64_t begin = first + warp * steps * kLanes;
  const int64_t end = begin + steps * kLanes;
  return {begin, end < last ? end : last};
}

// Bins [first, first + width) that one walk over the rows counts.
struct Window {
  int32_t first, width;
};

// The bin of a row: its expert; for dropped rows the bin after all experts, if there is one.
FLMOE_BODY int32_t bin_of(const RoutingRows& in, int64_t row, bool dropped_too) {
  const int32_t e = expert_of(in, row);
  return e < 0 && dropped_too ? in.experts : e;
}

// Walks a warp's run in order. tally has a counter for each bin of the window: use(row, bin, place)
// gets its value plus the number of this step's rows of that bin before this one, then it is
// advanced. place is -1 for a row outside the window, bin -1 for one that no bin takes.
template <typename Warp, typename Use>
FLMOE_BODY void walk(Warp& warp, const RoutingRows& in, const Run& run, const Window& window,
                     bool dropped_too, int32_t* tally, const Use& use) {
  constexpr int kAhead = 4;  // loads in flight
  for (int64_t at = run.begin; at < run.end; at += kAhead * kLanes) {
    typename Warp::template Each<int32_t> bin[kAhead];
    warp.each([&](int lane) {
      FLMOE_UNROLL for (int i = 0; i < kAhead; ++i) {
        const int64_t row = at + i * kLanes + lane;
        bin[i][lane] = row < run.end ? bin_of(in, row, dropped_too) : -1;
      }
    });
    FLMOE_UNROLL for (int i = 0; i < kAhead; ++i) {
      typename Warp::template Each<int32_t> key;
      typename Warp::template Each<uint32_t> peers;
      warp.each([&](int lane) {
        const int32_t from_first = bin[i][lane] - window.first;
        key[lane] =
            bin[i][lane] >= 0 && from_first >= 0 && from_first < window.width ? from_first : -1;
      });
      warp.match(key, peers);
      warp.each([&](int lane) {
        const int64_t row = at + i * kLanes + lane;
        const uint32_t before = peers[lane] & ((1u << lane) - 1u);
        if (row < run.end)
          use(row, bin[i][lane], key[lane] < 0 ? -1 : tally[key[lane]] + Warp::count(before));
      });
      warp.each([&](int lane) {
        const bool leads = (peers[lane] & ((1u << lane) - 1u)) == 0;
        if (key[lane] >= 0 && leads) tally[key[lane]] += Warp::count(peers[lane]);
      });
    }
  }
}

// block.tally[warp * window + bin] = this warp's rows of that bin.
template <typename Block>
FLMOE_BODY void tally_rows(Block& block, const RoutingRows& in, const RoutingPlan& plan,
                           int64_t number, const Window& window, bool dropped_too) {
  block.each([&](int thread) {
    for (int i = thread; i < Block::kWarps * window.width; i += Block::kThreads) block.tally[i] = 0;
  });
  block.warps([&](auto& warp, int w) {
    walk(warp, in, run_of(in, plan, number, w, Block::kWarps), window, dropped_too,
         block.tally + w * window.width, [](int64_t, int32_t, int32_t) {});
  });
}

template <typename Block>
FLMOE_BODY int32_t over_warps(const Block& block, const Window& window, int32_t bin) {
  int32_t sum = 0;
  for (int w = 0; w < Block::kWarps; ++w) sum += block.tally[w * window.width + bin];
  return sum;
}

// Each warp's counter of a bin becomes the place of the warp's first row, counted from `at`.
template <typename Block>
FLMOE_BODY void start_warps(Block& block, const Window& window, int32_t bin, int32_t at) {
  for (int w = 0; w < Block::kWarps; ++w) {
    const int32_t count = block.tally[w * window.width + bin];
    block.tally[w * window.width + bin] = at;
    at += count;
  }
}

template <typename Block>
FLMOE_BODY Window window_from(int64_t first, int64_t bins) {
  constexpr int64_t kWidth = kTallies / Block::kWarps;
  return {static_cast<int32_t>(first),
          static_cast<int32_t>(bins - first < kWidth ? bins - first : kWidth)};
}

// Launch 1 of 3: counters[bin, block] = rows of each bin in each block. Reads index and mask.
struct CountRows {
  RoutingRows in;
  RoutingPlan plan;
  bool dropped_too;
  int32_t* counters;

  template <typename Block>
  FLMOE_BODY void operator()(Block& block, int64_t number) const {
    const int64_t bins = int64_t{in.experts} + dropped_too;
    for (int64_t first = 0; first < bins; first += kTallies / Block::kWarps) {
      const Window window = window_from<Block>(first, bins);
      tally_rows(block, in, plan, number, window, dropped_too);
      block.each([&](int thread) {
        for (int32_t bin = thread; bin < window.width; bin += Block::kThreads)
          counters[(first + bin) * plan.blocks + number] = over_warps(block, window, bin);
      });
    }
  }
};

// Launch 2 of 3, one block per bin: its counters become sums over the blocks before; counts[bin],
// if requested, the sum over all blocks. Reads and writes only this bin's counters.
struct ScanCounters {
  int64_t blocks;
  int32_t experts;
  int32_t *counters, *counts;

  template <typename Block>
  FLMOE_BODY void operator()(Block& block, int64_t bin) const {
    int32_t* row = counters + bin * blocks;
    int32_t carry = 0;
    for (int64_t first = 0; first < blocks; first += Block::kThreads) {
      typename Block::template Each<int32_t> value;
      block.each(
          [&](int thread) { value[thread] = first + thread < blocks ? row[first + thread] : 0; });
      const int32_t sum = block.exclusive_sum(value);
      block.each([&](int thread) {
        if (first + thread < blocks) row[first + thread] = carry + value[thread];
      });
      carry += sum;
    }
    block.each([&](int thread) {
      if (thread == 0 && counts != nullptr && bin < experts) counts[bin] = carry;
    });
  }
};

// Launch 3 of 3, or the only launch: kept[row] = its expert if it has room, else -1. Reads counters
// if there are several blocks.
struct KeepRows {
  RoutingRows in;
  RoutingPlan plan;
  int64_t capacity;
  const int32_t* counters;
  int64_t* kept;

  template <typename Block>
  FLMOE_BODY void operator()(Block& block, int64_t number) const {
    for (int64_t first = 0; first < in.experts; first += kTallies / Block::kWarps) {
      const Window window = window_from<Block>(first, in.experts);
      tally_rows(block, in, plan, number, window, false);
      block.each([&](int thread) {
        for (int32_t bin = thread; bin < window.width; bin += Block::kThreads)
          start_warps(block, window, bin,
                      plan.alone ? 0 : counters[(first + bin) * plan.blocks + number]);
      });
      block.warps([&](auto& warp, int w) {
        walk(warp, in, run_of(in, plan, number, w, Block::kWarps), window, false,
             block.tally + w * window.width, [&](int64_t row, int32_t bin, int32_t place) {
               if (place >= 0) {
                 kept[row] = has_room(place, capacity) ? bin : -1;
               } else if (bin < 0 && first == 0) {
                 kept[row] = -1;
               }
             });
      });
    }
  }
};

// Without a capacity nothing is counted: one row per thread.
struct MaskRows {
  RoutingRows in;
  int64_t* kept;

  template <typename Block>
  FLMOE_BODY void operator()(Block& block, int64_t number) const {
    block.each([&](int thread) {
      const int64_t row = number * Block::kThreads + thread;
      if (row < in.rows) kept[row] = expert_of(in, row);
    });
  }
};

// Launch 3 of 3, or the only launch: permutation, and from block 0 the offsets. The only launch
// also writes counts; launch 3 of 3 reads counts and counters.
struct PlaceRows {
  RoutingRows in;
  RoutingPlan plan;
  const int32_t* counters;
  int32_t *counts, *offsets, *permutation;

  template <typename Block>
  FLMOE_BODY void operator()(Block& block, int64_t number) const {
    const int64_t bins = int64_t{in.experts} + 1;
    int32_t carry = 0;
    for (int64_t first = 0; first < bins; first += kTallies / Block::kWarps) {
      const Window window = window_from<Block>(first, bins);
      tally_rows(block, in, plan, number, window, true);
      for (int32_t from = 0; from < window.width; from += Block::kThreads)
        carry = start_bins(block, number, window, from, carry);
      block.warps([&](auto& warp, int w) {
        walk(warp, in, run_of(in, plan, number, w, Block::kWarps), window, true,
             block.tally + w * window.width, [&](int64_t row, int32_t, int32_t place) {
               if (place >= 0) permutation[place] = static_cast<int32_t>(row);
             });
      });
    }
  }

  // One bin per thread; returns the rows of these bins and of all before.
  template <typename Block>
  FLMOE_BODY int32_t start_bins(Block& block, int64_t number, const Window& window, int32_t from,
                                int32_t carry) const {
    typename Block::template Each<int32_t> count, start;
    block.each([&](int thread) {
      const int32_t bin = from + thread, e = window.first + bin;
      int32_t rows = 0;
      if (bin < window.width && e < in.experts)
        rows = plan.alone ? over_warps(block, window, bin) : counts[e];
      count[thread] = start[thread] = rows;
    });
    const int32_t sum = block.exclusive_sum(start);
    block.each([&](int thread) {
      const int32_t bin = from + thread;
      if (bin >= window.width) return;
      const int64_t e = int64_t{window.first} + bin;
      const int32_t at = carry + start[thread];
      if (number == 0) {
        offsets[e] = at;
        if (plan.alone && e < in.experts) counts[e] = count[thread];
      }
      start_warps(block, window, bin, plan.alone ? at : at + counters[e * plan.blocks + number]);
    });
    return carry + sum;
  }
};

// ---- launches: launch.run<threads>(blocks, body) ----

template <typename Launch>
void launch_limit(Launch& launch, const RoutingRows& in, const RoutingPlan& plan, int64_t capacity,
                  int32_t* counters, int64_t* kept) {
  if (capacity < 0) {
    launch.template run<kManyThreads>(ceil_div(in.rows, kManyThreads), MaskRows{in, kept});
    return;
  }
  const KeepRows keep{in, plan, capacity, counters, kept};
  if (plan.alone) {
    launch.template run<kAloneThreads>(1, keep);
    return;
  }
  launch.template run<kManyThreads>(plan.blocks, CountRows{in, plan, false, counters});
  launch.template run<kManyThreads>(in.experts,
                                    ScanCounters{plan.blocks, in.experts, counters, nullptr});
  launch.template run<kManyThreads>(plan.blocks, keep);
}

template <typename Launch>
void launch_dispatch(Launch& launch, const RoutingRows& in, const RoutingPlan& plan,
                     int32_t* counters, int32_t* counts, int32_t* offsets, int32_t* permutation) {
  const PlaceRows place{in, plan, counters, counts, offsets, permutation};
  if (plan.alone) {
    launch.template run<kAloneThreads>(1, place);
    return;
  }
  launch.template run<kManyThreads>(plan.blocks, CountRows{in, plan, true, counters});
  launch.template run<kManyThreads>(int64_t{in.experts} + 1,
                                    ScanCounters{plan.blocks, in.experts, counters, counts});
  launch.template run<kManyThreads>(plan.blocks, place);
}

}  // namespace flmoe::routing
