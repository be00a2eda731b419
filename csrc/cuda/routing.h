// Routing on a GPU, for the Python border: plain pointers to the device's memory, no CUDA header.
// Everything is queued on `stream` of `device` and nothing is waited for. Each call returns null,
// or CUDA's message of what went wrong.
#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/kernels.h"

namespace flmoe::cuda {

struct Place {
  int device;
  void* stream;
};

// counters: routing_counters() of the plan for these rows and experts (dispatch: experts + 1).
const char* gate(DType dtype, const GateArgs& args, const Place& place);
const char* limit(const LimitArgs& args, int32_t* counters, const Place& place);
const char* dispatch(const DispatchArgs& args, int32_t* counters, const Place& place);

// The number of devices; where there is none, *reason is CUDA's message.
int devices(const char** reason);

// Whether the kernels run on a device: null, or why not. By its attributes: no context is made, and
// the caller's current device stays what it is.
struct Capability {
  int major, minor;
};
const char* probe(int device, Capability* capability);

}  // namespace flmoe::cuda
