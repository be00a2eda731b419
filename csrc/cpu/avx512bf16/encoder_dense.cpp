// Dense layers and MLPs of all experts in bfloat16 by vdpbf16ps; other dtypes run the kernels of
// avx512.
#include "cpu/encoder_linear.h"
#include "cpu/encoder_mlp.h"
#include "cpu/gemm_bf16.h"

namespace flmoe::FLMOE_ISA {
namespace {

// Products of bfloat16 operands with sums in float32.
struct Bf16Dense : Bf16Operands {
  static constexpr int64_t kOutBlock = 96;  // more than in float32: each item packs x
  static constexpr int64_t kTokenBlock = 128;

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
