#include "cpu/routed_mlp.h"

#include "cpu/routed_mlp_backward.h"

namespace flmoe::FLMOE_ISA {

void routed_forward(DType dtype, const RoutedForward& args) {
  with_dtype(dtype, [&]<typename T>() { run_routed_forward<PlainOperands<T>>(args); });
}

void routed_backward(DType dtype, const RoutedBackward& args) {
  with_dtype(dtype, [&]<typename T>() { run_routed_backward<PlainOperands<T>>(args); });
}

}  // namespace flmoe::FLMOE_ISA
