#include "bindings/border.h"

namespace flmoe::bindings {

void bind_interaction_losses(py::module_& m) {
  m.def("loss_forward",
        [](int dtype, Address latents, Address exists, Address losses, int64_t experts,
           int64_t views, int64_t batch, int64_t width, int threads) {
          const flmoe::LossArgs args{pointer(latents),
                                     nullptr,
                                     pointer<bool>(exists),
                                     pointer(losses),
                                     nullptr,
                                     experts,
                                     views,
                                     batch,
                                     width,
                                     threads};
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().loss_forward(type, args); });
        });
  m.def("loss_backward",
        [](int dtype, Address latents, Address exists, Address grad_losses, Address grad_latents,
           int64_t experts, int64_t views, int64_t batch, int64_t width, int threads) {
          const flmoe::LossArgs args{pointer(latents),
                                     pointer(grad_losses),
                                     pointer<bool>(exists),
                                     nullptr,
                                     pointer(grad_latents),
                                     experts,
                                     views,
                                     batch,
                                     width,
                                     threads};
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().loss_backward(type, args); });
        });
}

}  // namespace flmoe::bindings
