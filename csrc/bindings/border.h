// Helpers of the Python bindings, which take addresses, sizes and strides and do not use torch. The
// Python side validates all arguments; values that could corrupt memory are checked here again.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace flmoe::bindings {

namespace py = pybind11;
using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

inline DType dtype_of(int code) {
  if (code < 0 || code > 3) throw std::invalid_argument("dtype: expected a code from 0 to 3");
  return static_cast<DType>(code);
}

// (address, group stride, row stride, head stride)
inline flmoe::RowView view(const py::tuple& t) {
  return {pointer(t[0].cast<Address>()), t[1].cast<int64_t>(), t[2].cast<int64_t>(),
          t[3].cast<int64_t>()};
}

inline flmoe::DropoutSpec dropout(Address seed, int64_t threshold) {
  if (threshold < 65536 && seed == 0) throw std::invalid_argument("seed: expected an address");
  return {pointer<const int64_t>(seed), static_cast<uint32_t>(threshold)};
}

inline std::array<int64_t, 5> five(const py::tuple& t) {
  return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>(), t[3].cast<int64_t>(),
          t[4].cast<int64_t>()};
}

// Runs a kernel without the GIL, so that other Python threads can run.
template <typename F>
void without_gil(const F& body) {
  py::gil_scoped_release release;
  body();
}

// Runs a kernel of the active instruction set.
template <typename Args>
void run(void (*flmoe::Kernels::*kernel)(DType, const Args&), int dtype, const Args& args) {
  const DType type = dtype_of(dtype);
  without_gil([&] { (flmoe::active_kernels().*kernel)(type, args); });
}

// Type in which Python passes a field of a kernel's arguments.
template <typename T>
struct Passed {
  using Type = T;
  static T field(T x) { return x; }
};
template <typename T>
struct Passed<T*> {
  using Type = Address;
  static T* field(Address address) { return pointer<T>(address); }
};
template <>
struct Passed<flmoe::DropoutSpec> {
  using Type = std::pair<Address, int64_t>;  // seed, threshold
  static flmoe::DropoutSpec field(const Type& x) { return dropout(x.first, x.second); }
};

// Binds a kernel to a function of the dtype and these fields of its arguments; the others are 0.
// `complete` checks the arguments, or fills in what follows from them.
template <typename Args, typename F, typename... T>
void bind(py::module_& m, const char* name, void (*flmoe::Kernels::*kernel)(DType, const Args&),
          const F& complete, T Args::*... fields) {
  m.def(name, [=](int dtype, typename Passed<T>::Type... values) {
    Args args{};
    ((args.*fields = Passed<T>::field(values)), ...);
    complete(args);
    run(kernel, dtype, args);
  });
}

void bind_expert_attention(py::module_& m);
void bind_encoder(py::module_& m);
void bind_interaction_losses(py::module_& m);
void bind_pair_moe(py::module_& m);
void bind_pair_moe_cuda(py::module_& m);
void bind_routing(py::module_& m);
void bind_routed_mlp(py::module_& m);
void bind_snapshot(py::module_& m);

}  // namespace flmoe::bindings
