// Copies of pair_moe's kernel to shared memory. Terms of all files of pair_moe:
//   depth  the dimension that a product of rows and columns sums over: R in x . z, V in u . w
//   slice  kSliceBytes of the depth; a tile in shared memory has one slice of one expert's tokens
//   part   the slices of a depth that are in shared memory at a time: all, if there is room
//   step   the columns z of an iteration of a block's loop
//   stage  what is copied while the stage before is computed: a step's columns, with both depths
//          if each is one part, otherwise with one part of one depth
#pragma once

#include "cuda/pair_gate.cuh"
#include "cuda/pair_launch.h"

namespace flmoe::cuda {

template <typename T, int kExperts, PairMode kMode>
struct PairTile {
  static constexpr bool kMatrix = Element<T>::kMatrix, kFew = kExperts <= 4;
  // The rows of more warps would not fit into the shared memory of all GPUs: a map's rows of u are
  // in float32.
  static constexpr int kWarps = kMatrix && kFew && kMode != PairMode::kMap ? 4
                                : sizeof(T) == 8                           ? 1
                                                                           : 2;
  static constexpr int kThreads = 32 * kWarps, kRows = 16 * kWarps;
  static constexpr int kColumns = Element<T>::kColumns;
  // Columns of a stage: twice kColumns in sums, where two blocks still fit into an SM.
  static constexpr int kStage = (kMatrix && kFew && kMode == PairMode::kSums ? 2 : 1) * kColumns;
  // Columns of the output (V or R) that a block computes; their sums are in registers.
  static constexpr int kWide = (sizeof(T) == 8             ? 16
                                : kMode == PairMode::kSums ? 64
                                                           : 32) /
                               (kFew ? 1 : 2);
  // kMap: columns z of a block.
  static constexpr int kSpan = 16 * kColumns;
  // A slice in bytes and in elements.
  static constexpr int kSliceBytes = kFew ? 64 : 32, kSlice = kSliceBytes / sizeof(T);
  // Bytes of a tile's row (with padding), and of a slice's tiles of all experts.
  static constexpr int kLine = kSliceBytes + 16;
  static constexpr int kRowTiles = kExperts * kRows * kLine;
  static constexpr int kColumnTiles = kExperts * kStage * kLine;
  // The same for the values that are summed (w in sums, z in gradients), kWide columns of them.
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
  // This thread's row, its first vector of 16 bytes, their places in the tiles, and the sources of
  // expert 0.
  int copied_row, copied_vector;
  uint32_t to_slices, to_values;
  const char *of_z, *of_w;

  __device__ __forceinline__ explicit PairCopies(const PairLaunch& launch)
      : in(launch), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
    block = blockIdx.x % in.blocks;
    chunk = blockIdx.x / in.blocks % in.chunks;
    b = blockIdx.x / in.blocks / in.chunks;
    first = in.first + block * kRows;
    window = constant(shared_window());
    copied_row = threadIdx.x / kLanes, copied_vector = threadIdx.x % kLanes;
    to_slices = constant(copied_row * Tile::kLine + copied_vector / kInSlice * Tile::kColumnTiles +
                         copied_vector % kInSlice * 16);
    to_values = constant(copied_row * Tile::kSumLine + copied_vector * 16);
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
           16 * copied_vector;
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

  // Copies elements of a row, from `column` on, for each expert of `set`. kLanes threads share the
  // `count` vectors of 16 bytes. Elements at `limit` and above, and all if the row is not there,
  // become zeros. kExpert and kSlices: bytes in shared memory from one expert, and from one slice
  // of the row, to the next; kSlices is 0 if the vectors are contiguous. With up to four experts
  // there is no branch for the others: they get zeros.
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
      for (int i = copied_vector; i < count; i += kLanes) {
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
      for (int i = copied_vector; i < count; i += kLanes) {
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

  // Copies a part of the block's rows. Masked rows too: only their results are left out.
  template <typename X>
  __device__ __forceinline__ void copy_rows(int to, const PairOperand& from, int column, int limit,
                                            int slices, uint32_t set) const {
    to += copied_vector / kInSlice * Tile::kRowTiles + copied_vector % kInSlice * 16;
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

  // Copies what stays for the whole loop: the bias, and the rows whose depth is one part. The wait
  // for the first stage includes them. Experts that do not exist have the bias -infinity.
  __device__ __forceinline__ void copy_rows() const {
    if (threadIdx.x < kExperts) {
      const int e = threadIdx.x;
      Sum bias = e < in.experts ? Sum(0) : -Sum(INFINITY);
      if (in.bias != nullptr && e < in.experts) bias = static_cast<const Sum*>(in.bias)[e];
      // The unit must not make a finite bias infinite.
      if (isfinite(bias)) {
        bias *= static_cast<Sum>(in.gate_unit);
        bias = max(-kLargest<Sum>, min(kLargest<Sum>, bias));
      }
      at<Sum>(in.at_bias + e * int(sizeof(Sum))) = bias;
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
