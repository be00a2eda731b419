// Results of pair_moe's kernel: registers of a warp's rows, and what is stored of them.
#pragma once

#include "cuda/pair_copy.cuh"

namespace flmoe::cuda {

template <typename T, int kExperts, PairMode kMode>
class PairResults : protected PairCopies<T, kExperts, kMode> {
 protected:
  using Base = PairCopies<T, kExperts, kMode>;
  using Base::b, Base::block, Base::chunk, Base::first, Base::in, Base::kValues, Base::kWide;
  using Base::lane, Base::valid_row, Base::warp;
  using typename Base::Sum;
  using typename Base::Tile;

  Sum p[kExperts][kTiles<T>][4];
  Sum values[kValues ? kExperts : 1][kTiles<T>][4];
  Sum sums[kMode != PairMode::kMap ? kExperts : 1][kWide / 8][4];
  Sum row_sums[kExperts][2];

  __device__ __forceinline__ explicit PairResults(const PairLaunch& launch) : Base(launch) {
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      row_sums[e][0] = row_sums[e][1] = 0;
      if constexpr (kMode != PairMode::kMap)
#pragma unroll
        for (int n = 0; n < kWide / 8; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[e][n][i] = 0;
    }
  }

  __device__ __forceinline__ void store_map(int j, uint32_t columns) const {
    Sum* const out = static_cast<Sum*>(const_cast<void*>(in.out.data));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first + 16 * warp + lane / 4 + 8 * half;
      if (row >= in.last) continue;
      const bool valid = valid_row(row);
#pragma unroll
      for (int e = 0; e < kExperts; ++e)
        if (e < in.experts) {
          const int64_t line = b * in.out.group_stride + e * in.out.head_stride +
                               (row - in.first) * in.out.row_stride;
#pragma unroll
          for (int n = 0; n < kTiles<T>; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const int column = 8 * n + lane % 4 * 2 + i;
              const Sum weight = p[e][n][2 * half + i], value = values[e][n][2 * half + i];
              // The value may be NaN where p is 0.
              const bool pair = valid && (columns >> column & 1);
              if (j + column < in.columns) out[line + j + column] = pair ? weight * value : Sum(0);
            }
        }
    }
  }

  __device__ __forceinline__ Sum own(int e, int64_t row, int column) const {
    const int64_t place =
        b * in.own.group_stride + e * in.own.head_stride + row * in.own.row_stride + column;
    if (in.own_wide) return static_cast<const Sum*>(in.own.data)[place];
    return widened(static_cast<const T*>(in.own.data)[place]);
  }

  // One expert's s1 own sum_j p + s2 sum_j p w_j + s3 own sum_j p w_j. A term of coefficient 0 has
  // no part, whatever its values are.
  __device__ __forceinline__ Sum message_sum(int e, int64_t row, int column, Sum mass,
                                             Sum sum) const {
    Sum value = 0;
    const Sum s1 = in.s1[e], s2 = in.s2[e], s3 = in.s3[e];
    if (s1 + s3 > 0) {
      const Sum factor = own(e, row, column);
      if (s1 > 0) value += s1 * factor * mass;
      if (s3 > 0) value += s3 * factor * sum;
    }
    if (s2 > 0) value += s2 * sum;
    return value;
  }

  template <typename X>
  __device__ __forceinline__ void store(int e, int64_t row, int column, Sum value) const {
    X* const out = static_cast<X*>(const_cast<void*>(in.out.data));
    narrow(value, out + b * in.out.group_stride + e * in.out.head_stride + row * in.out.row_stride +
                      column);
  }

  // After the loop each warp has a region of shared memory: sums of its 16 rows for one expert,
  // sums over experts (or, for kPool, over rows), and the rows' masses.
  static constexpr int kLine = kWide + 4, kRegion = 32 * kLine + 16;

  __device__ __forceinline__ Sum& of_warp(int other, int n) const {
    return at<Sum>((other * kRegion + n) * int(sizeof(Sum)));
  }

  __device__ __forceinline__ void put_sums(int e) const {
    __syncwarp();
#pragma unroll
    for (int n = 0; n < kWide / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int place = (lane / 4 + 8 * half) * kLine + 8 * n + lane % 4 * 2;
        const Few<Sum, 2> pair{sums[e][n][2 * half], sums[e][n][2 * half + 1]};
        reinterpret_cast<Few<Sum, 2>&>(of_warp(warp, place)) = pair;
      }
    if (lane % 4 == 0) {
      of_warp(warp, 32 * kLine + lane / 4) = row_sums[e][0];
      of_warp(warp, 32 * kLine + lane / 4 + 8) = row_sums[e][1];
    }
    __syncwarp();
  }

