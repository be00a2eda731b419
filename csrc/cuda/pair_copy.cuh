// Copies of pair_moe's kernel: which tokens and columns a block's stages have in shared memory.
#pragma once

#include "cuda/pair_gate.cuh"
#include "cuda/pair_launch.h"

namespace flmoe::cuda {

template <typename T, int kExperts, PairMode kMode>
struct PairTile {
  static constexpr bool kMatrix = Element<T>::kMatrix, kFew = kExperts <= 4;
  // Warps so that a block's rows fit into shared memory.
  static constexpr int kWarps = kMatrix && kFew ? 4 : sizeof(T) == 8 ? 1 : 2;
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kColumns = Element<T>::kColumns;
  // Columns of a stage: more than one step of them, where shared memory suffices for two blocks.
  static constexpr int kStage = (kMatrix && kFew && kMode == PairMode::kSums ? 2 : 1) * kColumns;
  // Columns of sums, for which registers suffice.
  static constexpr int kWide = (sizeof(T) == 8             ? 16
                                : kMode == PairMode::kSums ? 64
                                                           : 32) /
                               (kFew ? 1 : 2);
  // Columns of pairs of a block of kMap.
  static constexpr int kSpan = 16 * kColumns;
  // Slices of the depth: elements, bytes, bytes of a row, and of the tiles of all experts.
  static constexpr int kSliceBytes = kFew ? 64 : 32, kSlice = kSliceBytes / sizeof(T);
  static constexpr int kLine = kSliceBytes + 16;
  static constexpr int kRowTiles = kExperts * kRows * kLine;
  static constexpr int kColumnTiles = kExperts * kStage * kLine;
  // The values that are summed, if they have tiles of their own.
  static constexpr int kSumLine = kWide * sizeof(T) + 16;
  static constexpr int kSumTiles = kExperts * kStage * kSumLine;
};

template <typename T, int kExperts, PairMode kMode>
class PairCopies {
 protected:
  using Tile = PairTile<T, kExperts, kMode>;
  using Sum = typename Element<T>::Sum;
  // The factors of the map are in full precision.
  using U = std::conditional_t<kMode == PairMode::kMap, Sum, T>;
  static constexpr int kRows = Tile::kRows, kColumns = Tile::kColumns, kWide = Tile::kWide;
  static constexpr int kStage = Tile::kStage;
  static constexpr bool kValues = kMode != PairMode::kSums;
  // Threads that copy a row, 16 bytes each at a time, and vectors of 16 bytes in a slice.
  static constexpr int kLanes = Tile::kThreads / kStage, kInSlice = Tile::kSliceBytes / 16;
  static_assert(kLanes % kInSlice == 0);

  const PairLaunch& in;
  const int warp, lane;
  int block, chunk, first;  // first: the block's first row
  int64_t b;
  uint32_t window;
  // What this thread copies: a part of a row. Sources of expert 0, and places in the tiles.
  int copied_row, copied_part;
  uint32_t to_slices, to_values;
  const char *of_z, *of_w;

  __device__ __forceinline__ explicit PairCopies(const PairLaunch& launch)
      : in(launch), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    block = blockIdx.x % in.blocks;
    chunk = blockIdx.x / in.blocks % in.chunks;
    b = blockIdx.x / in.blocks / in.chunks;
    first = in.first + block * kRows;
    window = constant(shared_window());
    copied_row = threadIdx.x / kLanes, copied_part = threadIdx.x % kLanes;
    to_slices = constant(copied_row * Tile::kLine + copied_part / kInSlice * Tile::kColumnTiles +
                         copied_part % kInSlice * 16);
    to_values = constant(copied_row * Tile::kSumLine + copied_part * 16);
    int j = copied_row;
    if constexpr (kMode == PairMode::kMap) j += chunk * Tile::kSpan;
    of_z = row_of<T>(in.z, j);
    of_w = row_of<T>(in.w, j);
  }

  // A number that is kept in a register, if there are enough.
  static __device__ __forceinline__ int constant(int x) {
    return kExperts <= 4 ? static_cast<int>(kept(x)) : x;
  }

