// Conversion of elements to and from the compute type on a GPU.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/types.h"

namespace flmoe::cuda {

__device__ __forceinline__ float widened(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float widened(Float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
__device__ __forceinline__ void narrow(float x, BFloat16* out) {
  const uint32_t bits = __float_as_uint(x);
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
__device__ __forceinline__ void narrow(float x, Float16* out) {
  out->bits = __half_as_ushort(__float2half_rn(x));
}

__device__ __forceinline__ float widened(float x) {
  return x;
}
__device__ __forceinline__ double widened(double x) {
  return x;
}
__device__ __forceinline__ void narrow(float x, float* out) {
  *out = x;
}
__device__ __forceinline__ void narrow(double x, double* out) {
  *out = x;
}

}  // namespace flmoe::cuda
