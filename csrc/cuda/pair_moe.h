// pair_moe on a GPU: plain pointers to device memory, no CUDA header. Everything is queued on
// `stream` of `device` without synchronizing. Each call returns null or CUDA's error message.
//
// Arguments are those of the CPU kernels (cpu/kernels.h), with these differences:
//   - `threads` and `fresh` are ignored: every element of every output is written;
//   - gradients of q, k, a and c have the type of q;
//   - a side has up to 2^30 tokens; offsets of elements have 64 bits.
// workspace: device memory, aligned to 16 bytes, of the size that pair_*_workspace returns.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/kernels.h"
#include "cuda/place.h"

namespace flmoe::cuda {

int64_t pair_forward_workspace(DType dtype, const PairForward& args);
const char* pair_forward(DType dtype, const PairForward& args, void* workspace, const Place& place);

int64_t pair_backward_workspace(DType dtype, const PairBackward& args);
const char* pair_backward(DType dtype, const PairBackward& args, void* workspace,
                          const Place& place);

// Contributions of the pairs of rows first to last, (batch, experts, last - first, columns). A call
// with first = 0 fills the workspace; calls for other rows read it.
struct PairRows {
  int64_t first, last;
};
int64_t pair_map_workspace(DType dtype, const PairScores& args);
const char* pair_map(DType dtype, const PairScores& args, const PairRows& rows, void* workspace,
                     const Place& place);

}  // namespace flmoe::cuda
