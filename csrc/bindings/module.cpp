#include "bindings/border.h"
#include "common/parallel.h"
#include "common/scratch.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native kernels of flmoe_kernels; called through its Python operators only.";
  m.def("instruction_set", [] { return flmoe::active_instruction_set(); });
  m.def("instruction_set_runs", [](const char* name) { return flmoe::instruction_set_runs(name); });
  m.def("parallel_pool", [] { return flmoe::parallel_pool(); });
  // For tests.
  m.def("take_scratch", [](int64_t bytes) {
    return reinterpret_cast<flmoe::bindings::Address>(flmoe::take_scratch(bytes));
  });
  m.def("return_scratch", [](flmoe::bindings::Address data) {
    flmoe::return_scratch(flmoe::bindings::pointer(data));
  });
  m.def("scratch_bytes", [] {
    const flmoe::ScratchBytes bytes = flmoe::scratch_bytes();
    return std::pair(bytes.used, bytes.kept);
  });
  m.attr("KEPT_SCRATCH") = flmoe::kKeptScratch;
  m.def("advise_huge", [](flmoe::bindings::Address data, int64_t bytes) {
    flmoe::advise_huge(flmoe::bindings::pointer(data), bytes);
  });
  flmoe::bindings::bind_expert_attention(m);
  flmoe::bindings::bind_encoder(m);
  flmoe::bindings::bind_interaction_losses(m);
  flmoe::bindings::bind_pair_moe(m);
#if defined(FLMOE_HAVE_CUDA)
  flmoe::bindings::bind_pair_moe_cuda(m);
#endif
  flmoe::bindings::bind_routed_mlp(m);
  flmoe::bindings::bind_routing(m);
  flmoe::bindings::bind_snapshot(m);
}
