// The Python border: addresses, sizes and strides in, nothing of torch. The Python side has
// validated everything before it calls; what is checked here again is what a wrong call would
// corrupt memory with.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

using flmoe::DType;
using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

DType dtype_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("dtype: expected a code from 0 to 3");
  return static_cast<DType>(code);
}

// (address, group stride, row stride, head stride)
flmoe::RowView view(const py::tuple& t) {
  return {pointer(t[0].cast<Address>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>()};
}

flmoe::DropoutSpec dropout(Address seed, int64_t threshold) {
  if (threshold < 65536 && seed == 0) throw std::invalid_argument("seed: expected an address");
  return {pointer<const int64_t>(seed), static_cast<uint32_t>(threshold)};
}

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

std::array<int64_t, 5> five(const py::tuple& t) {
  return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
          t[4].cast<int64_t>()};
}

template <typename F>
void without_gil(const F& body) {
  py::gil_scoped_release release;
  body();
}

void bind_attention(py::module_& m) {
  m.def("attention_forward", [](int dtype, const py::tuple& q, const py::tuple& k,
                                const py::tuple& v, Address cumulative, const py::tuple& sizes,
                                double scale, Address seed, int64_t threshold, Address out,
                                Address lse, int threads) {
    const auto args =
        attention_args(q, k, v, cumulative, five(sizes), scale, seed, threshold, out, lse, threads);
    const DType type = dtype_of(dtype);
    without_gil([&] { flmoe::active_kernels().attention_forward(type, args); });
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
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().attention_backward(type, args); });
        });
}

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

flmoe::GeluArgs gelu_args(Address x, Address grad_out, Address out, Address seed, int64_t threshold,
                          int64_t experts, int64_t rows, int64_t width, int threads) {
  return {
      pointer(x), pointer(grad_out), pointer(out), dropout(seed, threshold), experts, rows, width,
      threads};
}

