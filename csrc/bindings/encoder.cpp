#include "bindings/border.h"

namespace flmoe::bindings {
namespace {

void bind_linear(py::module_& m) {
  m.def("linear_forward",
        [](int dtype, Address x, Address weight, Address bias, Address out, int64_t experts,
           int64_t rows, int64_t in_width, int64_t out_width, int threads) {
          flmoe::LinearArgs args{};
          args.x = pointer(x), args.weight = pointer(weight), args.bias = pointer(bias);
          args.out = pointer(out);
          args.experts = experts, args.rows = rows, args.in_width = in_width;
          args.out_width = out_width, args.threads = threads;
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().linear_forward(type, args); });
        });
  m.def("linear_backward",
        [](int dtype, Address x, Address weight, Address grad_out, Address grad_x,
           Address grad_weight, Address grad_bias, int64_t experts, int64_t rows, int64_t in_width,
           int64_t out_width, int threads) {
          flmoe::LinearArgs args{};
          args.x = pointer(x), args.weight = pointer(weight), args.grad_out = pointer(grad_out);
          args.grad_x = pointer(grad_x), args.grad_weight = pointer(grad_weight);
          args.grad_bias = pointer(grad_bias);
          args.experts = experts, args.rows = rows, args.in_width = in_width;
          args.out_width = out_width, args.threads = threads;
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().linear_backward(type, args); });
        });
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
  m.def("norm_forward",
        [](int dtype, Address residual, Address update, Address gain, Address shift, double eps,
           Address seed, int64_t threshold, bool self_residual, Address sum, Address normed,
           Address mean, Address rstd, int64_t experts, int64_t rows, int64_t width, int threads) {
          flmoe::NormArgs args{};
          args.residual = pointer(residual), args.update = pointer(update);
          args.gain = pointer(gain), args.shift = pointer(shift), args.eps = eps;
          args.dropout = dropout(seed, threshold), args.self_residual = self_residual;
          args.sum = pointer(sum), args.normed = pointer(normed);
          args.mean = pointer(mean), args.rstd = pointer(rstd);
          args.experts = experts, args.rows = rows, args.width = width, args.threads = threads;
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().norm_forward(type, args); });
        });
  m.def("norm_backward",
        [](int dtype, Address sum, Address mean, Address rstd, Address gain, Address seed,
           int64_t threshold, bool self_residual, Address grad_sum, Address grad_normed,
           Address grad_residual, Address grad_update, Address grad_gain, Address grad_shift,
           int64_t experts, int64_t rows, int64_t width, int threads) {
          flmoe::NormArgs args{};
          args.sum = pointer(sum), args.mean = pointer(mean), args.rstd = pointer(rstd);
          args.gain = pointer(gain), args.dropout = dropout(seed, threshold);
          args.self_residual = self_residual;
          args.grad_sum = pointer(grad_sum), args.grad_normed = pointer(grad_normed);
          args.grad_residual = pointer(grad_residual), args.grad_update = pointer(grad_update);
          args.grad_gain = pointer(grad_gain), args.grad_shift = pointer(grad_shift);
          args.experts = experts, args.rows = rows, args.width = width, args.threads = threads;
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().norm_backward(type, args); });
        });
}

// sizes = (experts, rows, in_width, hidden_width, out_width)
flmoe::MlpArgs mlp_args(Address x, Address w_in, Address w_out, Address seed, int64_t threshold,
                        Address hidden, const py::tuple& sizes, int threads) {
  flmoe::MlpArgs args{};
  args.x = pointer(x), args.w_in = pointer(w_in), args.w_out = pointer(w_out);
  args.dropout = dropout(seed, threshold), args.hidden = pointer(hidden);
  const auto size = five(sizes);
  args.experts = size[0], args.rows = size[1], args.in_width = size[2];
  args.hidden_width = size[3], args.out_width = size[4], args.threads = threads;
  return args;
}

