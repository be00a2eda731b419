// Element types in the Python bindings, and their conversion to the compute type.
#pragma once

#include <cstdint>
#include <cstring>

namespace flmoe {

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// A (groups, rows, heads, width) view: strides in elements, the last dimension contiguous.
struct RowView {
  const void* data;
  int64_t group_stride, row_stride, head_stride;
};

}  // namespace flmoe
