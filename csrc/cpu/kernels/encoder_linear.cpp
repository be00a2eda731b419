// Dense layers of all experts in one call: out[e] = x[e] weight[e]^T + bias[e].
//
// The weight is packed once per call into column panels as wide as the register tile. An item is a
// block of rows of one expert; it processes all panels, so its rows stay in the L2 cache and a
// panel in L1/L2. The weight gradient reads both operands in place (columns of grad_out are
// contiguous); an item owns a block of its rows and sums over tokens in order, so results do not
// depend on the number of threads. Why not torch's matmul: MKL uses only AVX2 on processors that
// are not Intel's; measurements are in bench/results.
#include "cpu/dense.h"

namespace flmoe::FLMOE_ISA {
namespace {

template <typename T, typename A>
void batched_rows(const T* x, const A* packed, const T* bias, T* out, int64_t experts, int64_t rows,
                  int64_t depth, int64_t columns, int threads) {
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  const int64_t each = packed_size<A>(depth, columns);
  parallel_for(experts * blocks, threads, [&](int64_t item, int) {
    const int64_t e = item / blocks, row0 = item % blocks * kRowBlock;
    const int64_t first = e * rows + row0;
    rows_times_panels<T, T, A>(
        x + first * depth, min64(kRowBlock, rows - row0), depth, packed + e * each, columns,
        bias == nullptr ? nullptr : bias + e * columns, out + first * columns);
  });
}

}  // namespace

void linear_forward(DType dtype, const LinearArgs& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    const Buffer<A> packed(args.experts * packed_size<A>(args.in_width, args.out_width));
    pack_all<T, A>(static_cast<const T*>(args.weight), args.experts, args.in_width * args.out_width,
                   args.in_width, args.out_width, 1, args.in_width, args.threads, packed);
    batched_rows<T, A>(static_cast<const T*>(args.x), packed, static_cast<const T*>(args.bias),
                       static_cast<T*>(args.out), args.experts, args.rows, args.in_width,
                       args.out_width, args.threads);
  });
}

void linear_backward(DType dtype, const LinearArgs& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    if (args.grad_x != nullptr) {
      const Buffer<A> packed(args.experts * packed_size<A>(args.out_width, args.in_width));
      pack_all<T, A>(static_cast<const T*>(args.weight), args.experts,
                     args.in_width * args.out_width, args.out_width, args.in_width, args.in_width,
                     1, args.threads, packed);
      batched_rows<T, A>(static_cast<const T*>(args.grad_out), packed, nullptr,
                         static_cast<T*>(args.grad_x), args.experts, args.rows, args.out_width,
                         args.in_width, args.threads);
    }
    if (args.grad_weight != nullptr || args.grad_bias != nullptr) {
      const int64_t blocks = (args.out_width + kOutBlock - 1) / kOutBlock;
      parallel_for(args.experts * blocks, args.threads, [&](int64_t item, int) {
        WeightGradient<T, T, T, A>(args, item / blocks, item % blocks).run();
      });
    }
  });
}

}  // namespace flmoe::FLMOE_ISA