void bind_mlp(py::module_& m) {
  m.def("mlp_forward", [](int dtype, Address x, Address w_in, Address w_out, Address b_in,
                          Address b_out, Address seed, int64_t threshold, Address hidden,
                          Address out, const py::tuple& sizes, int threads) {
    auto args = mlp_args(x, w_in, w_out, seed, threshold, hidden, sizes, threads);
    args.b_in = pointer(b_in), args.b_out = pointer(b_out), args.out = pointer(out);
    const DType type = dtype_of(dtype);
    without_gil([&] { flmoe::active_kernels().mlp_forward(type, args); });
  });
  m.def("mlp_backward",
        [](int dtype, Address x, Address w_in, Address w_out, Address seed, int64_t threshold,
           Address hidden, Address grad_out, Address grad_x, Address grad_w_in, Address grad_b_in,
           Address grad_w_out, Address grad_b_out, const py::tuple& sizes, int threads) {
          auto args = mlp_args(x, w_in, w_out, seed, threshold, hidden, sizes, threads);
          args.grad_out = pointer(grad_out), args.grad_x = pointer(grad_x);
          args.grad_w_in = pointer(grad_w_in), args.grad_b_in = pointer(grad_b_in);
          args.grad_w_out = pointer(grad_w_out), args.grad_b_out = pointer(grad_b_out);
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().mlp_backward(type, args); });
        });
}

// sizes = (experts, views, rows, segments, width)
flmoe::PoolArgs pool_args(Address cumulative, bool has_update, Address seed, int64_t threshold,
                          const std::array<int64_t, 5>& sizes, int threads) {
  flmoe::PoolArgs args{};
  args.cumulative = pointer<const int32_t>(cumulative);
  args.has_update = has_update, args.dropout = dropout(seed, threshold);
  args.experts = sizes[0], args.views = sizes[1], args.rows = sizes[2];
  args.segments = sizes[3], args.width = sizes[4], args.threads = threads;
  int32_t last = 0;
  for (int64_t s = 0; s <= args.segments; ++s) {
    if (args.cumulative[s] < last || args.cumulative[s] > args.rows)
      throw std::invalid_argument("cu_segments: expected non-decreasing values within the rows");
    last = args.cumulative[s];
  }
  return args;
}

void bind_pool(py::module_& m) {
  m.def("pool_forward",
        [](int dtype, Address residual, Address update, Address cumulative, Address seed,
           int64_t threshold, Address out, const py::tuple& sizes, int threads) {
          auto args = pool_args(cumulative, update != 0, seed, threshold, five(sizes), threads);
          args.residual = pointer(residual), args.update = pointer(update), args.out = pointer(out);
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().pool_forward(type, args); });
        });
  m.def("pool_backward", [](int dtype, Address grad_out, Address cumulative, Address seed,
                            int64_t threshold, Address grad_residual, Address grad_update,
                            const py::tuple& sizes, int threads) {
    auto args = pool_args(cumulative, grad_update != 0, seed, threshold, five(sizes), threads);
    args.grad_out = pointer(grad_out), args.grad_residual = pointer(grad_residual);
    args.grad_update = pointer(grad_update);
    const DType type = dtype_of(dtype);
    without_gil([&] { flmoe::active_kernels().pool_backward(type, args); });
  });
}

void bind_views(py::module_& m) {
  using Kernel = void (*flmoe::Kernels::*)(DType, const flmoe::ViewsArgs&);
  const auto bind = [&m](const char* name, Kernel kernel) {
    m.def(name, [kernel](int dtype, Address x, Address modality, Address out, int64_t experts,
                         int64_t views, int64_t rows, int64_t width, int threads) {
      const flmoe::ViewsArgs args{
          pointer(x), pointer<const int32_t>(modality), pointer(out), experts, views, rows, width,
          threads};
      const DType type = dtype_of(dtype);
      without_gil([&] { (flmoe::active_kernels().*kernel)(type, args); });
    });
  };
  bind("views_forward", &flmoe::Kernels::views_forward);
  bind("views_backward", &flmoe::Kernels::views_backward);
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
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().encoder_inference(type, args); });
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
