#include "cpu/encoder_inference.h"

namespace flmoe::FLMOE_ISA {
namespace {

// Products in the compute type.
template <typename Type>
struct PlainProduct {
  using A = Type;
  using E = Type;
  static constexpr int64_t kUnit = 1;

  static void gemm(int64_t m, int64_t n, int64_t depth, const E* a, int64_t a_row, const E* b,
                   int64_t b_row, A* c, int64_t c_row, bool add) {
    flmoe::FLMOE_ISA::gemm<A>(m, n, depth, a, a_row, 1, b, b_row, c, c_row, add);
  }

  template <typename T>
  static void pack_panel(const T* weight, int64_t depth, int64_t columns, E* out) {
    flmoe::FLMOE_ISA::pack_panel<T, A>(weight, 1, depth, depth, columns, out);
  }

  static const E* operand(const A* x, int64_t, int64_t, E*) { return x; }

  // rows (count, row) to columns of k.
  static void put_keys(const E* rows, int64_t row, int64_t count, int64_t depth, E* k,
                       int64_t key_row) {
    int64_t r = 0;
    if constexpr (kHasTranspose) {
      for (; r + kLanes<A> <= count; r += kLanes<A>)
        for (int64_t d = 0; d < depth; d += kLanes<A>) {
          Vec<A> square[kLanes<A>];
          for (int64_t i = 0; i < kLanes<A>; ++i) square[i] = load(rows + (r + i) * row + d);
          transpose_square<A>(square);
          for (int64_t i = 0; i < min64(kLanes<A>, depth - d); ++i)
            store(k + (d + i) * key_row + r, square[i]);
        }
    }
    for (; r < count; ++r)
      for (int64_t d = 0; d < depth; ++d) k[d * key_row + r] = rows[r * row + d];
  }

  static void put_values(const E* rows, int64_t row, int64_t count, int64_t, E* v) {
    std::memcpy(v, rows, count * row * sizeof(E));
  }
};

}  // namespace

void encoder_inference(DType dtype, const EncoderInference& args) {
  with_dtype(dtype, [&]<typename T>() {
    using Product = PlainProduct<typename Compute<T>::Type>;
    if (args.samples > 0) Inference<T, Product>(args).run();
  });
}

}  // namespace flmoe::FLMOE_ISA
