#include "bindings/border.h"

namespace flmoe::bindings {
namespace {

// sizes = (groups, problems, rows, heads, width)
flmoe::AttentionForward attention_args(const py::tuple& q, const py::tuple& k, const py::tuple& v,
                                       Address cumulative, const std::array<int64_t, 5>& sizes,
                                       double scale, Address seed, int64_t threshold, Address out,
                                       Address lse, int threads) {
  flmoe::AttentionForward args{};
  args.q = view(q), args.k = view(k), args.v = view(v);
  args.cumulative = pointer<const int32_t>(cumulative);
  args.groups = sizes[0], args.problems = sizes[1], args.rows = sizes[2];
  args.heads = sizes[3], args.width = sizes[4];
  int32_t last = 0;
  for (int64_t p = 0; p <= args.problems; ++p) {
    if (args.cumulative[p] < last || args.cumulative[p] > args.rows)
      throw std::invalid_argument(
          "cu_seqlens: expected values that start at 0 or above, never decrease and stay within "
          "rows");
    last = args.cumulative[p];
  }
  args.scale = scale;
  args.dropout = dropout(seed, threshold);
  args.out = pointer(out), args.lse = pointer(lse), args.threads = threads;
  return args;
}

}  // namespace

void bind_expert_attention(py::module_& m) {
  m.def("attention_forward", [](int dtype, const py::tuple& q, const py::tuple& k,
                                const py::tuple& v, Address cumulative, const py::tuple& sizes,
                                double scale, Address seed, int64_t threshold, Address out,
                                Address lse, int threads) {
    const auto args =
        attention_args(q, k, v, cumulative, five(sizes), scale, seed, threshold, out, lse, threads);
    run(&flmoe::Kernels::attention_forward, dtype, args);
  });
  m.def("attention_backward",
        [](int dtype, const py::tuple& q, const py::tuple& k, const py::tuple& v,
           Address cumulative, const py::tuple& sizes, double scale, Address seed,
           int64_t threshold, Address out, Address lse, int threads, const py::tuple& grad_out,
           const py::tuple& grad_q, const py::tuple& grad_k, const py::tuple& grad_v) {
          flmoe::AttentionBackward args{};
          args.forward = attention_args(q, k, v, cumulative, five(sizes), scale, seed, threshold,
                                        out, lse, threads);
          args.grad_out = view(grad_out);
          args.grad_q = view(grad_q), args.grad_k = view(grad_k), args.grad_v = view(grad_v);
          run(&flmoe::Kernels::attention_backward, dtype, args);
        });
}

}  // namespace flmoe::bindings
