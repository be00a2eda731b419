// Routing: the experts of each token, and the order of the rows by expert.
//
// The work is small compared with the MLPs. Selection is parallel over tokens; capacity and the
// stable permutation are counted in one pass in the order of tokens, so that the lowest tokens keep
// their place and nothing depends on threads.
#include <cmath>

#include "common/routing.h"
#include "cpu/kernels/entry.h"
#include "cpu/simd.h"

namespace flmoe::FLMOE_ISA {
namespace {

// The top k experts of one token in order, and their weights.
template <typename T, typename A>
void select(const GateArgs& args, int64_t token, A* logits) {
  const int64_t experts = args.experts, k = args.top_k;
  read_row<T, A>(static_cast<const T*>(args.logits) + token * experts, logits, experts);
  int64_t* index = args.index + token * k;
  for (int64_t n = 0; n < k; ++n) {
    // The best expert that comes after the last chosen expert.
    int64_t best = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (n > 0 && !comes_before(logits[index[n - 1]], index[n - 1], logits[e], e)) continue;
      if (best < 0 || comes_before(logits[e], e, logits[best], best)) best = e;
    }
    index[n] = best;
  }
  const A top = logits[index[0]];
  A total = 0;
  if (args.over_all) {
    for (int64_t e = 0; e < experts; ++e) total += std::exp(logits[e] - top);
  } else {
    for (int64_t n = 0; n < k; ++n) total += std::exp(logits[index[n]] - top);
  }
  T* weight = static_cast<T*>(args.weight) + token * k;
  for (int64_t n = 0; n < k; ++n) write<T, A>(weight + n, std::exp(logits[index[n]] - top) / total);
}

}  // namespace

void routing_gate(DType dtype, const GateArgs& args) {
  constexpr int64_t kTokens = 256;
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    parallel_for((args.tokens + kTokens - 1) / kTokens, args.threads, [&](int64_t item, int) {
      const Buffer<A> logits(args.experts);
      for (int64_t n = item * kTokens; n < min64((item + 1) * kTokens, args.tokens); ++n)
        select<T, A>(args, n, logits);
    });
  });
}

bool routing_limit(const LimitArgs& args) {
  const Buffer<int64_t> used(args.experts);
  for (int64_t e = 0; e < args.experts; ++e) used[e] = 0;
  for (int64_t r = 0; r < args.tokens * args.top_k; ++r) {
    const int64_t e = args.index[r];
    if (e < -1 || e >= args.experts) return false;
    const bool valid = e >= 0 && (args.mask == nullptr || args.mask[r / args.top_k]);
    args.kept[r] = valid && has_room(used[e]++, args.capacity) ? e : -1;
  }
  return true;
}

bool routing_dispatch(const DispatchArgs& args) {
  for (int64_t e = 0; e < args.experts; ++e) args.counts[e] = 0;
  for (int64_t r = 0; r < args.rows; ++r) {
    const int64_t e = args.index[r];
    if (e < -1 || e >= args.experts) return false;
    if (e >= 0) ++args.counts[e];
  }
  args.offsets[0] = 0;
  for (int64_t e = 0; e < args.experts; ++e) args.offsets[e + 1] = args.offsets[e] + args.counts[e];
  const Buffer<int32_t> next(args.experts + 1);
  for (int64_t e = 0; e <= args.experts; ++e) next[e] = args.offsets[e];
  for (int64_t r = 0; r < args.rows; ++r) {
    const int64_t e = args.index[r] < 0 ? args.experts : args.index[r];
    args.permutation[next[e]++] = static_cast<int32_t>(r);
  }
  return true;
}

}  // namespace flmoe::FLMOE_ISA
