// Routing on the CPU and on a GPU, the GPU's launch plan, and its simulation on the host. Without
// CUDA in the build, the functions that need it are missing; cuda_build gives the reason.
#include "common/routing.h"
#include "bindings/border.h"
#include "bindings/cuda_queue.h"
#include "cpu/routing_twin.h"
#include "cuda_build.h"

#if defined(FLMOE_HAVE_CUDA)
#include "cuda/routing.h"
#endif

namespace flmoe::bindings {
namespace {

// Rows and experts are counted in 32 bits.
void require_countable(int64_t rows, int64_t experts) {
  if (rows < 0 || rows > INT32_MAX) throw std::invalid_argument("rows: expected 0 to 2^31 - 1");
  if (experts < 1 || experts >= INT32_MAX)
    throw std::invalid_argument("experts: expected 1 to 2^31 - 2");
}

using GateSizes = std::array<int64_t, 3>;  // tokens, experts, top_k

flmoe::GateArgs gate_args(const std::array<Address, 3>& tensors, const GateSizes& sizes,
                          bool over_all, int threads = 1) {
  if (sizes[0] < 0 || sizes[2] < 1 || sizes[2] > sizes[1])
    throw std::invalid_argument("top_k: expected 1 to experts");
  require_countable(sizes[0], sizes[1]);
  require_countable(sizes[0] * sizes[2], sizes[1]);
  return {pointer(tensors[0]),
          pointer<int64_t>(tensors[1]),
          pointer(tensors[2]),
          sizes[0],
          sizes[1],
          sizes[2],
          over_all,
          threads};
}

using LimitSizes = std::array<int64_t, 3>;  // tokens, top_k, experts

// tensors = addresses of (index, mask, kept)
flmoe::LimitArgs limit_args(const std::array<Address, 3>& tensors, const LimitSizes& sizes,
                            int64_t capacity) {
  require_countable(sizes[0], sizes[2]);
  require_countable(sizes[1], sizes[2]);
  require_countable(sizes[0] * sizes[1], sizes[2]);
  return {pointer<const int64_t>(tensors[0]),
          pointer<const uint8_t>(tensors[1]),
          pointer<int64_t>(tensors[2]),
          sizes[0],
          sizes[1],
          sizes[2],
          capacity};
}

// tensors = addresses of (index, counts, offsets, permutation)
flmoe::DispatchArgs dispatch_args(const std::array<Address, 4>& tensors, int64_t rows,
                                  int64_t experts) {
  require_countable(rows, experts);
  return {pointer<const int64_t>(tensors[0]),
          pointer<int32_t>(tensors[1]),
          pointer<int32_t>(tensors[2]),
          pointer<int32_t>(tensors[3]),
          rows,
          experts};
}

void require_block(int64_t rows_per_block) {
  if (rows_per_block < 0 || rows_per_block % flmoe::kManyThreads != 0)
    throw std::invalid_argument("rows_per_block: expected a multiple of 256");
}

#if defined(FLMOE_HAVE_CUDA)
// counters = (address, number)
using Counters = std::array<int64_t, 2>;

int32_t* counters_of(const Counters& given, int64_t rows, int64_t bins) {
  if (given[1] < flmoe::routing_counters(flmoe::routing_plan(rows, bins), bins))
    throw std::invalid_argument("counters: expected the number that routing_counters returns");
  return pointer<int32_t>(static_cast<Address>(given[0]));
}

void bind_launches(py::module_& m) {
  m.def("cuda_versions", [] {
    const flmoe::cuda::Versions found = flmoe::cuda::versions();
    return py::make_tuple(found.compiler, found.driver);
  });
  m.def("cuda_devices", [] {
    const char* reason;
    const int count = flmoe::cuda::devices(&reason);
    return py::make_tuple(count, reason);
  });
  m.def("cuda_probe", [](int device) {
    flmoe::cuda::Capability found{};
    const char* message = flmoe::cuda::probe(device, &found);
    return py::make_tuple(found.major, found.minor, message == nullptr ? "" : message);
  });
  m.def("cuda_routing_gate", [](int dtype, const std::array<Address, 3>& tensors,
                                const GateSizes& sizes, bool over_all, const Queue& queue) {
    const flmoe::GateArgs args = gate_args(tensors, sizes, over_all);
    check_cuda(flmoe::cuda::gate(dtype_of(dtype), args, place(queue)));
  });
  m.def("cuda_routing_limit", [](const std::array<Address, 3>& tensors, const LimitSizes& sizes,
                                 int64_t capacity, const Counters& counters, const Queue& queue) {
    const flmoe::LimitArgs args = limit_args(tensors, sizes, capacity);
    int32_t* const given =
        capacity < 0 ? nullptr : counters_of(counters, sizes[0] * sizes[1], sizes[2]);
    check_cuda(flmoe::cuda::limit(args, given, place(queue)));
  });
  m.def("cuda_routing_dispatch", [](const std::array<Address, 4>& tensors, int64_t rows,
                                    int64_t experts, const Counters& counters, const Queue& queue) {
    const flmoe::DispatchArgs args = dispatch_args(tensors, rows, experts);
    check_cuda(flmoe::cuda::dispatch(args, counters_of(counters, rows, experts + 1), place(queue)));
  });
}
#endif

}  // namespace

void bind_routing(py::module_& m) {
  m.def("routing_gate", [](int dtype, const std::array<Address, 3>& tensors, const GateSizes& sizes,
                           bool over_all, int threads) {
    const flmoe::GateArgs args = gate_args(tensors, sizes, over_all, threads);
    run(&flmoe::Kernels::routing_gate, dtype, args);
  });
  m.def("routing_limit",
        [](const std::array<Address, 3>& tensors, const LimitSizes& sizes, int64_t capacity) {
          return flmoe::active_kernels().routing_limit(limit_args(tensors, sizes, capacity));
        });
  m.def("routing_dispatch",
        [](const std::array<Address, 4>& tensors, int64_t rows, int64_t experts) {
          return flmoe::active_kernels().routing_dispatch(dispatch_args(tensors, rows, experts));
        });
  // (architectures, reason): one of the two is empty.
  m.def("cuda_build", [] { return py::make_tuple(flmoe::kCudaArchitectures, flmoe::kCudaReason); });
  m.def("routing_counters", [](int64_t rows, int64_t bins) {
    require_countable(rows, bins);
    return flmoe::routing_counters(flmoe::routing_plan(rows, bins), bins);
  });
  m.def("routing_twin_gate", [](int dtype, const std::array<Address, 3>& tensors,
                                const GateSizes& sizes, bool over_all, uint64_t order) {
    return flmoe::twin_gate(dtype_of(dtype), gate_args(tensors, sizes, over_all), order);
  });
  m.def("routing_twin_limit", [](const std::array<Address, 3>& tensors, const LimitSizes& sizes,
                                 int64_t capacity, int64_t rows_per_block, uint64_t order) {
    require_block(rows_per_block);
    return flmoe::twin_limit(limit_args(tensors, sizes, capacity), rows_per_block, order);
  });
  m.def("routing_twin_dispatch", [](const std::array<Address, 4>& tensors, int64_t rows,
                                    int64_t experts, int64_t rows_per_block, uint64_t order) {
    require_block(rows_per_block);
    return flmoe::twin_dispatch(dispatch_args(tensors, rows, experts), rows_per_block, order);
  });
  m.def("routing_twin_race", [](uint64_t order) { return flmoe::twin_race(order); });
  m.def("routing_twin_peek",
        [](bool in_a_warp, int apart) { return flmoe::twin_peek(in_a_warp, apart); });
#if defined(FLMOE_HAVE_CUDA)
  bind_launches(m);
#endif
}

}  // namespace flmoe::bindings
