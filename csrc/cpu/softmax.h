// Online softmax of a row of scores.
#pragma once

#include <cmath>

#include "cpu/simd.h"

namespace flmoe::FLMOE_ISA {

// v in the first `count` lanes, -inf in the others: partial stores would delay the load.
template <typename A>
Vec<A> first_lanes(Vec<A> v, int64_t count) {
  using Lane = typename Simd<A>::Lane;
  static constexpr Lane kIndex[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  typename Simd<A>::Int index;
  std::memcpy(&index, kIndex, sizeof index);
  return index < static_cast<Lane>(count) ? v : splat(-static_cast<A>(INFINITY));
}

// Converts a row of scores, which has room for whole vectors, to unnormalised probabilities;
// updates the row's running maximum and sum and returns the factor for the sums accumulated before.
template <typename A>
inline A softmax_row(A* scores, int64_t keys, A* maximum, A* total) {
  const int64_t padded = round_up(keys, kLanes<A>);
  if (padded != keys) {
    A* last = scores + padded - kLanes<A>;
    store(last, first_lanes<A>(load(last), keys - (padded - kLanes<A>)));
  }
  const A old = *maximum;
  Vec<A> best = splat(old);
  for (int64_t j = 0; j < padded; j += kLanes<A>) best = max_vec<A>(load(scores + j), best);
  A top = max_lanes<A>(best);
  if (std::isinf(top)) {
    // max_vec may ignore NaN, and this branch may return before the sum.
    for (int64_t j = 0; j < keys; ++j)
      if (scores[j] != scores[j]) top = scores[j];
    if (top == -INFINITY) {
      // Only -inf so far: no weight yet. If it stays so, the row has a total of 0 and becomes NaN,
      // as in torch.
      for (int64_t j = 0; j < padded; ++j) scores[j] = 0;
      return A(1);
    }
  }
  Vec<A> sum = {};
  for (int64_t j = 0; j < padded; j += kLanes<A>) {
    const Vec<A> p = exp_nonpositive(load(scores + j) - top);
    sum += p;
    store(scores + j, p);
  }
  const A factor = old == top ? A(1) : exp_nonpositive(splat(old - top))[0];
  *total = *total * factor + sum_lanes<A>(sum);
  *maximum = *total == *total || top == A(INFINITY) ? top : *total;
  return factor;
}

}  // namespace flmoe::FLMOE_ISA
