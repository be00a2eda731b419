// Routing on a GPU: launches of the blocks in csrc/common/routing_gate_blocks.h and
// csrc/common/routing_dispatch_blocks.h.
//
// Tiling: in the gate each token has a group of 1 to 32 lanes; blocks have 256 threads. limit and
// dispatch are one launch of one block of 1024 threads if there are few rows, otherwise three
// launches: count per block of rows, sum over blocks, place. routing_plan (csrc/common/routing.h)
// determines both. Why not a device-wide sort: with few experts, counting is one pass, and a radix
// sort needs more than three launches; the temporary memory depends only on shapes.
//
// Memory: the gate reads logits once (and the chosen logits again; for more than 256 experts once
// more per choice) and writes index and weight. limit and dispatch read index twice per launch that
// processes it, the second time from the cache: 8 bytes per row, and 8 or 4 written. All are bound
// by latency at the sizes of a layer, and by memory for larger sizes.
//
// Races: a launch reads what earlier launches on the stream wrote; no block reads what another
// block of its launch writes. Count: block b writes counters[., b]. Sum: block e reads and writes
// counters[e, .] and counts[e]. Place: one thread per row writes permutation (the places are a
// permutation) or kept; block 0 writes offsets. In a block, steps end with a barrier; in a step no
// thread accesses what another thread writes: see walk(), where only the first of the lanes with
// the same bin writes its counter, a step after all have read it. No atomics: results are bitwise
// equal for any order.
#include "cuda/routing.h"

#include <cuda_runtime.h>

#include "common/routing_dispatch_blocks.h"
#include "common/routing_gate_blocks.h"
#include "cuda/routing_device_block.cuh"
#include "cuda_build.h"

namespace flmoe::cuda {
namespace {

template <int kThreads, typename Body>
__global__ void __launch_bounds__(kThreads, 1) routing_kernel(const Body body) {
  __shared__ typename Block<kThreads>::Shared shared;
  Block<kThreads> block{shared, shared.tally};
  body(block, static_cast<int64_t>(blockIdx.x));
}

// Queues launches until one fails; skips launches without blocks.
class Launch {
 public:
  explicit Launch(const Place& place) : stream_(static_cast<cudaStream_t>(place.stream)) {
    // The runtime is linked into this module, so a pending error comes from an earlier call in this
    // file, which has reported it. Clear it, so that it is not attributed to the next launches.
    cudaGetLastError();
    error_ = cudaSetDevice(place.device);
  }

  template <int kThreads, typename Body>
  void run(int64_t blocks, const Body& body) {
    if (blocks == 0 || error_ != cudaSuccess) return;
    routing_kernel<kThreads, Body><<<static_cast<unsigned>(blocks), kThreads, 0, stream_>>>(body);
    error_ = cudaGetLastError();
  }

  const char* message() const {
    return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_);
  }

 private:
  cudaStream_t stream_;
  cudaError_t error_;
};

}  // namespace

const char* gate(DType dtype, const GateArgs& args, const Place& place) {
  Launch launch(place);
  const routing::GateTokens in{args.logits,
                               args.index,
                               args.weight,
                               args.tokens,
                               static_cast<int32_t>(args.experts),
                               static_cast<int32_t>(args.top_k),
                               args.over_all};
  switch (dtype) {
    case DType::kFloat32:
      routing::launch_gate<float>(launch, in);
      break;
    case DType::kFloat64:
      routing::launch_gate<double>(launch, in);
      break;
    case DType::kBFloat16:
      routing::launch_gate<BFloat16>(launch, in);
      break;
    case DType::kFloat16:
      routing::launch_gate<Float16>(launch, in);
      break;
  }
  return launch.message();
}

const char* limit(const LimitArgs& args, int32_t* counters, const Place& place) {
  Launch launch(place);
  const RoutingRows in{args.index, args.mask, args.tokens * args.top_k,
                       static_cast<int32_t>(args.top_k), static_cast<int32_t>(args.experts)};
  routing::launch_limit(launch, in, routing_plan(in.rows, args.experts), args.capacity, counters,
                        args.kept);
  return launch.message();
}

const char* dispatch(const DispatchArgs& args, int32_t* counters, const Place& place) {
  Launch launch(place);
  const RoutingRows in{args.index, nullptr, args.rows, 1, static_cast<int32_t>(args.experts)};
  routing::launch_dispatch(launch, in, routing_plan(args.rows, args.experts + 1), counters,
                           args.counts, args.offsets, args.permutation);
  return launch.message();
}

Versions versions() {
  int driver = 0;
  return {CUDART_VERSION, cudaDriverGetVersion(&driver) == cudaSuccess ? driver : 0};
}

int devices(const char** reason) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  cudaGetLastError();  // reported here, not at the next launch
  int driver = 0;
  if (error == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess &&
      driver == 0) {
    *reason = "no NVIDIA driver is installed";
    return 0;
  }
  *reason = error == cudaSuccess ? "" : cudaGetErrorString(error);
  return error == cudaSuccess ? count : 0;
}

const char* probe(int device, Capability* capability) {
  cudaError_t error =
      cudaDeviceGetAttribute(&capability->major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&capability->minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaGetLastError();
  if (error != cudaSuccess) return cudaGetErrorString(error);
  const bool runs = capability->major * 10 + capability->minor >= kCudaOldest;
  return runs ? nullptr : "it is older than all of these";
}

}  // namespace flmoe::cuda