void bind_gelu(py::module_& m) {
  m.def("gelu_forward", [](int dtype, Address x, Address out, Address seed, int64_t threshold,
                           int64_t experts, int64_t rows, int64_t width, int threads) {
    const auto args = gelu_args(x, 0, out, seed, threshold, experts, rows, width, threads);
    const DType type = dtype_of(dtype);
    without_gil([&] { flmoe::active_kernels().gelu_forward(type, args); });
  });
  m.def("gelu_backward",
        [](int dtype, Address x, Address grad_out, Address grad_x, Address seed, int64_t threshold,
           int64_t experts, int64_t rows, int64_t width, int threads) {
          const auto args =
              gelu_args(x, grad_out, grad_x, seed, threshold, experts, rows, width, threads);
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().gelu_backward(type, args); });
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
      throw std::invalid_argument("cu_segments: expected values that never decrease within rows");
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

void bind_losses(py::module_& m) {
  m.def("loss_forward", [](int dtype, Address latents, Address losses, int64_t experts,
                           int64_t views, int64_t batch, int64_t width, int threads) {
    const flmoe::LossArgs args{
        pointer(latents), nullptr, pointer(losses), nullptr, experts, views, batch, width, threads};
    const DType type = dtype_of(dtype);
    without_gil([&] { flmoe::active_kernels().loss_forward(type, args); });
  });
  m.def("loss_backward",
        [](int dtype, Address latents, Address grad_losses, Address grad_latents, int64_t experts,
           int64_t views, int64_t batch, int64_t width, int threads) {
          const flmoe::LossArgs args{pointer(latents),
                                     pointer(grad_losses),
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

// tensors = (q, k, a, c) views and the addresses of gate_bias, mask_a, mask_b;
// sizes = (batch, experts, rows, columns, rank, width).
flmoe::PairArgs pair_args(const py::tuple& tensors, const std::array<int64_t, 6>& sizes,
                          const std::vector<int>& kinds, int64_t top_k, double scale, int threads) {
  flmoe::PairArgs args{};
  args.q = view(tensors[0]), args.k = view(tensors[1]);
  args.a = view(tensors[2]), args.c = view(tensors[3]);
  args.gate_bias = pointer(tensors[4].cast<Address>());
  args.mask_a = pointer<const uint8_t>(tensors[5].cast<Address>());
  args.mask_b = pointer<const uint8_t>(tensors[6].cast<Address>());
  args.batch = sizes[0], args.experts = sizes[1], args.rows = sizes[2], args.columns = sizes[3];
  args.rank = sizes[4], args.width = sizes[5];
  if (args.experts < 1 || args.experts > 8 || kinds.size() != static_cast<size_t>(args.experts))
    throw std::invalid_argument("kinds: expected one for each of 1 to 8 experts");
  for (size_t e = 0; e < kinds.size(); ++e) {
    if (kinds[e] < 0 || kinds[e] > 4)
      throw std::invalid_argument("kinds: expected codes from 0 to 4");
    args.kinds[e] = kinds[e];
  }
  args.top_k = top_k, args.scale = scale, args.threads = threads;
  return args;
}

flmoe::PairReduce pair_reduce(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("reduce: expected a code from 0 to 2");
  return static_cast<flmoe::PairReduce>(code);
}

void bind_pairs(py::module_& m) {
  using Sizes = std::array<int64_t, 6>;
  using Kinds = std::vector<int>;
  m.def("pair_forward",
        [](int dtype, const py::tuple& tensors, const Sizes& sizes, const Kinds& kinds,
           int64_t top_k, double scale, int threads, int reduce, Address y, Address mass) {
          const flmoe::PairForward args{pair_args(tensors, sizes, kinds, top_k, scale, threads),
                                        pair_reduce(reduce), pointer(y), pointer(mass)};
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().pair_forward(type, args); });
        });
  m.def("pair_backward", [](int dtype, const py::tuple& tensors, const Sizes& sizes,
                            const Kinds& kinds, int64_t top_k, double scale, int threads,
                            int reduce, const py::tuple& grad_y, Address grad_mass, Address grad_q,
                            Address grad_k, Address grad_a, Address grad_c, Address grad_bias) {
    const flmoe::PairBackward args{pair_args(tensors, sizes, kinds, top_k, scale, threads),
                                   pair_reduce(reduce),
                                   view(grad_y),
                                   pointer(grad_mass),
                                   pointer(grad_q),
                                   pointer(grad_k),
                                   pointer(grad_a),
                                   pointer(grad_c),
                                   pointer(grad_bias)};
    const DType type = dtype_of(dtype);
    without_gil([&] { flmoe::active_kernels().pair_backward(type, args); });
  });
  m.def("pair_map",
        [](int dtype, const py::tuple& tensors, const Sizes& sizes, const Kinds& kinds,
           int64_t top_k, double scale, int threads, const py::tuple& head, Address map) {
          flmoe::PairScores args{};
          args.in = pair_args(tensors, sizes, kinds, top_k, scale, threads);
          args.head = view(head), args.map = pointer(map);
          const DType type = dtype_of(dtype);
          without_gil([&] { flmoe::active_kernels().pair_map(type, args); });
        });
  m.def("pair_top", [](int dtype, const py::tuple& tensors, const Sizes& sizes, const Kinds& kinds,
                       int64_t top_k, double scale, int threads, const py::tuple& head,
                       int64_t count, Address values, Address i, Address j) {
    flmoe::PairScores args{};
    args.in = pair_args(tensors, sizes, kinds, top_k, scale, threads);
    args.head = view(head), args.count = count, args.values = pointer(values);
    args.i = pointer<int64_t>(i), args.j = pointer<int64_t>(j);
    const DType type = dtype_of(dtype);
    without_gil([&] { flmoe::active_kernels().pair_top(type, args); });
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "Native CPU kernels of flmoe_kernels; called through its Python operators only.";
  m.def("instruction_set", [] { return flmoe::active_instruction_set(); });
  m.def("instruction_set_runs", [](const char* name) { return flmoe::instruction_set_runs(name); });
  m.def("parallel_pool", [] { return flmoe::parallel_pool(); });
  m.def("advise_huge",
        [](Address data, int64_t bytes) { flmoe::advise_huge(pointer(data), bytes); });
  bind_attention(m);
  bind_linear(m);
  bind_norm(m);
  bind_gelu(m);
  bind_pool(m);
  bind_views(m);
  bind_losses(m);
  bind_pairs(m);
}
