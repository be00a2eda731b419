#include "cpu/gemm_bf16.h"

namespace flmoe::FLMOE_ISA {

void product_bf16(const ProductBf16& args) {
  run_product_bf16<NativeDot>(args);
}

}  // namespace flmoe::FLMOE_ISA
