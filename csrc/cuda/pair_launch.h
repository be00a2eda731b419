// Launches of pair_moe's kernels, between the host's code (pair_moe.cu) and the kernels
// (pair_kernel.cuh), which are compiled in a file for each element type.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/types.h"
#include "cpu/kernels.h"

namespace flmoe::cuda {

// The result of a kernel. Rows are tokens x, columns tokens z, and p is the probability of a pair:
//   kSums      for each row, sums over the columns of p, and of p times the columns' w
//   kGradient  the gradient of x; the value of a pair is the gradient of its p
//   kMap       p times the value, for each pair
enum class PairMode { kSums, kGradient, kMap };

// An operand, and whether all its rows begin and end at multiples of 16 bytes.
struct PairOperand {
  RowView view;
  bool aligned;
};

struct PairLaunch {
  // The gate: logits are scale * x . z + bias.
  PairOperand x, z;
  int rank;
  double scale;
  const void* bias;
  const uint8_t *mask_x, *mask_z;
  int experts, top_k;
  int batch, rows, columns;
  // Values of pairs, for kGradient and kMap: offset_x + offset_z, (batch, experts, tokens) or null,
  // and for experts in `products` u . w.
  PairOperand u, w;
  int width;
  const void *offset_x, *offset_z;
  uint32_t products;
  // For kSums: mass is the sum of p over the columns, and sum, for experts in `products`, that of
  // p times the columns' w, which has `width` elements. The result is
  // s1 * own * mass + s2 * sum + s3 * own * sum, where `own` belongs to the row.
  RowView own;
  bool own_wide;  // `own` has the compute type
  float s1[kMaxExperts], s2[kMaxExperts], s3[kMaxExperts];
  PairReduce reduce;
  // kSums: y, under kPool the sums of blocks of rows (batch, experts, blocks, width). kGradient:
  // the gradient of x, or null. kMap: (batch, experts, last - first, columns).
  RowView out;
  int first, last;  // rows that are computed
  // Sums of p (batch, experts, rows), or of the gradient of logits over blocks of rows (batch,
  // blocks, experts); or null.
  void* row_sums;

  // Filled in by launch_pairs; pair_copy.cuh defines slices, parts and stages. Blocks of rows;
  // chunks of the output's columns (kMap: of columns z). Stages of a step: one if both depths are
  // one part, otherwise one for every part, those of u . w from first_u on.
  int blocks, chunks;
  double gate_unit;       // kGateUnit, or 1 with top_k
  float scale_of_powers;  // scale * gate_unit, in float32
  int slices_x, slices_u, parts_x, parts_u, stages, first_u;
  // Places in shared memory, and in a stage of it.
  int at_u, at_offset, at_bias, at_stage, stage_size, stage_z, stage_w, stage_sum, stage_offset;
};

// Rows of a block of sums and gradients.
template <typename T>
int pair_block_rows(int experts);

// The tiles do not fit into a block's shared memory. No call of CUDA here returns this code.
constexpr cudaError_t kTooLittleShared = cudaErrorNotSupported;

// shared: bytes of shared memory that a block of the device may have.
template <typename T>
cudaError_t launch_pairs(PairMode mode, const PairLaunch& launch, int shared, cudaStream_t stream);

}  // namespace flmoe::cuda
