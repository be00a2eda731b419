// Fusion encoders without gradients in bfloat16 by vdpbf16ps; other dtypes run the kernel of
// avx512.
#include "cpu/encoder_inference.h"

#include "cpu/gemm_bf16.h"

namespace flmoe::FLMOE_ISA {
namespace {

// Products of bfloat16 operands with sums in float32. Residuals, norms and softmax are in float32.
struct Bf16Product {
  using A = float;
  using E = BFloat16;
  static constexpr int64_t kUnit = kPair;

  static void gemm(int64_t m, int64_t n, int64_t depth, const E* a, int64_t a_row, const E* b,
                   int64_t b_row, A* c, int64_t c_row, bool add) {
    flmoe::FLMOE_ISA::gemm<NativeDot>(m, n, depth / kPair, a, a_row, kPair, b, kPair * b_row, c,
                                      c_row, add);
  }

  template <typename T>
  static void pack_panel(const T* weight, int64_t depth, int64_t columns, E* out) {
    pack_depth_columns(weight, depth, depth, columns, kPanel<A>, kPair * kPanel<A>, out);
  }

  static const E* operand(const A* x, int64_t row, int64_t count, E* out) {
    write_row<E, A>(x, out, count * row);
    return out;
  }

  static void put_keys(const E* rows, int64_t row, int64_t count, int64_t depth, E* k,
                       int64_t key_row) {
    pack_depth_columns(rows, row, depth, count, round_up(count, kLanes<A>), kPair * key_row, k);
  }

  static void put_values(const E* rows, int64_t row, int64_t count, int64_t depth, E* v) {
    pack_depth_rows(rows, row, count, depth, row, v);
  }
};

}  // namespace

void encoder_inference(DType dtype, const EncoderInference& args) {
  if (dtype != DType::kBFloat16) return avx512::kernels().encoder_inference(dtype, args);
  if (args.samples > 0) Inference<BFloat16, Bf16Product>(args).run();
}

}  // namespace flmoe::FLMOE_ISA
