// Where launches are queued.
#pragma once

namespace flmoe::cuda {

struct Place {
  int device;
  void* stream;
};

}  // namespace flmoe::cuda
