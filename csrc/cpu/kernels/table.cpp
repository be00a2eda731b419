#include "cpu/kernels/entry.h"

namespace flmoe::FLMOE_ISA {

const Kernels& kernels() {
#define FLMOE_NAME(name, ...) name,
  static const Kernels table = {FLMOE_KERNELS(FLMOE_NAME)};
#undef FLMOE_NAME
  return table;
}

}  // namespace flmoe::FLMOE_ISA
