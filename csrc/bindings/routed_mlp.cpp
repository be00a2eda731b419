#include "bindings/border.h"

namespace flmoe::bindings {
namespace {

// tensors = addresses of (x, weight, w_in, b_in, w_out, b_out, w_gate, b_gate, offsets,
// permutation); sizes = (tokens, choices, experts, width, hidden); strides = (w_in, w_gate) from
// expert to expert.
using Tensors = std::array<Address, 10>;
using Sizes = std::array<int64_t, 5>;
using Strides = std::array<int64_t, 2>;

flmoe::RoutedArgs routed_args(const Tensors& tensors, const Sizes& sizes, const Strides& strides,
                              int act, int threads) {
  flmoe::RoutedArgs args{};
  args.x = pointer(tensors[0]), args.weight = pointer(tensors[1]);
  args.w_in = pointer(tensors[2]), args.b_in = pointer(tensors[3]);
  args.w_out = pointer(tensors[4]), args.b_out = pointer(tensors[5]);
  args.w_gate = pointer(tensors[6]), args.b_gate = pointer(tensors[7]);
  args.offsets = pointer<const int32_t>(tensors[8]);
  args.permutation = pointer<const int32_t>(tensors[9]);
  args.tokens = sizes[0], args.choices = sizes[1], args.experts = sizes[2];
  args.width = sizes[3], args.hidden = sizes[4];
  args.w_in_stride = strides[0], args.w_gate_stride = strides[1];
  if (act < 0 || act > 3) throw std::invalid_argument("act: expected a code from 0 to 3");
  const int64_t rows = args.tokens * args.choices;
  int32_t last = 0;
  for (int64_t e = 0; e <= args.experts; ++e) {
    if (args.offsets[e] < last || args.offsets[e] > rows)
      throw std::invalid_argument("offsets: expected non-decreasing values within the rows");
    // The kernel searches the rows of an expert.
    bool ascending = true;
    for (int64_t r = last; e > 0 && r < args.offsets[e]; ++r)
      ascending &= args.permutation[r] > (r > last ? args.permutation[r - 1] : -1) &&
                   args.permutation[r] < rows;
    if (!ascending)
      throw std::invalid_argument("permutation: expected ascending places of each expert's rows");
    last = args.offsets[e];
  }
  // Below 2^18 multiply-adds one thread is faster.
  constexpr int64_t kSerial = int64_t{1} << 18;
  const bool small = (rows + args.experts) * args.width * args.hidden < kSerial;
  args.act = act, args.threads = small ? 1 : threads;
  return args;
}

}  // namespace

void bind_routed_mlp(py::module_& m) {
  m.def("routed_forward",
        [](int dtype, const Tensors& tensors, const Sizes& sizes, const Strides& strides, int act,
           int threads, Address out, Address hidden) {
          const flmoe::RoutedForward args{routed_args(tensors, sizes, strides, act, threads),
                                          pointer(out), pointer(hidden)};
          run(&flmoe::Kernels::routed_forward, dtype, args);
        });
  // grads = (x, weight, w_in, b_in, w_out, b_out, w_gate, b_gate)
  m.def("routed_backward",
        [](int dtype, const Tensors& tensors, const Sizes& sizes, const Strides& strides, int act,
           int threads, Address grad_out, Address hidden, const std::array<Address, 8>& grads) {
          const flmoe::RoutedBackward args{routed_args(tensors, sizes, strides, act, threads),
                                           pointer(grad_out),
                                           pointer(hidden),
                                           pointer(grads[0]),
                                           pointer(grads[1]),
                                           pointer(grads[2]),
                                           pointer(grads[3]),
                                           pointer(grads[4]),
                                           pointer(grads[5]),
                                           pointer(grads[6]),
                                           pointer(grads[7])};
          run(&flmoe::Kernels::routed_backward, dtype, args);
        });
}

}  // namespace flmoe::bindings
