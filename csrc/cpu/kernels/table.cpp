#include "cpu/kernels/entry.h"

namespace flmoe::FLMOE_ISA {

const Kernels& kernels() {
  static const Kernels table = {
      attention_forward, attention_backward, linear_forward,    linear_backward, norm_forward,
      norm_backward,     mlp_forward,        mlp_backward,      pool_forward,    pool_backward,
      views_forward,     views_backward,     encoder_inference, loss_forward,    loss_backward,
      pair_forward,      pair_backward,      pair_map,          pair_top,        routing_gate,
      routing_limit,     routing_dispatch,   routed_forward,    routed_backward};
  return table;
}

}  // namespace flmoe::FLMOE_ISA
