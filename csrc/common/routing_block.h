// A small abstraction of a GPU block. Routing is written with it, not with CUDA's names, so that
// the same code runs on a GPU (csrc/cuda/routing_device_block.cuh) and, without one, on the host
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
// and a step ends when all of its threads have ended it, those of the block or of the warp. So no
// barrier can be forgotten or diverge: outside of steps only arguments and results of exclusive_sum
// decide. What is left to get wrong is two threads of one step at one address; the host runs
// threads, lanes, warps and blocks in shuffled orders to show that. Each<T> is a variable that
// every thread has for itself; the host refuses every index but the running thread's own.
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
