// What a kernel file offers: one table of entry points per instruction set. Plain pointers and
// sizes in, nothing of torch. All tensors are contiguous unless a RowView says otherwise; sizes are
// in elements.
#pragma once

#include <cstdint>

#include "common/types.h"

namespace flmoe {

// seed: one int64 read at run time; keep = threshold / 65536.
struct DropoutSpec {
  const int64_t* seed;
  uint32_t threshold;
};

struct AttentionForward {
  RowView q, k, v;
  const int32_t* cumulative;  // problems + 1 row offsets, the same for every group
  int64_t groups, problems, rows, heads, width;
  double scale;
  DropoutSpec dropout;
  void* out;  // (groups, rows, heads, width)
  void* lse;  // (groups, rows, heads), compute type
  int threads;
};

struct AttentionBackward {
  AttentionForward forward;
  RowView grad_out;
  RowView grad_q, grad_k, grad_v;  // written
};

// out[e] = x[e] weight[e]^T + bias[e]; a bias or gradient that is not wanted is null.
struct LinearArgs {
  const void *x, *weight, *bias, *grad_out;
  void *out, *grad_x, *grad_weight, *grad_bias;
  int64_t experts, rows, in_width, out_width;
  int threads;
};

// Row-wise kernels of the encoder on (experts, rows, width).
struct NormArgs {
  const void *residual, *update;  // update null: plain layer norm of residual
  const void *gain, *shift;       // (experts, width)
  double eps;
  DropoutSpec dropout;
  bool self_residual;  // I2MoE: sum = dropped + dropout(dropped), dropped = dropout(update)
  void *sum, *normed;
  void *mean, *rstd;  // (experts, rows), compute type
  const void *grad_sum, *grad_normed;
  void *grad_residual, *grad_update, *grad_gain, *grad_shift;
  int64_t experts, rows, width;
  int threads;
};

struct GeluArgs {
  const void *x, *grad_out;
  void* out;  // the activation, or the gradient of x in the backward
  DropoutSpec dropout;
  int64_t experts, rows, width;
  int threads;
};

// latent[e, v, segment] = mean over the segment's rows of residual + dropout(update).
struct PoolArgs {
  const void *residual, *update, *grad_out;
  const int32_t* cumulative;  // segments + 1 row offsets inside one view
  DropoutSpec dropout;
  bool has_update;
  void *out, *grad_residual, *grad_update;
  int64_t experts, views, rows, segments, width;  // rows: of one view
  int threads;
};

// out[e, v, r] = x[e, modality[r] == v - 1 ? 1 : 0, r]: view v takes its noise where its modality
// is replaced.
struct ViewsArgs {
  const void* x;
  const int32_t* modality;
  void* out;
  int64_t experts, views, rows, width;
  int threads;
};

struct LossArgs {
  const void *latents, *grad_losses;  // (experts, views, batch, width); (experts)
  void *losses, *grad_latents;
  int64_t experts, views, batch, width;
  int threads;
};

// pair_moe. A view's groups are samples and its heads are experts: (batch, tokens, experts, width).
struct PairArgs {
  RowView q, k, a, c;
  const void* gate_bias;           // (experts), compute type, or null
  const uint8_t *mask_a, *mask_b;  // (batch, rows), (batch, columns), non-zero = valid, or null
  int64_t batch, experts, rows, columns, rank, width;
  int kinds[8];
  int64_t top_k;
  double scale;
  int threads;
};

enum class PairReduce : int { kNone = 0, kExperts = 1, kPool = 2 };

// Rows of y and mass that are masked are not written.
struct PairForward {
  PairArgs in;
  PairReduce reduce;
  void *y, *mass;
};

// Gradients in the compute type, contiguous (batch, experts, tokens, width), added to what is
// there; grad_bias (experts) is written. grad_y has strides of 0 where it does not vary.
struct PairBackward {
  PairArgs in;
  PairReduce reduce;
  RowView grad_y;
  const void* grad_mass;  // (batch, experts, rows), compute type, or null
  void *grad_q, *grad_k, *grad_a, *grad_c, *grad_bias;
};

// head: one row of width per sample and expert. map: (batch, experts, rows, columns), compute type,
// masked pairs not written. The best `count` of each expert and of their sum: (batch, experts + 1,
// count).
struct PairScores {
  PairArgs in;
  RowView head;
  void* map;
  int64_t count;
  void* values;
  int64_t *i, *j;
};

struct Kernels {
  void (*attention_forward)(DType, const AttentionForward&);
  void (*attention_backward)(DType, const AttentionBackward&);
  void (*linear_forward)(DType, const LinearArgs&);
  void (*linear_backward)(DType, const LinearArgs&);
  void (*norm_forward)(DType, const NormArgs&);
  void (*norm_backward)(DType, const NormArgs&);
  void (*gelu_forward)(DType, const GeluArgs&);
  void (*gelu_backward)(DType, const GeluArgs&);
  void (*pool_forward)(DType, const PoolArgs&);
  void (*pool_backward)(DType, const PoolArgs&);
  void (*views_forward)(DType, const ViewsArgs&);
  void (*views_backward)(DType, const ViewsArgs&);
  void (*loss_forward)(DType, const LossArgs&);
  void (*loss_backward)(DType, const LossArgs&);
  void (*pair_forward)(DType, const PairForward&);
  void (*pair_backward)(DType, const PairBackward&);
  void (*pair_map)(DType, const PairScores&);
  void (*pair_top)(DType, const PairScores&);
};

namespace baseline {
const Kernels& kernels();
}
#if defined(FLMOE_HAVE_X86_ISAS)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
#endif

// The table for this processor, or the one named by FLMOE_ISA (baseline, avx2, avx512) if it can
// run here.
const Kernels& active_kernels();
const char* active_instruction_set();

// Whether this processor runs the instruction set of that name.
bool instruction_set_runs(const char* name);

}  // namespace flmoe
