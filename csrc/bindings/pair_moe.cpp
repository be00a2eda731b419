#include "bindings/pair_args.h"

namespace flmoe::bindings {
void bind_pair_moe(py::module_& m) {
  using Sizes = PairSizes;
  using Kinds = std::vector<int>;
  m.def("pair_forward",
        [](int dtype, const py::tuple& tensors, const Sizes& sizes, const Kinds& kinds,
           int64_t top_k, double scale, int threads, int reduce, Address y, Address mass) {
          const flmoe::PairForward args{pair_args(tensors, sizes, kinds, top_k, scale, threads),
                                        pair_reduce(reduce), pointer(y), pointer(mass)};
          run(&flmoe::Kernels::pair_forward, dtype, args);
        });
  m.def("pair_backward",
        [](int dtype, const py::tuple& tensors, const Sizes& sizes, const Kinds& kinds,
           int64_t top_k, double scale, int threads, int reduce, const py::tuple& grad_y,
           Address grad_mass, Address grad_q, Address grad_k, Address grad_a, Address grad_c,
           Address grad_bias, bool fresh) {
          const flmoe::PairBackward args{pair_args(tensors, sizes, kinds, top_k, scale, threads),
                                         pair_reduce(reduce),
                                         view(grad_y),
                                         pointer(grad_mass),
                                         pointer(grad_q),
                                         pointer(grad_k),
                                         pointer(grad_a),
                                         pointer(grad_c),
                                         pointer(grad_bias),
                                         fresh};
          run(&flmoe::Kernels::pair_backward, dtype, args);
        });
  m.def("pair_candidates", [](const Sizes& sizes, int64_t count) {
    if (count < 1) throw std::invalid_argument("count: expected 1 or more");
    flmoe::PairArgs args{};
    args.batch = sizes[0], args.experts = sizes[1], args.rows = sizes[2], args.columns = sizes[3];
    return flmoe::pair_candidates(args, count) * int64_t(sizeof(flmoe::PairCandidate));
  });
  m.def("pair_map",
        [](int dtype, const py::tuple& tensors, const Sizes& sizes, const Kinds& kinds,
           int64_t top_k, double scale, int threads, const py::tuple& head, Address map) {
          flmoe::PairScores args{};
          args.in = pair_args(tensors, sizes, kinds, top_k, scale, threads);
          args.head = view(head), args.map = pointer(map);
          run(&flmoe::Kernels::pair_map, dtype, args);
        });
  m.def("pair_top", [](int dtype, const py::tuple& tensors, const Sizes& sizes, const Kinds& kinds,
                       int64_t top_k, double scale, int threads, const py::tuple& head,
                       int64_t count, Address values, Address i, Address j, Address candidates) {
    flmoe::PairScores args{};
    args.in = pair_args(tensors, sizes, kinds, top_k, scale, threads);
    args.head = view(head), args.count = count, args.values = pointer(values);
    args.i = pointer<int64_t>(i), args.j = pointer<int64_t>(j);
    args.candidates = pointer(candidates);
    run(&flmoe::Kernels::pair_top, dtype, args);
  });
}

}  // namespace flmoe::bindings
