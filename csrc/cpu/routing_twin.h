// Routing as the GPU computes it, on the host: the same blocks, launches and counters. What tests
// compare with the CPU kernels where there is no GPU.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/kernels.h"

namespace flmoe {

// order: 0 runs threads in order, any other number shuffles them. rows_per_block: 0 for the GPU's
// own plan, else so many rows (a multiple of 256) in each of several blocks. Each returns how many
// launches it took.
int twin_gate(DType dtype, const GateArgs& args, uint64_t order);
int twin_limit(const LimitArgs& args, int64_t rows_per_block, uint64_t order);
int twin_dispatch(const DispatchArgs& args, int64_t rows_per_block, uint64_t order);

// The controls. All threads of a block write their number to one place; the one that stays.
int32_t twin_race(uint64_t order);
// Every thread of a block's or a warp's step reads the variable of the one `apart` from it (by
// exclusive or); the last one read. std::logic_error unless that is its own.
int32_t twin_peek(bool in_a_warp, int apart);

}  // namespace flmoe