  template <typename X>
  __device__ __forceinline__ const char* row_of(const PairOperand& from, int token) const {
    return reinterpret_cast<const char*>(static_cast<const X*>(from.view.data) +
                                         b * from.view.group_stride +
                                         token * from.view.row_stride) +
           16 * copied_part;
  }

  __device__ __forceinline__ bool valid_column(int j) const {
    j += lane;
    if (lane >= kStage || j >= in.columns) return false;
    return in.mask_z == nullptr || in.mask_z[b * in.columns + j] != 0;
  }

  __device__ __forceinline__ bool valid_row(int i) const {
    return i < in.last && (in.mask_x == nullptr || in.mask_x[b * in.rows + i] != 0);
  }

  __device__ __forceinline__ uint32_t all_experts() const { return (1u << in.experts) - 1; }

  // Copies this thread's part of a row of experts `set`, from column `column` on: `count` vectors
  // of 16 bytes in all, with zeros past the limit, or if the row is not there. kSlices: from one
  // slice of the row to the next, 0 if it has one; kExpert: from one expert to the next. With few
  // experts those that are not in the set get zeros, without a branch.
  template <typename X, int kExpert, int kSlices>
  __device__ __forceinline__ void copy_row(int to, const char* row, const PairOperand& from,
                                           int column, int limit, int count, bool there,
                                           uint32_t set) const {
    constexpr int kVector = 16 / sizeof(X), kFew = kExperts <= 4;
    const int64_t stride = from.view.head_stride * static_cast<int64_t>(sizeof(X));
    row += column * static_cast<int64_t>(sizeof(X));
    const int left = there ? limit - column : 0;
    constexpr int kNext = kSlices == 0 ? 16 * kLanes : kLanes / kInSlice * kSlices;
    if (from.aligned) {
#pragma unroll 1
      for (int i = copied_part; i < count; i += kLanes) {
        const bool inside = i * kVector < left;
        const char* source = row;
#pragma unroll(kFew ? kExperts : 1)
        for (int e = 0; e < kExperts; ++e) {
          if (kFew || (set >> e & 1))
            copy_async<16>(window + to + e * kExpert, source, inside && (set >> e & 1));
          source += stride;
        }
        row += 16 * kLanes, to += kNext;
      }
    } else {
#pragma unroll 1
      for (int i = copied_part; i < count; i += kLanes) {
#pragma unroll 1
        for (int e = 0; e < in.experts; ++e)
          if (set >> e & 1) {
            const X* const source = reinterpret_cast<const X*>(row + e * stride);
#pragma unroll 1
            for (int n = 0; n < kVector; ++n)
              at<X>(to + e * kExpert + n * int(sizeof(X))) =
                  i * kVector + n < left ? source[n] : X{};
          }
        row += 16 * kLanes, to += kNext;
      }
    }
  }

  // Slices of the depth of the block's rows. Rows do not mix, so those that are masked are left out
  // at the end.
  template <typename X>
  __device__ __forceinline__ void copy_rows(int to, const PairOperand& from, int column, int limit,
                                            int slices, uint32_t set) const {
    to += copied_part / kInSlice * Tile::kRowTiles + copied_part % kInSlice * 16;
#pragma unroll 1
    for (int r = copied_row; r < kRows; r += kStage)
      copy_row<X, kRows * Tile::kLine, Tile::kRowTiles>(
          to + r * Tile::kLine, row_of<X>(from, first + r), from, column, limit, slices * kInSlice,
          first + r < in.last, set);
  }

  __device__ __forceinline__ void copy_columns(int to, const char* row, const PairOperand& from,
                                               int column, int limit, int slices, uint32_t set,
                                               bool there) const {
    copy_row<T, kStage * Tile::kLine, Tile::kColumnTiles>(to + to_slices, row, from, column, limit,
                                                          slices * kInSlice, there, set);
  }

