// pair_moe on a GPU. Without CUDA in the build nothing is bound here.
#if defined(FLMOE_HAVE_CUDA)
#include "cuda/pair_moe.h"

#include "bindings/cuda_queue.h"
#include "bindings/pair_args.h"

namespace flmoe::bindings {
namespace {

using Memory = std::array<int64_t, 2>;  // address, bytes

void* workspace(const Memory& given, int64_t bytes) {
  if (given[1] < bytes || given[0] % 16 != 0)
    throw std::invalid_argument(
        "workspace: expected the bytes of cuda_pair_workspace, aligned to 16");
  return pointer(static_cast<Address>(given[0]));
}

}  // namespace

void bind_pair_moe_cuda(py::module_& m) {
  using Kinds = std::vector<int>;
  // Bytes of the workspaces of the forward, the backward and the map.
  m.def("cuda_pair_workspace",
        [](int dtype, const PairSizes& sizes, const Kinds& kinds, int reduce) {
          const py::tuple none = py::make_tuple(0, 0, 0, 0);
          const py::tuple tensors = py::make_tuple(none, none, none, none, 0, 0, 0);
          PairForward forward{};
          PairBackward backward{};
          PairScores map{};
          forward.in = backward.in = map.in = pair_args(tensors, sizes, kinds, 1, 1.0, 1);
          forward.reduce = backward.reduce = pair_reduce(reduce);
          const DType type = dtype_of(dtype);
          return py::make_tuple(cuda::pair_forward_workspace(type, forward),
                                cuda::pair_backward_workspace(type, backward),
                                cuda::pair_map_workspace(type, map));
        });
  m.def("cuda_pair_forward", [](int dtype, const py::tuple& tensors, const PairSizes& sizes,
                                const Kinds& kinds, int64_t top_k, double scale, int reduce,
                                Address y, Address mass, const Memory& memory, const Queue& queue) {
    const PairForward args{pair_args(tensors, sizes, kinds, top_k, scale, 1), pair_reduce(reduce),
                           pointer(y), pointer(mass)};
    const DType type = dtype_of(dtype);
    void* const data = workspace(memory, cuda::pair_forward_workspace(type, args));
    check_cuda(cuda::pair_forward(type, args, data, place(queue)));
  });
  m.def("cuda_pair_backward",
        [](int dtype, const py::tuple& tensors, const PairSizes& sizes, const Kinds& kinds,
           int64_t top_k, double scale, int reduce, const py::tuple& grad_y, Address grad_mass,
           const std::array<Address, 5>& grads, const Memory& memory, const Queue& queue) {
          const PairBackward args{pair_args(tensors, sizes, kinds, top_k, scale, 1),
                                  pair_reduce(reduce),
                                  view(grad_y),
                                  pointer(grad_mass),
                                  pointer(grads[0]),
                                  pointer(grads[1]),
                                  pointer(grads[2]),
                                  pointer(grads[3]),
                                  pointer(grads[4]),
                                  true};
          const DType type = dtype_of(dtype);
          void* const data = workspace(memory, cuda::pair_backward_workspace(type, args));
          check_cuda(cuda::pair_backward(type, args, data, place(queue)));
        });
  m.def("cuda_pair_map",
        [](int dtype, const py::tuple& tensors, const PairSizes& sizes, const Kinds& kinds,
           int64_t top_k, double scale, const py::tuple& head, Address map,
           const std::array<int64_t, 2>& rows, const Memory& memory, const Queue& queue) {
          PairScores args{};
          args.in = pair_args(tensors, sizes, kinds, top_k, scale, 1);
          args.head = view(head), args.map = pointer(map);
          if (rows[0] < 0 || rows[0] >= rows[1] || rows[1] > args.in.rows)
            throw std::invalid_argument("rows: expected a range of rows");
          const DType type = dtype_of(dtype);
          void* const data = workspace(memory, cuda::pair_map_workspace(type, args));
          check_cuda(cuda::pair_map(type, args, {rows[0], rows[1]}, data, place(queue)));
        });
}

}  // namespace flmoe::bindings
#endif
