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

void bind_routing(py::module_& m) {
  using Tensors = std::array<Address, 8>;
  using Sizes = std::array<int64_t, 5>;
  m.def("gate_forward", [](int dtype, Address logits, Address index, Address weight,
                           const std::array<int64_t, 3>& sizes, bool over_all, int threads) {
    const flmoe::GateArgs args{pointer(logits), pointer<int64_t>(index),
                               pointer(weight), sizes[0],
                               sizes[1],        sizes[2],
                               over_all,        threads};
    const DType type = dtype_of(dtype);
    without_gil([&] { flmoe::active_kernels().gate_forward(type, args); });
  });
  m.def("routed_limit", [](Address index, Address mask, Address kept,
                           const std::array<int64_t, 3>& sizes, int64_t capacity) {
    const flmoe::LimitArgs args{pointer<const int64_t>(index),
                                pointer<const uint8_t>(mask),
                                pointer<int64_t>(kept),
                                sizes[0],
                                sizes[1],
                                sizes[2],
                                capacity};
    return flmoe::active_kernels().routed_limit(args);
  });
  m.def("routed_dispatch", [](Address index, Address counts, Address offsets, Address permutation,
                              int64_t rows, int64_t experts) {
    const flmoe::DispatchArgs args{pointer<const int64_t>(index),
                                   pointer<int32_t>(counts),
                                   pointer<int32_t>(offsets),
                                   pointer<int32_t>(permutation),
                                   rows,
                                   experts};
    return flmoe::active_kernels().routed_dispatch(args);
  });
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