  // Operands of the rows, and the bias, that stay for the whole loop; waited for with the first
  // stage. Experts that do not exist have the bias -infinity.
  __device__ __forceinline__ void copy_rows() const {
    if (threadIdx.x < kExperts) {
      const int e = threadIdx.x;
      Sum bias = e < in.experts ? Sum(0) : -Sum(INFINITY);
      if (in.bias != nullptr && e < in.experts) bias = static_cast<const Sum*>(in.bias)[e];
      at<Sum>(in.at_bias + e * int(sizeof(Sum))) = bias * static_cast<Sum>(kGateUnit<Sum>);
    }
    if (in.parts_x == 1) copy_rows<T>(0, in.x, 0, in.rank, in.slices_x, all_experts());
    if constexpr (kValues) {
      constexpr int kRatio = sizeof(U) / sizeof(T);
      if (in.parts_u == 1)
        copy_rows<U>(in.at_u, in.u, 0, in.width, in.slices_u * kRatio, in.products);
      for (int n = threadIdx.x; n < kExperts * kRows; n += Tile::kThreads) {
        const int e = n / kRows, i = first + n % kRows;
        Sum value = 0;
        if (in.offset_x != nullptr && e < in.experts && i < in.last)
          value = static_cast<const Sum*>(in.offset_x)[(b * in.experts + e) * in.rows + i];
        at<Sum>(in.at_offset + n * int(sizeof(Sum))) = value;
      }
    }
  }

  __device__ __forceinline__ void copy_stage(int buffer, int j, int stage, uint32_t valid) const {
    const int base = in.at_stage + buffer * in.stage_size;
    const bool there = (valid >> copied_row & 1) != 0;
    if (stage < in.parts_x) {
      const int column = stage * in.slices_x * Tile::kSlice;
      if (in.parts_x > 1) copy_rows<T>(base, in.x, column, in.rank, in.slices_x, all_experts());
      copy_columns(base + in.stage_z, of_z, in.z, column, in.rank, in.slices_x, all_experts(),
                   there);
    }
    if constexpr (kValues) {
      constexpr int kRatio = sizeof(U) / sizeof(T);
      const int part = stage - in.first_u, column = part * in.slices_u * Tile::kSlice;
      if (part >= 0 && part < in.parts_u) {
        if (in.parts_u > 1)
          copy_rows<U>(base, in.u, column, in.width, in.slices_u * kRatio, in.products);
        copy_columns(base + in.stage_w, of_w, in.w, column, in.width, in.slices_u, in.products,
                     there);
      }
    }
    if (stage == in.stages - 1) {
      if constexpr (kValues) copy_offsets(base + in.stage_offset, j, valid);
      if constexpr (kMode == PairMode::kSums)
        if (in.products != 0) copy_values(base, of_w, in.w, in.width, there);
      if constexpr (kMode == PairMode::kGradient)
        if (in.stages > 1 && in.out.data != nullptr) copy_values(base, of_z, in.z, in.rank, there);
    }
    commit_copies();
  }

  __device__ __forceinline__ void copy_values(int base, const char* row, const PairOperand& from,
                                              int limit, bool there) const {
    constexpr int kVectors = kWide * sizeof(T) / 16;
    copy_row<T, kStage * Tile::kSumLine, 0>(base + in.stage_sum + to_values, row, from,
                                            chunk * kWide, limit, kVectors, there,
                                            kMode == PairMode::kSums ? in.products : all_experts());
  }

  __device__ __forceinline__ void copy_offsets(int to, int j, uint32_t valid) const {
    for (int n = threadIdx.x; n < kExperts * kColumns; n += Tile::kThreads) {
      const int e = n / kColumns, i = n % kColumns;
      const Sum* const offsets = static_cast<const Sum*>(in.offset_z);
      const int64_t place = (b * in.experts + e) * in.columns + j + i;
      copy_async<sizeof(Sum)>(window + to + n * int(sizeof(Sum)), offsets + place,
                              offsets != nullptr && e < in.experts && (valid >> i & 1) != 0);
    }
  }

  __device__ __forceinline__ void next_columns(int count) {
    const int step = count * int(sizeof(T));
    of_z += in.z.view.row_stride * step;
    of_w += in.w.view.row_stride * step;
  }
};

}  // namespace flmoe::cuda
