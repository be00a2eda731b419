// Routing on a GPU, for the Python bindings: plain pointers to device memory, no CUDA header.
// Everything is queued on `stream` of `device` without synchronizing. Each call returns null or
// CUDA's error message.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/kernels.h"
#include "cuda/place.h"

namespace flmoe::cuda {

// counters: routing_counters() of the plan for these rows and experts (dispatch: experts + 1).
const char* gate(DType dtype, const GateArgs& args, const Place& place);
const char* limit(const LimitArgs& args, int32_t* counters, const Place& place);
const char* dispatch(const DispatchArgs& args, int32_t* counters, const Place& place);

// The number of devices; if there is none, *reason is CUDA's message.
int devices(const char** reason);

// As CUDA numbers them, 12080 for CUDA 12.8; the driver's is 0 if none is installed.
struct Versions {
  int compiler, driver;
};
Versions versions();

// Null if the kernels run on a device, otherwise the reason. Only reads attributes: no context is
// created, and the current device does not change.
struct Capability {
  int major, minor;
};
const char* probe(int device, Capability* capability);

}  // namespace flmoe::cuda
