#include "cpu/encoder_linear.h"

namespace flmoe::FLMOE_ISA {

void linear_forward(DType dtype, const LinearArgs& args) {
  with_dtype(dtype, [&]<typename T>() {
    batched_rows<PlainDense<T>>(args, args.x, false, args.bias, args.out);
  });
}

void linear_backward(DType dtype, const LinearArgs& args) {
  with_dtype(dtype, [&]<typename T>() { run_linear_backward<PlainDense<T>>(args); });
}

}  // namespace flmoe::FLMOE_ISA
