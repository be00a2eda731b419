// Helpers of the bindings of CUDA kernels.
#pragma once

#include <string>

#include "bindings/border.h"
#include "cuda/place.h"

namespace flmoe::bindings {

using Queue = std::array<int64_t, 2>;  // device, stream

inline cuda::Place place(const Queue& queue) {
  return {static_cast<int>(queue[0]), pointer(static_cast<Address>(queue[1]))};
}

inline void check_cuda(const char* message) {
  if (message != nullptr) throw std::runtime_error(std::string("CUDA: ") + message);
}

}  // namespace flmoe::bindings
