// Implementation of csrc/common/routing_block.h on a GPU: each step is one call for this thread,
// followed by a barrier. Scans over a block are CUB's.
#pragma once

#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "common/routing.h"
#include "cuda/convert.cuh"

namespace flmoe::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// A thread's own variable; the index is not used.
template <typename T>
struct Own {
  T value;
  __device__ __forceinline__ T& operator[](int) { return value; }
  __device__ __forceinline__ const T& operator[](int) const { return value; }
};

struct Warp {
  template <typename T>
  using Each = Own<T>;

  template <typename F>
  __device__ __forceinline__ void each(const F& f) {
    f(static_cast<int>(threadIdx.x % 32));
    __syncwarp();
  }

  __device__ __forceinline__ void match(const Own<int32_t>& key, Own<uint32_t>& peers) const {
    peers.value = __match_any_sync(kAllLanes, key.value);
  }

  // Butterflies: every lane of a group gets the same result.
  template <typename A>
  __device__ __forceinline__ void best(Own<A>& value, Own<int32_t>& expert, int width) const {
    for (int apart = width / 2; apart > 0; apart /= 2) {
      const A other = __shfl_xor_sync(kAllLanes, value.value, apart);
      const int32_t e = __shfl_xor_sync(kAllLanes, expert.value, apart);
      if (e < 0) continue;
      if (expert.value < 0 || comes_before(other, e, value.value, expert.value))
        value.value = other, expert.value = e;
    }
  }

  template <typename A>
  __device__ __forceinline__ void sum(Own<A>& value, int width) const {
    for (int apart = width / 2; apart > 0; apart /= 2)
      value.value += __shfl_xor_sync(kAllLanes, value.value, apart);
  }

  static __device__ __forceinline__ int32_t count(uint32_t bits) { return __popc(bits); }

  template <typename T, typename A>
  static __device__ __forceinline__ A read(const T* p) {
    if constexpr (sizeof(T) == sizeof(A)) {
      return *p;
    } else {
      return widened(*p);
    }
  }

  template <typename T, typename A>
  static __device__ __forceinline__ void write(T* p, A x) {
    if constexpr (sizeof(T) == sizeof(A)) {
      *p = x;
    } else {
      narrow(x, p);
    }
  }
};

template <int kBlockThreads>
struct Block {
  static constexpr int kThreads = kBlockThreads, kWarps = kThreads / 32;
  template <typename T>
  using Each = Own<T>;
  using Scan = cub::BlockScan<int32_t, kThreads>;
  struct Shared {
    int32_t tally[kTallies];
    typename Scan::TempStorage scan;
  };
  Shared& shared;
  int32_t* tally;

  template <typename F>
  __device__ __forceinline__ void each(const F& f) {
    f(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  template <typename F>
  __device__ __forceinline__ void warps(const F& f) {
    Warp warp;
    f(warp, static_cast<int>(threadIdx.x / 32));
    __syncthreads();
  }

  __device__ __forceinline__ int32_t exclusive_sum(Own<int32_t>& value) {
    int32_t sum;
    Scan(shared.scan).ExclusiveSum(value.value, value.value, sum);
    __syncthreads();
    return sum;
  }
};

}  // namespace flmoe::cuda
