#include "bindings/border.h"

namespace flmoe::bindings {

void bind_interaction_losses(py::module_& m) {
  using Args = flmoe::LossArgs;
  const auto as_given = [](Args&) {};
  bind(m, "loss_forward", &flmoe::Kernels::loss_forward, as_given, &Args::latents, &Args::exists,
       &Args::losses, &Args::experts, &Args::views, &Args::batch, &Args::width, &Args::threads);
  bind(m, "loss_backward", &flmoe::Kernels::loss_backward, as_given, &Args::latents, &Args::exists,
       &Args::grad_losses, &Args::grad_latents, &Args::experts, &Args::views, &Args::batch,
       &Args::width, &Args::threads);
}

}  // namespace flmoe::bindings
