// Dense layers and MLPs of all experts in bfloat16 by vdpbf16ps; other dtypes run the kernels of
// avx512.
#include "cpu/encoder_linear.h"
#include "cpu/encoder_mlp.h"
#include "cpu/gemm_bf16.h"

namespace flmoe::FLMOE_ISA {
namespace {

// Products of bfloat16 operands with sums in float32.
struct Bf16Dense {
  using T = BFloat16;
  using A = float;
  using E = BFloat16;
  static constexpr int64_t kUnit = kPair;
  static constexpr int64_t kOutBlock = 96;  // more than in float32: each item packs x
  static constexpr int64_t kTokenBlock = 128;

  static void gemm(int64_t m, int64_t n, int64_t depth, const E* a, int64_t a_row, int64_t a_col,
                   const E* b, int64_t b_row, A* c, int64_t c_row, bool add) {
    gemm_bf16<NativeDot>(m, n, pairs_of(depth), a, a_row, a_col, b, b_row, c, c_row, add);
  }

  static void pack(const T* weight, int64_t stride, bool depth_is_rows, int64_t depth,
                   int64_t columns, E* out) {
    if (depth_is_rows)
      pack_depth_rows(weight, stride, depth, columns, kPanel<A>, out);
    else
      pack_depth_columns(weight, stride, depth, columns, kPanel<A>, kPair * kPanel<A>, out);
  }

  static const E* rows(const E* x, int64_t count, int64_t depth, E* out) {
    if (depth % kPair == 0) return x;
    pack_even_rows(x, depth, count, depth, out);
    return out;
  }

  static const E* depth_rows(const E* x, int64_t stride, int64_t depth, int64_t columns,
                             int64_t padded, E* out) {
    pack_depth_rows(x, stride, depth, columns, padded, out);
    return out;
  }
};

}  // namespace

void linear_forward(DType dtype, const LinearArgs& args) {
  if (dtype != DType::kBFloat16) return avx512::kernels().linear_forward(dtype, args);
  batched_rows<Bf16Dense>(args, args.x, false, args.bias, args.out);
}

void linear_backward(DType dtype, const LinearArgs& args) {
  if (dtype != DType::kBFloat16) return avx512::kernels().linear_backward(dtype, args);
  run_linear_backward<Bf16Dense>(args);
}

void mlp_forward(DType dtype, const MlpArgs& args) {
  if (dtype != DType::kBFloat16) return avx512::kernels().mlp_forward(dtype, args);
  Mlp<Bf16Dense>(args, false).forward();
}

void mlp_backward(DType dtype, const MlpArgs& args) {
  if (dtype != DType::kBFloat16) return avx512::kernels().mlp_backward(dtype, args);
  Mlp<Bf16Dense>(args, true).backward();
}

}  // namespace flmoe::FLMOE_ISA
