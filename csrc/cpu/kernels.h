// Entry points of the CPU kernels: one table per instruction set. Arguments are plain pointers and
// sizes, without torch. All tensors are contiguous unless given as a RowView; sizes are in
// elements.
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
  RowView grad_q, grad_k, grad_v;  // written; data null if not wanted
};

// out[e] = x[e] weight[e]^T + bias[e]; a missing bias or gradient is null.
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
  void *grad_residual, *grad_update, *grad_gain, *grad_shift;  // null if not wanted
  int64_t experts, rows, width;
  int threads;
};

// out[e] = dropout(GELU(hidden[e])) w_out[e]^T + b_out[e], hidden[e] = x[e] w_in[e]^T + b_in[e].
// The forward writes hidden and out; a gradient that is not requested is null.
struct MlpArgs {
  const void *x, *w_in, *b_in, *w_out, *b_out, *grad_out;
  DropoutSpec dropout;
  void *hidden, *out, *grad_x, *grad_w_in, *grad_b_in, *grad_w_out, *grad_b_out;
  int64_t experts, rows, in_width, hidden_width, out_width;
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

// out[e, v, r] = x[e, modality[r] == v - 1 ? 1 : 0, r]: view v uses the noise in rows of the
// replaced modality.
struct ViewsArgs {
  const void* x;
  const int32_t* modality;
  void* out;
  int64_t experts, views, rows, width;
  int threads;
};

// Fusion encoders without gradients. rows: embedded rows (row_sets, table, width), one set or one
// for each expert. index: (rows_total), the row of the table for each computed row, or null: 0, 1,
// .. cu_samples: samples + 1 boundaries of computed rows; cu_segments: the same number of segments
// for each sample. weights: for each expert and layer the tensors norm1 (gain, shift), q, kv, proj
// (weight, bias), norm2 (gain, shift), and the MLP's first and second linear map (weight, bias).
// out: (experts, segments, width).
struct EncoderInference {
  const void* rows;
  const int64_t* index;
  const int32_t *cu_samples, *cu_segments;
  const void* const* weights;
  void* out;
  int64_t row_sets, table, rows_total, samples, segments, experts, layers, width, hidden, heads;
  double eps;
  bool self_residual;
  int threads;
};

// exists: (batch, views - 1), whether the view that replaces a modality exists for a sample; null:
// all.
struct LossArgs {
  const void *latents, *grad_losses;  // (experts, views, batch, width); (experts)
  const bool* exists;
  void *losses, *grad_latents;
  int64_t experts, views, batch, width;
  int threads;
};

constexpr int kMaxExperts = 8;
constexpr int kPairKinds = 5;

// pair_moe. A view's groups are samples and its heads are experts: (batch, tokens, experts, width).
struct PairArgs {
  RowView q, k, a, c;
  const void* gate_bias;           // (experts), compute type, or null
  const uint8_t *mask_a, *mask_b;  // (batch, rows), (batch, columns), non-zero = valid, or null
  int64_t batch, experts, rows, columns, rank, width;
  int kinds[kMaxExperts];
  int64_t top_k;
  double scale;
  int threads;
};

// The positions are those of REDUCTIONS in flmoe_kernels/ops/pair_moe/call.py.
enum class PairReduce : int { kNone = 0, kExperts = 1, kPool = 2 };

// Rows of y and mass that are masked are not written. y is of the compute type under kPool.
struct PairForward {
  PairArgs in;
  PairReduce reduce;
  void *y, *mass;
};

// Gradients in the compute type, contiguous (batch, experts, tokens, width), are accumulated;
// grad_bias (experts) is overwritten; null if not wanted. grad_y has stride 0 in dimensions where
// it is constant.
struct PairBackward {
  PairArgs in;
  PairReduce reduce;
  RowView grad_y;
  const void* grad_mass;  // (batch, experts, rows), compute type, or null
  void *grad_q, *grad_k, *grad_a, *grad_c, *grad_bias;
  bool fresh;
};

// head: one row of width per sample and expert. map: (batch, experts, rows, columns), compute type,
// masked pairs not written; null for top_pairs: the best `count` of each expert and of their sum,
// (batch, experts + 1, count), with `candidates` as workspace for pair_candidates() entries.
struct PairScores {
  PairArgs in;
  RowView head;
  void* map;
  int64_t count;
  void* values;
  int64_t *i, *j;
  void* candidates;
};

// Number of groups of a sample's rows in top_pairs, each with its own lists: enough to keep threads
// busy, fewer if the lists are long. Static, so that every instruction set has its own copy.
static inline int64_t top_groups(const PairArgs& in, int64_t count) {
  constexpr int64_t kItems = 16, kLongest = int64_t{1} << 18;
  const int64_t wanted = in.batch > 0 ? (kItems + in.batch - 1) / in.batch : 1;
  const int64_t most = count < kLongest ? kLongest / count : 1;
  return wanted < most ? wanted : most;
}

// Entries of one of those lists.
static inline int64_t top_entries(const PairArgs& in, int64_t count) {
  return count < in.rows * in.columns ? count : in.rows * in.columns;
}

struct PairCandidate {
  double value;
  int64_t pair;  // i * columns + j
};

// Number of candidates in the workspace of top_pairs.
static inline int64_t pair_candidates(const PairArgs& in, int64_t count) {
  return in.batch * top_groups(in, count) * (in.experts + 1) * top_entries(in, count);
}

// The top_k experts of each token of logits (tokens, experts), and their softmax weights.
struct GateArgs {
  const void* logits;
  int64_t* index;
  void* weight;
  int64_t tokens, experts, top_k;
  bool over_all;  // softmax over all experts instead of the chosen ones
  int threads;
};

// kept (tokens, top_k): index, or -1 if the token is masked or the expert already has `capacity`
// rows, counted in the order of tokens, then of choices.
struct LimitArgs {
  const int64_t* index;
  const uint8_t* mask;  // (tokens), non-zero = valid, or null
  int64_t* kept;
  int64_t tokens, top_k, experts;
  int64_t capacity;  // or -1
};

// counts (experts), offsets (experts + 1) and permutation (rows) of index (rows), -1 = dropped.
struct DispatchArgs {
  const int64_t* index;
  int32_t *counts, *offsets, *permutation;
  int64_t rows, experts;
};

// x (tokens, width); weight (tokens, choices); w_in (experts, hidden, width) and w_out (experts,
// width, hidden) with biases or null; w_gate and b_gate as w_in and b_in, null if experts are not
// gated. The strides are elements from one expert to the next. permutation lists places in (tokens,
// choices) by expert.
struct RoutedArgs {
  const void *x, *weight, *w_in, *b_in, *w_out, *b_out, *w_gate, *b_gate;
  const int32_t *offsets, *permutation;
  int64_t tokens, choices, experts, width, hidden;
  int64_t w_in_stride, w_gate_stride;
  int act;
  int threads;
};

// hidden: null, or (tokens * choices, hidden), x w_in^T + b_in; gated: (2, tokens * choices,
// hidden), the second is x w_gate^T + b_gate. By place in the permutation, which is ascending
// within an expert; dropped rows are not touched.
struct RoutedForward {
  RoutedArgs in;
  void *out, *hidden;
};

// Gradients of dropped rows' weights are not touched; a gradient that is not requested is null.
struct RoutedBackward {
  RoutedArgs in;
  const void *grad_out, *hidden;
  void *grad_x, *grad_weight, *grad_w_in, *grad_b_in, *grad_w_out, *grad_b_out, *grad_w_gate,
      *grad_b_gate;
};

// For tests of the product in bfloat16: c (m, n) += a b. Either a (m, depth) and b (n, depth), as
// in a layer, or a (depth, m) and b (depth, n), as in the gradient of its weight. c is padded to
// rows of n_padded, a multiple of 16.
struct ProductBf16 {
  const BFloat16 *a, *b;
  float* c;
  int64_t m, n, n_padded, depth;
  bool depth_is_rows;
};

// All entry points: X(name, result, arguments).
#define FLMOE_KERNELS(X)                                                               \
  X(attention_forward, void, DType, const AttentionForward&)                           \
  X(attention_backward, void, DType, const AttentionBackward&)                         \
  X(linear_forward, void, DType, const LinearArgs&)                                    \
  X(linear_backward, void, DType, const LinearArgs&)                                   \
  X(norm_forward, void, DType, const NormArgs&)                                        \
  X(norm_backward, void, DType, const NormArgs&)                                       \
  X(mlp_forward, void, DType, const MlpArgs&)                                          \
  X(mlp_backward, void, DType, const MlpArgs&)                                         \
  X(pool_forward, void, DType, const PoolArgs&)                                        \
  X(pool_backward, void, DType, const PoolArgs&)                                       \
  X(views_forward, void, DType, const ViewsArgs&)                                      \
  X(views_backward, void, DType, const ViewsArgs&)                                     \
  X(encoder_inference, void, DType, const EncoderInference&)                           \
  X(loss_forward, void, DType, const LossArgs&)                                        \
  X(loss_backward, void, DType, const LossArgs&)                                       \
  X(pair_forward, void, DType, const PairForward&)                                     \
  X(pair_backward, void, DType, const PairBackward&)                                   \
  X(pair_map, void, DType, const PairScores&)                                          \
  X(pair_top, void, DType, const PairScores&)                                          \
  X(routing_gate, void, DType, const GateArgs&)                                        \
  X(routing_limit, bool, const LimitArgs&)       /* false: an index is out of range */ \
  X(routing_dispatch, bool, const DispatchArgs&) /* the same */                        \
  X(routed_forward, void, DType, const RoutedForward&)                                 \
  X(routed_backward, void, DType, const RoutedBackward&)

struct Kernels {
#define FLMOE_POINTER(name, result, ...) result (*name)(__VA_ARGS__);
  FLMOE_KERNELS(FLMOE_POINTER)
#undef FLMOE_POINTER
};

namespace baseline {
const Kernels& kernels();
void product_bf16(const ProductBf16&);  // emulates the instruction
}  // namespace baseline
#if defined(FLMOE_HAVE_X86_ISAS)
namespace avx2 {
const Kernels& kernels();
}
namespace avx512 {
const Kernels& kernels();
}
namespace avx512bf16 {
const Kernels& kernels();  // those of avx512, other products in bfloat16
void product_bf16(const ProductBf16&);
}  // namespace avx512bf16
#endif

// The table for this processor, or for FLMOE_ISA (baseline, avx2, avx512, avx512bf16) if this
// processor supports it.
const Kernels& active_kernels();
const char* active_instruction_set();

// Whether this processor supports the instruction set with this name.
bool instruction_set_runs(const char* name);

}  // namespace flmoe
