#include "cpu/kernels/entry.h"

namespace flmoe::FLMOE_ISA {

const Kernels& kernels() {
  static const Kernels table = [] {
    Kernels differing = avx512::kernels();
    differing.linear_forward = linear_forward;
    differing.linear_backward = linear_backward;
    differing.mlp_forward = mlp_forward;
    differing.mlp_backward = mlp_backward;
    differing.attention_forward = attention_forward;
    differing.attention_backward = attention_backward;
    differing.encoder_inference = encoder_inference;
    differing.routed_forward = routed_forward;
    differing.routed_backward = routed_backward;
    return differing;
  }();
  return table;
}

}  // namespace flmoe::FLMOE_ISA
