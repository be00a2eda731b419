// Simulation of the GPU's routing on the host, with the same blocks, launches and counters. Tests
// compare it with the CPU kernels if there is no GPU.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/kernels.h"

namespace flmoe {

// order: 0 runs threads in order, any other number shuffles them. rows_per_block: 0 for the GPU's
// own plan, otherwise the rows per block (a multiple of 256). The functions return the number of
// launches.
int twin_gate(DType dtype, const GateArgs& args, uint64_t order);
int twin_limit(const LimitArgs& args, int64_t rows_per_block, uint64_t order);
int twin_dispatch(const DispatchArgs& args, int64_t rows_per_block, uint64_t order);

// Controls. All threads of a block write their number to the same address; returns the last number.
int32_t twin_race(uint64_t order);
// Every thread in a step of a block or warp reads the variable of the thread `apart` from it (by
// exclusive or); returns the last value. std::logic_error unless that is its own variable.
int32_t twin_peek(bool in_a_warp, int apart);

}  // namespace flmoe
