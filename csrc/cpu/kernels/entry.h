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

void attention_forward(DType, const AttentionForward&);
void attention_backward(DType, const AttentionBackward&);
void linear_forward(DType, const LinearArgs&);
void linear_backward(DType, const LinearArgs&);
void norm_forward(DType, const NormArgs&);
void norm_backward(DType, const NormArgs&);
void mlp_forward(DType, const MlpArgs&);
void mlp_backward(DType, const MlpArgs&);
void pool_forward(DType, const PoolArgs&);
void pool_backward(DType, const PoolArgs&);
void views_forward(DType, const ViewsArgs&);
void views_backward(DType, const ViewsArgs&);
void encoder_inference(DType, const EncoderInference&);
void loss_forward(DType, const LossArgs&);
void loss_backward(DType, const LossArgs&);
void pair_forward(DType, const PairForward&);
void pair_backward(DType, const PairBackward&);
void pair_map(DType, const PairScores&);
void pair_top(DType, const PairScores&);
void routing_gate(DType, const GateArgs&);
bool routing_limit(const LimitArgs&);
bool routing_dispatch(const DispatchArgs&);
void routed_forward(DType, const RoutedForward&);
void routed_backward(DType, const RoutedBackward&);

}  // namespace flmoe::FLMOE_ISA
