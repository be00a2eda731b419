#include "cpu/routing_twin.h"

#include <vector>

#include "common/routing_dispatch_blocks.h"
#include "common/routing_gate_blocks.h"
#include "cpu/routing_host_block.h"

namespace flmoe {
namespace {

RoutingPlan plan_of(int64_t rows, int64_t bins, int64_t rows_per_block) {
  if (rows_per_block == 0) return routing_plan(rows, bins);
  return {rows == 0 ? 1 : ceil_div(rows, rows_per_block), rows_per_block, false};
}

std::vector<int32_t> counters_of(const RoutingPlan& plan, int64_t bins) {
  int32_t junk;
  std::memset(&junk, host::kJunk, sizeof junk);
  return std::vector<int32_t>(static_cast<size_t>(routing_counters(plan, bins)), junk);
}

struct Race {
  int32_t* last;

  template <typename Block>
  void operator()(Block& block, int64_t) const {
    block.each([&](int thread) { *last = thread; });
  }
};

// Each thread reads the variable of the thread `apart` from it, in a step of the block or a warp.
struct Peek {
  bool in_a_warp;
  int apart;
  int32_t* last;

  template <typename Block>
  void operator()(Block& block, int64_t) const {
    if (in_a_warp) {
      block.warps([&](auto& warp, int) { look(warp); });
    } else {
      look(block);
    }
  }

  template <typename Group>
  void look(Group& group) const {
    typename Group::template Each<int32_t> own;
    group.each([&](int i) { own[i] = i; });
    group.each([&](int i) { *last = own[i ^ apart]; });
  }
};

}  // namespace

int twin_gate(DType dtype, const GateArgs& args, uint64_t order) {
  host::Launch launch(order);
  const routing::GateTokens in{args.logits,
                               args.index,
                               args.weight,
                               args.tokens,
                               static_cast<int32_t>(args.experts),
                               static_cast<int32_t>(args.top_k),
                               args.over_all};
  switch (dtype) {
    case DType::kFloat32:
      routing::launch_gate<float>(launch, in);
      break;
    case DType::kFloat64:
      routing::launch_gate<double>(launch, in);
      break;
    case DType::kBFloat16:
      routing::launch_gate<BFloat16>(launch, in);
      break;
    case DType::kFloat16:
      routing::launch_gate<Float16>(launch, in);
      break;
  }
  return launch.launches;
}

int twin_limit(const LimitArgs& args, int64_t rows_per_block, uint64_t order) {
  host::Launch launch(order);
  const RoutingRows in{args.index, args.mask, args.tokens * args.top_k,
                       static_cast<int32_t>(args.top_k), static_cast<int32_t>(args.experts)};
  const RoutingPlan plan = plan_of(in.rows, args.experts, rows_per_block);
  std::vector<int32_t> counters = counters_of(plan, args.experts);
  routing::launch_limit(launch, in, plan, args.capacity, counters.data(), args.kept);
  return launch.launches;
}

int twin_dispatch(const DispatchArgs& args, int64_t rows_per_block, uint64_t order) {
  host::Launch launch(order);
  const RoutingRows in{args.index, nullptr, args.rows, 1, static_cast<int32_t>(args.experts)};
  const RoutingPlan plan = plan_of(args.rows, args.experts + 1, rows_per_block);
  std::vector<int32_t> counters = counters_of(plan, args.experts + 1);
  routing::launch_dispatch(launch, in, plan, counters.data(), args.counts, args.offsets,
                           args.permutation);
  return launch.launches;
}

int32_t twin_race(uint64_t order) {
  host::Launch launch(order);
  int32_t last = -1;
  launch.run<kManyThreads>(1, Race{&last});
  return last;
}

int32_t twin_peek(bool in_a_warp, int apart) {
  host::Launch launch(0);
  int32_t last = -1;
  launch.run<kManyThreads>(1, Peek{in_a_warp, apart, &last});
  return last;
}

}  // namespace flmoe
