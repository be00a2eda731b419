// A small abstraction of a GPU block. Routing uses it instead of CUDA's names, so that the same
// code runs on a GPU (csrc/cuda/routing_device_block.cuh) and, without a GPU, on the host
// (csrc/cpu/routing_host_block.h), where the tests compare it with the CPU kernels. A block is a
// sequence of steps:
//
//   block.each(f)           f(thread) for every thread
//   block.warps(f)          f(warp, number) for every warp
//   block.exclusive_sum(v)  v becomes the sum over the threads before; returns the whole sum
//   warp.each(f)            f(lane) for every lane
//   warp.match(key, peers)  the lanes that have this lane's key
//   warp.best, warp.sum     over groups of `width` lanes
//
// A step ends when all threads of the block or warp have finished it. So no barrier can be
// forgotten or diverge: outside of steps, control flow depends only on arguments and on results of
// exclusive_sum. The remaining possible error is a race of two threads in one step; to detect it,
// the host runs threads, lanes, warps and blocks in shuffled orders. Each<T> is a variable with one
// value per thread; the host raises an error for any index but the running thread's.
#pragma once

#if defined(__CUDACC__)
#define FLMOE_BODY __device__ __forceinline__
#define FLMOE_UNROLL _Pragma("unroll")
#else
#define FLMOE_BODY inline
#define FLMOE_UNROLL
#endif

namespace flmoe::routing {

constexpr int kLanes = 32;

}  // namespace flmoe::routing
