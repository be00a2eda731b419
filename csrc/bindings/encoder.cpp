#include "bindings/border.h"

namespace flmoe::bindings {
namespace {

const auto as_given = [](auto&) {};

void bind_linear(py::module_& m) {
  using Args = flmoe::LinearArgs;
  bind(m, "linear_forward", &flmoe::Kernels::linear_forward, as_given, &Args::x, &Args::weight,
       &Args::bias, &Args::out, &Args::experts, &Args::rows, &Args::in_width, &Args::out_width,
       &Args::threads);
  bind(m, "linear_backward", &flmoe::Kernels::linear_backward, as_given, &Args::x, &Args::weight,
       &Args::grad_out, &Args::grad_x, &Args::grad_weight, &Args::grad_bias, &Args::experts,
       &Args::rows, &Args::in_width, &Args::out_width, &Args::threads);
  // For tests, see ProductBf16; sizes = (m, n, n_padded, depth).
  m.def("product_bf16", [](Address a, Address b, Address c, const std::array<int64_t, 4>& sizes,
                           bool depth_is_rows, bool native) {
    const flmoe::ProductBf16 args{pointer<const BFloat16>(a),
                                  pointer<const BFloat16>(b),
                                  pointer<float>(c),
                                  sizes[0],
                                  sizes[1],
                                  sizes[2],
                                  sizes[3],
                                  depth_is_rows};
    if (!native) return flmoe::baseline::product_bf16(args);
#if defined(FLMOE_HAVE_X86_ISAS)
    if (flmoe::instruction_set_runs("avx512bf16")) return flmoe::avx512bf16::product_bf16(args);
#endif
    throw std::invalid_argument("native: this processor does not have the instruction");
  });
}

void bind_norm(py::module_& m) {
  using Args = flmoe::NormArgs;
  bind(m, "norm_forward", &flmoe::Kernels::norm_forward, as_given, &Args::residual, &Args::update,
       &Args::gain, &Args::shift, &Args::eps, &Args::dropout, &Args::self_residual, &Args::sum,
       &Args::normed, &Args::mean, &Args::rstd, &Args::experts, &Args::rows, &Args::width,
       &Args::threads);
  bind(m, "norm_backward", &flmoe::Kernels::norm_backward, as_given, &Args::sum, &Args::mean,
       &Args::rstd, &Args::gain, &Args::dropout, &Args::self_residual, &Args::grad_sum,
       &Args::grad_normed, &Args::grad_residual, &Args::grad_update, &Args::grad_gain,
       &Args::grad_shift, &Args::experts, &Args::rows, &Args::width, &Args::threads);
}

void bind_mlp(py::module_& m) {
  using Args = flmoe::MlpArgs;
  bind(m, "mlp_forward", &flmoe::Kernels::mlp_forward, as_given, &Args::x, &Args::w_in,
       &Args::w_out, &Args::b_in, &Args::b_out, &Args::dropout, &Args::hidden, &Args::out,
       &Args::experts, &Args::rows, &Args::in_width, &Args::hidden_width, &Args::out_width,
       &Args::threads);
  bind(m, "mlp_backward", &flmoe::Kernels::mlp_backward, as_given, &Args::x, &Args::w_in,
       &Args::w_out, &Args::dropout, &Args::hidden, &Args::grad_out, &Args::grad_x,
       &Args::grad_w_in, &Args::grad_b_in, &Args::grad_w_out, &Args::grad_b_out, &Args::experts,
       &Args::rows, &Args::in_width, &Args::hidden_width, &Args::out_width, &Args::threads);
}

void complete_pool(flmoe::PoolArgs& args) {
  args.has_update = args.update != nullptr || args.grad_update != nullptr;
  int32_t last = 0;
  for (int64_t s = 0; s <= args.segments; ++s) {
    if (args.cumulative[s] < last || args.cumulative[s] > args.rows)
      throw std::invalid_argument("cu_segments: expected non-decreasing values within the rows");
    last = args.cumulative[s];
  }
}

void bind_pool(py::module_& m) {
  using Args = flmoe::PoolArgs;
  bind(m, "pool_forward", &flmoe::Kernels::pool_forward, complete_pool, &Args::residual,
       &Args::update, &Args::cumulative, &Args::dropout, &Args::out, &Args::experts, &Args::views,
       &Args::rows, &Args::segments, &Args::width, &Args::threads);
  bind(m, "pool_backward", &flmoe::Kernels::pool_backward, complete_pool, &Args::grad_out,
       &Args::cumulative, &Args::dropout, &Args::grad_residual, &Args::grad_update, &Args::experts,
       &Args::views, &Args::rows, &Args::segments, &Args::width, &Args::threads);
}

void bind_views(py::module_& m) {
  using Args = flmoe::ViewsArgs;
  for (const auto& [name, kernel] : {std::pair("views_forward", &flmoe::Kernels::views_forward),
                                     std::pair("views_backward", &flmoe::Kernels::views_backward)})
    bind(m, name, kernel, as_given, &Args::x, &Args::modality, &Args::out, &Args::experts,
         &Args::views, &Args::rows, &Args::width, &Args::threads);
}

void expect_rows(const flmoe::EncoderInference& args) {
  const int64_t each = args.samples > 0 ? args.segments / args.samples : 0;
  if (args.segments != each * args.samples || (args.samples > 0 && each == 0))
    throw std::invalid_argument(
        "cu_segments: expected a multiple of the number of samples, at least one each");
  int32_t end = 0;
  for (int64_t s = 0; s <= args.segments; ++s) {
    if (args.cu_segments[s] < end || args.cu_segments[s] > args.rows_total)
      throw std::invalid_argument("cu_segments: expected non-decreasing values within the rows");
    end = args.cu_segments[s];
    if (each > 0 && s % each == 0 && args.cu_samples[s / each] != end)
      throw std::invalid_argument("cu_samples: expected boundaries of cu_segments");
  }
  for (int64_t r = 0; args.index != nullptr && r < end; ++r)
    if (args.index[r] < 0 || args.index[r] >= args.table)
      throw std::invalid_argument("index: expected rows of the table");
}

// sizes = (row_sets, table, rows_total, samples, segments, experts, layers, width, hidden, heads)
void bind_inference(py::module_& m) {
  m.def("encoder_inference",
        [](int dtype, Address rows, Address index, Address cu_samples, Address cu_segments,
           const std::vector<Address>& weights, Address out, const std::array<int64_t, 10>& sizes,
           double eps, bool self_residual, int threads) {
          flmoe::EncoderInference args{};
          args.rows = pointer(rows), args.index = pointer<const int64_t>(index);
          args.cu_samples = pointer<const int32_t>(cu_samples);
          args.cu_segments = pointer<const int32_t>(cu_segments);
          args.weights = reinterpret_cast<const void* const*>(weights.data());
          args.out = pointer(out);
          args.row_sets = sizes[0], args.table = sizes[1], args.rows_total = sizes[2];
          args.samples = sizes[3], args.segments = sizes[4], args.experts = sizes[5];
          args.layers = sizes[6], args.width = sizes[7], args.hidden = sizes[8];
          args.heads = sizes[9];
          args.eps = eps, args.self_residual = self_residual, args.threads = threads;
          expect_rows(args);
          run(&flmoe::Kernels::encoder_inference, dtype, args);
        });
}

}  // namespace

void bind_encoder(py::module_& m) {
  bind_linear(m);
  bind_norm(m);
  bind_mlp(m);
  bind_pool(m);
  bind_views(m);
  bind_inference(m);
}

}  // namespace flmoe::bindings
