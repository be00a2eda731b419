// Launches of pair_moe's kernels, between the host's code (pair_moe.cu) and the kernels
// (pair_kernel.cuh), which are compiled in a file for each element type.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/types.h"
#include "cpu/kernels.h"

namespace flmoe::cuda {

// What a kernel makes of the pairs of rows x and columns z:
//   kSums      sums of p over the columns, and of p times the columns' values
//   kGradient  the gradient of x, from that of p
//   kMap       p times the pairs' values
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
  // What p is multiplied by and summed over the columns, for kSums and experts in `products`: rows
  // of `width` of w. The result is s1 * own * mass + s2 * sum + s3 * own * sum.
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

  // Filled in by launch_pairs. Blocks of rows; chunks of the output's columns (kMap: of columns of
  // pairs). The depths are read in parts of some slices. If both fit in one part, a step of columns
  // is one stage of the loop; otherwise every part has a stage, those of u . w from first_u on.
  int blocks, chunks;
  float scale_of_powers;  // scale * kGateUnit, in float32
  int slices_x, slices_u, parts_x, parts_u, stages, first_u;
  // Places in shared memory, and in a stage of it.
  int at_u, at_offset, at_bias, at_stage, stage_size, stage_z, stage_w, stage_sum, stage_offset;
};

// Rows of a block.
template <typename T>
int pair_block_rows(int experts);

// shared: bytes of shared memory that a block of the device may have.
template <typename T>
cudaError_t launch_pairs(PairMode mode, const PairLaunch& launch, int shared, cudaStream_t stream);

}  // namespace flmoe::cuda
