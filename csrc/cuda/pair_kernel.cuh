// The kernel of pair_moe, see csrc/cuda/pair_launch.h for what it computes in each mode.
//
// Tiling: a block has 16 rows per warp, a chunk of the output's columns and a sample. It goes once
// over the columns z, in steps; pair_copy.cuh defines the terms. Probabilities and sums are in
// registers, one tile per expert; a stage is copied to shared memory while the stage before is
// computed. A depth that does not fit into shared memory is split into parts, each with a stage of
// its own; the rows of such a depth are copied again in every step. There is one kernel for up to
// four experts and one for up to eight. Which experts exist, kinds, top_k, masks and the reduction
// are branches at run time, which all threads take together.
//
// Traffic: x, u, own and the output once; z and the columns' values once per block of rows, from
// L2. Bound (an estimate, not measured): issue of the softmax's instructions, and the exponentials.
//
// Races: there are two buffers for stages. A buffer is written after a barrier that all threads
// reach only when they have read the stage in it. Blocks write different elements, without atomics,
// so results are bitwise reproducible.
#pragma once

#include "cuda/pair_gate.cuh"
#include "cuda/pair_store.cuh"

namespace flmoe::cuda {

template <typename T, int kExperts, PairMode kMode>
class PairBlock : PairResults<T, kExperts, kMode> {
  using Base = PairResults<T, kExperts, kMode>;
  using Base::all_experts, Base::p, Base::row_sums, Base::sums, Base::values, Base::warp;
  using Base::chunk, Base::in, Base::kColumns, Base::kRows, Base::kStage, Base::kValues,
      Base::kWide, Base::lane;
  using typename Base::Sum;
  using typename Base::Tile;
  using typename Base::U;

  static constexpr bool kMatrix = Tile::kMatrix;
  static constexpr bool kMap = kMode == PairMode::kMap, kSums = kMode == PairMode::kSums;
  static constexpr int kLine = Tile::kLine;
  // Tiles of pairs are cleared after their last use, or, which takes fewer registers, before their
  // first.
  static constexpr bool kClearedAfter = kExperts <= 4;
  // What this lane reads of x, z, u, w and of the values that are summed.
  int x_of_lane, z_of_lane, u_of_lane, w_of_lane, values_of_lane;

 public:
  __device__ __forceinline__ explicit PairBlock(const PairLaunch& launch) : Base(launch) {
    const int matrix = kMatrix ? this->window : 0, rows = 16 * warp * kLine;
    x_of_lane = this->constant(matrix + rows + lane_of_rows<kMatrix, kLine>(lane));
    z_of_lane = this->constant(matrix + lane_of_columns<kMatrix, kLine>(lane));
    // The map's values are multiply-adds for all types.
    u_of_lane = kMap ? rows + lane_of_rows<false, kLine>(lane) : x_of_lane;
    w_of_lane = kMap ? lane_of_columns<false, kLine>(lane) : z_of_lane;
    clear_pairs();
    values_of_lane =
        matrix +
        lane_of_values<T, kSums ? Tile::kSumLine : kLine, kSums ? 0 : Tile::kColumnTiles>(lane);
  }

