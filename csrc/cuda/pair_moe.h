// pair_moe on a GPU: plain pointers to device memory, no CUDA header. Everything is queued on
// `stream` of `device` without synchronizing. Each call returns null or CUDA's error message.
//
// Arguments are those of the CPU kernels (cpu/kernels.h), with these differences: `threads` and
// `fresh` are not used; every element of an output is written; gradients of q, k, a and c have the
// inputs' type; head, y and gradients are not limited to one sample's size by 32 bits. Up to 2^30
// tokens a side. workspace: the bytes that the function before it returns, aligned to 16.
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

// Contributions of the pairs of rows first to last, (batch, experts, last - first, columns).
struct PairRows {
  int64_t first, last;
};
int64_t pair_map_workspace(DType dtype, const PairScores& args);
const char* pair_map(DType dtype, const PairScores& args, const PairRows& rows, void* workspace,
                     const Place& place);

}  // namespace flmoe::cuda
