// Helpers of all kernel files: choice of the storage type, dropout keys, names of the entry points.
#pragma once

#include <initializer_list>

#include "common/parallel.h"
#include "common/scratch.h"
#include "cpu/kernels.h"
#include "cpu/philox.h"

namespace flmoe::FLMOE_ISA {

// Calls body.template operator()<T>() with the storage type of `dtype`.
template <typename F>
inline void with_dtype(DType dtype, const F& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body.template operator()<float>();
    case DType::kFloat64:
      return body.template operator()<double>();
    case DType::kBFloat16:
      return body.template operator()<BFloat16>();
    case DType::kFloat16:
      return body.template operator()<Float16>();
  }
}

// `count` elements of scratch memory, undefined, for the lifetime of the object. One object per
// array: the address sanitizer checks the ends of each.
template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t count)
      : data_(static_cast<A*>(take_scratch(count * static_cast<int64_t>(sizeof(A))))) {}
  ~Buffer() { return_scratch(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  A* data() const { return data_; }
  operator A*() const { return data_; }

 private:
  A* data_;
};

inline Dropout dropout_of(const DropoutSpec& spec) {
  if (spec.threshold >= 65536u) return {0, 0, 65536u};
  const auto seed = static_cast<uint64_t>(*spec.seed);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), spec.threshold};
}

// Factor of a kept value, which preserves the mean: 1 / keep rate.
template <typename A>
inline A keep_scale(const Dropout& d) {
  return d.threshold == 0 ? A(0) : A(65536.0 / d.threshold);
}

#define FLMOE_DECLARATION(name, result, ...) result name(__VA_ARGS__);
FLMOE_KERNELS(FLMOE_DECLARATION)
#undef FLMOE_DECLARATION

}  // namespace flmoe::FLMOE_ISA