  __device__ __forceinline__ void run() {
    int begin = 0, end = in.columns;
    if constexpr (kMode == PairMode::kMap) {
      begin = chunk * Tile::kSpan;
      end = min(end, begin + Tile::kSpan);
    }
    const int stages = in.stages;
    // Between the stages of a step, its pairs are in registers: there is room for kColumns.
    const int step = stages == 1 ? kStage : kColumns;
    this->copy_rows();
    // copied: a bit for each valid column of the newest stage; ahead: whether this lane's column of
    // the step after it is valid.
    uint32_t copied = __ballot_sync(kWholeWarp, this->valid_column(begin)), seen = 0;
    bool ahead = this->valid_column(begin + step);
    this->copy_stage(0, begin, 0, copied);
    int buffer = 0;
#pragma unroll 1
    for (int j = begin; j < end; j += step) {
      const uint32_t valid = copied;
      seen |= valid;
#pragma unroll 1
      for (int stage = 0; stage < stages; ++stage, buffer ^= 1) {
        wait_for_copies();
        __syncthreads();
        int next = stage + 1, next_j = j;
        if (next == stages) {
          next = 0, next_j += step;
          copied = __ballot_sync(kWholeWarp, ahead);
          ahead = this->valid_column(next_j + step);
          this->next_columns(step);
        }
        if (next_j < end) this->copy_stage(buffer ^ 1, next_j, next, copied);
        const int base = in.at_stage + buffer * in.stage_size;
#pragma unroll 1
        for (int from = 0; from < step && j + from < end; from += kColumns) {
          if (!kClearedAfter && stage == 0) clear_pairs();
          add_part(base, stage, from);
          if (stage == stages - 1) finish_pairs(base, j, from, valid >> from);
        }
      }
    }
    if constexpr (kMode == PairMode::kSums) this->store_sums();
    if constexpr (kMode == PairMode::kGradient) this->store_gradient(seen != 0);
  }

 private:
  __device__ __forceinline__ void clear_pairs() {
#pragma unroll
    for (int e = 0; e < kExperts; ++e)
#pragma unroll
      for (int n = 0; n < kTiles<T>; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          p[e][n][i] = 0;
          if constexpr (kValues) values[e][n][i] = 0;
        }
  }

  __device__ __forceinline__ void add_offsets(int base) {
    const int row = 16 * warp + lane / 4, column = lane % 4 * 2;
#pragma unroll
    for (int e = 0; e < kExperts; ++e)
#pragma unroll
      for (int n = 0; n < kTiles<T>; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int x = e * kRows + row + i / 2 * 8, z = e * kColumns + 8 * n + column + i % 2;
          values[e][n][i] += at<Sum>(in.at_offset + x * int(sizeof(Sum))) +
                             at<Sum>(base + in.stage_offset + z * int(sizeof(Sum)));
        }
  }

  // Adds a stage's part of a depth, or both depths, to the logits and the values of pairs.
  __device__ __forceinline__ void add_part(int base, int stage, int from) {
    constexpr int kSlice = Tile::kSlice, kDepth = Element<T>::kDepth;
    if (stage < in.parts_x) {
      const int slices = (in.rank - 1) / kSlice + 1 - stage * in.slices_x;
      int x = x_of_lane + (in.parts_x == 1 ? 0 : base), z = z_of_lane + base + in.stage_z;
      z += from * kLine;
#pragma unroll 1
      for (int s = min(slices, in.slices_x); s > 0; --s) {
#pragma unroll
        for (int k = 0; k < kSlice; k += kDepth)
#pragma unroll
          for (int e = 0; e < kExperts; ++e)
            if (e < in.experts)
              add_products<T, kLine>(p[e], x + e * kRows * kLine + k * int(sizeof(T)),
                                     z + e * kStage * kLine + k * int(sizeof(T)));
        x += Tile::kRowTiles, z += Tile::kColumnTiles;
      }
    }
    if constexpr (kValues) {
      const int part = stage - in.first_u;
      if (part < 0 || part >= in.parts_u) return;
      constexpr int kRatio = sizeof(U) / sizeof(T), kStep = kMap ? 4 : kDepth;
      const int slices = (in.width - 1) / kSlice + 1 - part * in.slices_u;
      int u = u_of_lane + (in.parts_u == 1 ? in.at_u : base);
      int w = w_of_lane + base + in.stage_w;
#pragma unroll 1
      for (int s = min(slices, in.slices_u); s > 0; --s) {
#pragma unroll
        for (int k = 0; k < kSlice; k += kStep)
#pragma unroll
          for (int e = 0; e < kExperts; ++e)
            if (in.products >> e & 1) {
              const int byte = k * sizeof(U), column = w + e * kStage * kLine + k * int(sizeof(T));
              const int row = u + e * kRows * kLine + byte / Tile::kSliceBytes * Tile::kRowTiles +
                              byte % Tile::kSliceBytes;
              if constexpr (kMap) {
                add_four_products<U, T, kTiles<T>, kLine>(values[e], row, column);
              } else {
                add_products<T, kLine>(values[e], row, column);
              }
            }
        u += kRatio * Tile::kRowTiles, w += Tile::kColumnTiles;
      }
    }
  }

