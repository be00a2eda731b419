// A CUDA runtime that calls a Python function for each launch, and the bindings of pair_moe on it.
#include <cuda_runtime.h>
#include <pybind11/functional.h>

#include <map>
#include <string>
#include <utility>

#include "bindings/border.h"

namespace {

// (kernel, grid, threads, bytes of shared memory, address of the addresses of the arguments)
// Never destroyed, because Python may be gone then.
auto& launch = *new std::function<void(const std::string&, unsigned, unsigned, size_t, uintptr_t)>;
std::map<const void*, std::string> names;
// Bytes of shared memory that a block of the GPU may have, and that the next launch may have.
int limit = 0;
int allowed = 48 << 10;
cudaError_t last = cudaSuccess;

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
} pushed;

}  // namespace

extern "C" {
void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  names[host] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  pushed = {grid, block, shared, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared;
  *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}
char __cudaInitModule(void**) {
  return 1;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared, cudaStream_t) {
  if (static_cast<int>(shared) > allowed || grid.x * grid.y * grid.z == 0 ||
      grid.y * grid.z * block.y * block.z != 1)
    return last = cudaErrorInvalidConfiguration;
  allowed = 48 << 10;
  launch(names.at(kernel), grid.x, block.x, shared, reinterpret_cast<uintptr_t>(arguments));
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  return std::exchange(last, cudaSuccess);
}
const char* cudaGetErrorString(cudaError_t) {
  return "an error of the launch";
}
cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return last = cudaErrorInvalidValue;
  *value = limit;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  // Less could fail the launch of another thread between this call and its own launch.
  if (value != limit) return last = cudaErrorInvalidValue;
  allowed = value;
  return cudaSuccess;
}
}  // extern "C"

PYBIND11_MODULE(flmoe_emulated, m) {
  flmoe::bindings::bind_pair_moe_cuda(m);
  m.def("on_launch", [](int shared, std::remove_reference_t<decltype(launch)> f) {
    limit = shared, launch = std::move(f);
  });
}
