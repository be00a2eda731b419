// The product in bfloat16 with the instruction emulated, for tests on any machine.
#define FLMOE_ISA baseline
#include "cpu/gemm_bf16.h"

namespace flmoe::baseline {

void product_bf16(const ProductBf16& args) {
  run_product_bf16<EmulatedDot>(args);
}

}  // namespace flmoe::baseline
