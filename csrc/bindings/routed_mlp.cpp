#include "bindings/border.h"

namespace flmoe::bindings {
namespace {

// tensors = addresses of (x, weight, w_in, b_in, w_out, b_out, offsets, permutation);
// sizes = (tokens, choices, experts, width, hidden).
flmoe::RoutedArgs routed_args(const std::array<Address, 8>& tensors,
                              const std::array<int64_t, 5>& sizes, int act, int threads) {
  flmoe::RoutedArgs args{};
  args.x = pointer(tensors[0]), args.weight = pointer(tensors[1]);
  args.w_in = pointer(tensors[2]), args.b_in = pointer(tensors[3]);
  args.w_out = pointer(tensors[4]), args.b_out = pointer(tensors[5]);
  args.offsets = pointer<const int32_t>(tensors[6]);
  args.permutation = pointer<const int32_t>(tensors[7]);
  args.tokens = sizes[0], args.choices = sizes[1], args.experts = sizes[2];
  args.width = sizes[3], args.hidden = sizes[4];
  if (act < 0 || act > 3) throw std::invalid_argument("act: expected a code from 0 to 3");
  const int64_t rows = args.tokens * args.choices;
  int32_t last = 0;
  for (int64_t e = 0; e <= args.experts; ++e) {
    if (args.offsets[e] < last || args.offsets[e] > rows)
      throw std::invalid_argument("offsets: expected non-decreasing values within the rows");
    last = args.offsets[e];
  }
  for (int64_t r = 0; r < rows; ++r)
    if (args.permutation[r] < 0 || args.permutation[r] >= rows)
      throw std::invalid_argument("permutation: expected places of the rows");
  args.act = act, args.threads = threads;
  return args;
}

}  // namespace

void bind_routed_mlp(py::module_& m) {
  using Tensors = std::array<Address, 8>;
  using Sizes = std::array<int64_t, 5>;
  m.def("routed_forward", [](int dtype, const Tensors& tensors, const Sizes& sizes, int act,
                             int threads, Address out, Address hidden, Address rows) {
    const flmoe::RoutedForward args{routed_args(tensors, sizes, act, threads), pointer(out),
                                    pointer(hidden), pointer(rows)};
    const DType type = dtype_of(dtype);
    without_gil([&] { flmoe::active_kernels().routed_forward(type, args); });
  });
  // workspace = (grad_hidden, weighted, rows); grads = (x, weight, w_in, b_in, w_out, b_out)
  m.def("routed_backward",
        [](int dtype, const Tensors& tensors, const Sizes& sizes, int act, int threads,
           Address grad_out, Address hidden, const std::array<Address, 3>& workspace,
           const std::array<Address, 6>& grads) {
          const flmoe::RoutedBackward args{routed_args(tensors, sizes, act, threads),
                                           pointer(grad_out),
                                           pointer(hidden),
                                           pointer(workspace[0]),
                                           pointer(workspace[1]),
                                           pointer(workspace[2]),
                                           pointer(grads[0]),
                                           pointer(grads[1]),
                                           pointer(grads[2]),
                                           pointer(grads[3]),
                                           pointer(grads[4]),
                                           pointer(grads[5])};
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().routed_backward(type, args); });
        });
}

}  // namespace flmoe::bindings
