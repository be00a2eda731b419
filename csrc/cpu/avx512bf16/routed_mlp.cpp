// routed_mlp in bfloat16 by vdpbf16ps; other dtypes run the kernels of avx512.
#include "cpu/routed_mlp.h"
#include "cpu/gemm_bf16.h"
#include "cpu/routed_mlp_backward.h"

namespace flmoe::FLMOE_ISA {

void routed_forward(DType dtype, const RoutedForward& args) {
  if (dtype != DType::kBFloat16) return avx512::kernels().routed_forward(dtype, args);
  run_routed_forward<Bf16Operands>(args);
}

void routed_backward(DType dtype, const RoutedBackward& args) {
  if (dtype != DType::kBFloat16) return avx512::kernels().routed_backward(dtype, args);
  run_routed_backward<Bf16Operands>(args);
}

}  // namespace flmoe::FLMOE_ISA
