// Launches of pair_moe's kernel: tiles in shared memory, grid, choice of the kernel.
#pragma once

#include <algorithm>

#include "cuda/pair_kernel.cuh"

namespace flmoe::cuda {

inline int quotient_up(int x, int step) {
  return (x + step - 1) / step;
}

// Places of all tiles in shared memory; returns its size.
template <typename T, int kExperts, PairMode kMode>
int place_tiles(PairLaunch& in) {
  using Tile = PairTile<T, kExperts, kMode>;
  using Sum = typename Element<T>::Sum;
  constexpr int sum = sizeof(Sum), ratio = kMode == PairMode::kMap ? sum / int(sizeof(T)) : 1;
  constexpr bool values = kMode != PairMode::kSums;
  in.parts_x = quotient_up(quotient_up(in.rank, Tile::kSlice), in.slices_x);
  in.parts_u = in.slices_u == 0 ? 0 : quotient_up(quotient_up(in.width, Tile::kSlice), in.slices_u);
  const bool together = in.parts_x == 1 && in.parts_u <= 1;
  in.stages = together ? 1 : in.parts_x + in.parts_u;
  in.first_u = together ? 0 : in.parts_x;
  const int x = in.slices_x * Tile::kRowTiles, u = in.slices_u * ratio * Tile::kRowTiles;
  in.at_u = in.parts_x == 1 ? x : 0;
  in.at_offset = in.at_u + (in.parts_u == 1 ? u : 0);
  in.at_bias = in.at_offset + (values ? kExperts * Tile::kRows * sum : 0);
  in.at_stage = in.at_bias + kExperts * sum;
  // Stages of x . z and of u . w use the same places.
  const int rows = std::max(in.parts_x == 1 ? 0 : x, in.parts_u == 1 ? 0 : u);
  const int z = in.slices_x * Tile::kColumnTiles, w = in.slices_u * Tile::kColumnTiles;
  in.stage_z = rows;
  in.stage_w = rows + (together ? z : 0);
  in.stage_sum = rows + (together ? z + w : std::max(z, w));
  const bool tile =
      kMode == PairMode::kSums ? in.products != 0 : kMode == PairMode::kGradient && !together;
  in.stage_offset = in.stage_sum + (tile ? Tile::kSumTiles : 0);
  in.stage_size = in.stage_offset + (values ? kExperts * Tile::kColumns * sum : 0);
  // The warps' sums take the place of all this, see kRegion in pair_store.cuh.
  const int last = Tile::kWarps * (32 * (Tile::kWide + 4) + 16) * sum;
  const int size = in.at_stage + 2 * in.stage_size;
  return std::max(size, last);
}

template <typename T, int kExperts, PairMode kMode>
cudaError_t launch_tiles(PairLaunch in, int shared, cudaStream_t stream) {
  using Tile = PairTile<T, kExperts, kMode>;
  // The gradient sums chunks of kWide columns of z.
  constexpr int least =
      kMode == PairMode::kGradient && Tile::kWide > Tile::kSlice ? Tile::kWide / Tile::kSlice : 1;
  in.slices_x = quotient_up(quotient_up(in.rank, Tile::kSlice), least) * least;
  in.slices_u =
      kMode == PairMode::kSums || in.products == 0 ? 0 : quotient_up(in.width, Tile::kSlice);
  int bytes = place_tiles<T, kExperts, kMode>(in);
  while (bytes > shared) {
    int& larger = in.slices_x > in.slices_u ? in.slices_x : in.slices_u;
    if (larger <= 1) return kTooLittleShared;
    larger = quotient_up(larger, 2);
    bytes = place_tiles<T, kExperts, kMode>(in);
  }
  const int wide = kMode == PairMode::kMap    ? Tile::kSpan
                   : kMode == PairMode::kSums ? Tile::kWide
                   : in.out.data == nullptr   ? in.rank
                                              : Tile::kWide;
  const int across = kMode == PairMode::kMap    ? in.columns
                     : kMode == PairMode::kSums ? in.width
                                                : in.rank;
  in.gate_unit = in.top_k < in.experts ? 1 : kGateUnit<typename Element<T>::Sum>;
  in.scale_of_powers = static_cast<float>(in.scale * in.gate_unit);
  in.blocks = quotient_up(in.last - in.first, Tile::kRows);
  in.chunks = quotient_up(across, wide);
  const int64_t grid = int64_t{in.blocks} * in.chunks * in.batch;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const auto kernel = pair_kernel<T, kExperts, kMode>;
  // Always the same value: another thread may launch this kernel with more bytes meanwhile.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(grid), Tile::kThreads, bytes, stream>>>(in);
  return cudaGetLastError();
}

template <typename T>
int pair_block_rows(int experts) {
  return experts <= 4 ? PairTile<T, 4, PairMode::kSums>::kRows
                      : PairTile<T, 8, PairMode::kSums>::kRows;
}

template <typename T>
cudaError_t launch_pairs(PairMode mode, const PairLaunch& launch, int shared, cudaStream_t stream) {
  const bool few = launch.experts <= 4;
  switch (mode) {
    case PairMode::kSums:
      return few ? launch_tiles<T, 4, PairMode::kSums>(launch, shared, stream)
                 : launch_tiles<T, 8, PairMode::kSums>(launch, shared, stream);
    case PairMode::kGradient:
      return few ? launch_tiles<T, 4, PairMode::kGradient>(launch, shared, stream)
                 : launch_tiles<T, 8, PairMode::kGradient>(launch, shared, stream);
    default:
      return few ? launch_tiles<T, 4, PairMode::kMap>(launch, shared, stream)
                 : launch_tiles<T, 8, PairMode::kMap>(launch, shared, stream);
  }
}

}  // namespace flmoe::cuda
