// Arguments of pair_moe's bindings.
#pragma once

#include "bindings/border.h"

namespace flmoe::bindings {

using PairSizes = std::array<int64_t, 6>;

// tensors = (q, k, a, c) views and the addresses of gate_bias, mask_a, mask_b;
// sizes = (batch, experts, rows, columns, rank, width).
inline PairArgs pair_args(const py::tuple& tensors, const PairSizes& sizes,
                          const std::vector<int>& kinds, int64_t top_k, double scale, int threads) {
  PairArgs args{};
  args.q = view(tensors[0]), args.k = view(tensors[1]);
  args.a = view(tensors[2]), args.c = view(tensors[3]);
  args.gate_bias = pointer(tensors[4].cast<Address>());
  args.mask_a = pointer<const uint8_t>(tensors[5].cast<Address>());
  args.mask_b = pointer<const uint8_t>(tensors[6].cast<Address>());
  args.batch = sizes[0], args.experts = sizes[1], args.rows = sizes[2], args.columns = sizes[3];
  args.rank = sizes[4], args.width = sizes[5];
  if (args.experts < 1 || args.experts > kMaxExperts ||
      kinds.size() != static_cast<size_t>(args.experts))
    throw std::invalid_argument("kinds: expected one code per expert, for 1 to 8 experts");
  if (top_k < 1 || top_k > args.experts)
    throw std::invalid_argument("top_k: expected 1 to the number of experts");
  for (size_t e = 0; e < kinds.size(); ++e) {
    if (kinds[e] < 0 || kinds[e] >= kPairKinds)
      throw std::invalid_argument("kinds: expected codes from 0 to 4");
    args.kinds[e] = kinds[e];
  }
  args.top_k = top_k, args.scale = scale, args.threads = threads;
  return args;
}

inline PairReduce pair_reduce(int code) {
  if (code < 0 || code > 2) throw std::invalid_argument("reduce: expected a code from 0 to 2");
  return static_cast<PairReduce>(code);
}

}  // namespace flmoe::bindings