  __device__ __forceinline__ void finish_pairs(int base, int j, int from, uint32_t valid) {
    Sum scale = in.scale_of_powers, bias[kExperts];
    if constexpr (sizeof(Sum) == 8) scale = in.scale;
#pragma unroll
    for (int e = 0; e < kExperts; ++e) bias[e] = at<Sum>(in.at_bias + e * int(sizeof(Sum)));
    const bool some = in.top_k < in.experts;
    if (some) {
      gate_pairs<true>(p, scale, bias, in.top_k);
    } else {
      gate_pairs<false>(p, scale, bias, in.top_k);
    }
    constexpr uint32_t kAll = (1u << kColumns) - 1;
    if ((valid & kAll) != kAll) select_columns(p, valid, lane);
    if constexpr (kValues) add_offsets(base);
    if constexpr (kMap) {
      this->store_map(j, valid);
    } else {
      if constexpr (!kSums) weigh_cotangents(some);
      add_sums(base, from);
    }
    if (kClearedAfter) clear_pairs();
  }

  // p becomes the gradient of the logits.
  __device__ __forceinline__ void weigh_cotangents(bool some) {
#pragma unroll
    for (int n = 0; n < kTiles<T>; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        Sum mean = 0;
#pragma unroll
        for (int e = 0; e < kExperts; ++e) {
          // An expert that is not selected has no part, whatever its values are.
          if (some && p[e][n][i] == 0) values[e][n][i] = 0;
          mean += p[e][n][i] * values[e][n][i];
        }
#pragma unroll
        for (int e = 0; e < kExperts; ++e) {
          const Sum d = p[e][n][i] * (values[e][n][i] - mean);
          p[e][n][i] = some && p[e][n][i] == 0 ? Sum(0) : d;
        }
      }
  }

  __device__ __forceinline__ void add_sums(int base, int from) {
#pragma unroll
    for (int e = 0; e < kExperts; ++e)
#pragma unroll
      for (int n = 0; n < kTiles<T>; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) row_sums[e][i / 2] += p[e][n][i];
    if constexpr (kMode == PairMode::kSums) {
      add_tiles<Tile::kSumLine, 0>(values_of_lane + base + in.stage_sum + from * Tile::kSumLine,
                                   in.products);
    } else if (in.out.data == nullptr) {
      return;
    } else if (in.stages > 1) {
      const int matrix = kMatrix ? this->window : 0;
      add_tiles<Tile::kSumLine, 0>(
          matrix + lane_of_values<T, Tile::kSumLine, 0>(lane) + base + in.stage_sum, all_experts());
    } else {
      // The slices of z are all there.
      const int slice = chunk * kWide / Tile::kSlice, column = chunk * kWide % Tile::kSlice;
      add_tiles<kLine, Tile::kColumnTiles>(
          values_of_lane + base + in.stage_z + slice * Tile::kColumnTiles + column * int(sizeof(T)),
          all_experts());
    }
  }

  template <int kStride, int kSlices>
  __device__ __forceinline__ void add_tiles(int place, uint32_t set) {
#pragma unroll
    for (int e = 0; e < kExperts; ++e)
      if (set >> e & 1)
        add_weighted<T, kWide, kStride, kSlices>(sums[e], p[e], place + e * kStage * kStride, lane);
  }
};

template <typename T, int kExperts, PairMode kMode>
__global__ void __launch_bounds__(PairTile<T, kExperts, kMode>::kThreads, 1)
    pair_kernel(const __grid_constant__ PairLaunch launch) {
  PairBlock<T, kExperts, kMode>(launch).run();
}

}  // namespace flmoe::cuda
