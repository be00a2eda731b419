#include "cpu/encoder_mlp.h"

namespace flmoe::FLMOE_ISA {

void mlp_forward(DType dtype, const MlpArgs& args) {
  with_dtype(dtype, [&]<typename T>() { Mlp<PlainDense<T>>(args, false).forward(); });
}

void mlp_backward(DType dtype, const MlpArgs& args) {
  with_dtype(dtype, [&]<typename T>() { Mlp<PlainDense<T>>(args, true).backward(); });
}

}  // namespace flmoe::FLMOE_ISA