  // Sums over this row's columns that other lanes have.
  __device__ __forceinline__ void add_row_sums() {
#pragma unroll
    for (int e = 0; e < kExperts; ++e)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int apart = 1; apart < 4; apart *= 2)
          row_sums[e][half] += __shfl_xor_sync(kWholeWarp, row_sums[e][half], apart);
  }

  __device__ __forceinline__ void store_sums() {
    add_row_sums();
    __syncthreads();  // stages are no longer read
    const int row = first + 16 * warp, there = min(16, in.last - row);
    const uint32_t valid = __ballot_sync(kWholeWarp, lane < 16 && valid_row(row + lane));
#pragma unroll
    for (int e = 0; e < kExperts; ++e)
      if (e < in.experts) {
        put_sums(e);
        if (chunk == 0 && in.row_sums != nullptr && lane < there)
          static_cast<Sum*>(in.row_sums)[(b * in.experts + e) * in.rows + row + lane] =
              valid >> lane & 1 ? of_warp(warp, 32 * kLine + lane) : Sum(0);
        if (in.reduce == PairReduce::kPool) {
          pool_rows(e, row, valid);
        } else {
          store_messages(e, row, there, valid);
        }
      }
    if (in.reduce == PairReduce::kPool) store_pooled();
  }

  __device__ __forceinline__ Sum message(int e, int row, int r, int column) const {
    return message_sum(e, row + r, chunk * kWide + column, of_warp(warp, 32 * kLine + r),
                       of_warp(warp, r * kLine + column));
  }

  __device__ __forceinline__ void store_messages(int e, int row, int there, uint32_t valid) const {
#pragma unroll 1
    for (int n = lane; n < there * kWide; n += 32) {
      const int r = n / kWide, column = n % kWide;
      if (chunk * kWide + column >= in.width) continue;
      const Sum value = valid >> r & 1 ? message(e, row, r, column) : Sum(0);
      if (in.reduce == PairReduce::kNone) {
        store<T>(e, row + r, chunk * kWide + column, value);
        continue;
      }
      Sum& total = of_warp(warp, (16 + r) * kLine + column);
      total = e == 0 ? value : total + value;
      if (e == in.experts - 1) store<T>(0, row + r, chunk * kWide + column, total);
    }
  }

  // Sums of the warp's rows.
  __device__ __forceinline__ void pool_rows(int e, int row, uint32_t valid) const {
#pragma unroll 1
    for (int column = lane; column < kWide; column += 32) {
      Sum total = 0;
      if (chunk * kWide + column < in.width)
#pragma unroll 1
        for (int r = 0; r < 16; ++r)
          if (valid >> r & 1) total += message(e, row, r, column);
      of_warp(warp, (16 + e) * kLine + column) = total;
    }
  }

  __device__ __forceinline__ void store_pooled() const {
    __syncthreads();
#pragma unroll 1
    for (int n = threadIdx.x; n < in.experts * kWide; n += Tile::kThreads) {
      const int e = n / kWide, column = n % kWide;
      Sum total = 0;
      for (int other = 0; other < Tile::kWarps; ++other)
        total += of_warp(other, (16 + e) * kLine + column);
      if (chunk * kWide + column < in.width) store<Sum>(e, block, chunk * kWide + column, total);
    }
  }

  // seen: whether any column is valid. Otherwise the gradient is zero, also where u is infinite.
  __device__ __forceinline__ void store_gradient(bool seen) {
    add_row_sums();
    __syncthreads();
    const int row = first + 16 * warp, there = min(16, in.last - row);
    const uint32_t valid = __ballot_sync(kWholeWarp, seen && lane < 16 && valid_row(row + lane));
#pragma unroll
    for (int e = 0; e < kExperts; ++e)
      if (e < in.experts) {
        put_sums(e);
        if (in.out.data != nullptr)
#pragma unroll 1
          for (int n = lane; n < there * kWide; n += 32) {
            const int r = n / kWide, column = chunk * kWide + n % kWide;
            const Sum sum = of_warp(warp, r * kLine + n % kWide) * static_cast<Sum>(in.scale);
            if (column < in.rank) store<T>(e, row + r, column, valid >> r & 1 ? sum : Sum(0));
          }
        if (lane == 0) {
          Sum total = 0;
          for (int r = 0; r < 16; ++r)
            if (valid >> r & 1) total += of_warp(warp, 32 * kLine + r);
          of_warp(warp, 16 * kLine + e) = total;
        }
      }
    if (chunk != 0 || in.row_sums == nullptr) return;
    __syncthreads();
    const int e = threadIdx.x;
    if (e >= in.experts) return;
    Sum total = 0;
    for (int other = 0; other < Tile::kWarps; ++other) total += of_warp(other, 16 * kLine + e);
    static_cast<Sum*>(in.row_sums)[(b * in.blocks + block) * in.experts + e] = total;
  }
};

}  // namespace flmoe::cuda
