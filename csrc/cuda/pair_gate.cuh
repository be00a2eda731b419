// The gate of pair_moe for a warp's tile of pairs: softmax over the experts of every pair.
#pragma once

#include <cmath>
#include <limits>

#include "cuda/pair_tile.cuh"

namespace flmoe::cuda {

// gate_power(x * kGateUnit) is e^x: a power of 2, one instruction, in float32, and of e in float64.
// The unit is folded into the scale and the bias, but not with top_k: its rounding could separate
// equal logits, of which the lowest expert must be selected.
template <typename A>
constexpr double kGateUnit = 1.0;
template <>
inline constexpr double kGateUnit<float> = 1.4426950408889634;

template <typename A>
constexpr A kLargest = std::numeric_limits<A>::max();

__device__ __forceinline__ float gate_power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double gate_power(double x) {
  return exp(x);
}

// 1 / x for x from 1 to 8, in float32 to one unit in the last place.
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double reciprocal(double x) {
  return 1.0 / x;
}

// A weight that is negative and does not change the sum of weights, which is at least 1: that of
// an expert that is not selected.
template <typename A>
constexpr A kUnselected = A(-2e-38);

// Products x . z to probabilities, in place. kSome: with top_k; otherwise kGateUnit is a factor of
// scale and bias. Experts that do not exist have the bias -infinity.
template <bool kSome, typename A, int kExperts, int kCount>
__device__ __forceinline__ void gate_pairs(A (&p)[kExperts][kCount][4], A scale,
                                           const A (&bias)[kExperts], int top_k) {
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      A logit[kExperts];
#pragma unroll
      for (int e = 0; e < kExperts; ++e) logit[e] = p[e][n][i] * scale + bias[e];
      A largest = logit[0];
#pragma unroll
      for (int e = 1; e < kExperts; ++e) largest = max(largest, logit[e]);
      A total = 0;
#pragma unroll
      for (int e = 0; e < kExperts; ++e) {
        A power = logit[e] - largest;
        if constexpr (kSome) power *= static_cast<A>(kGateUnit<A>);
        A weight = gate_power(power);
        if constexpr (kSome) {
          // Experts that come first: a larger logit, or an equal one and a lower index.
          int before = 0;
#pragma unroll
          for (int other = 0; other < kExperts; ++other)
            if (other != e)
              before += other < e ? logit[other] >= logit[e] : logit[other] > logit[e];
          weight = before < top_k ? weight : kUnselected<A>;
        }
        total = e == 0 ? weight : total + weight;
        p[e][n][i] = weight;
      }
      const A share = reciprocal(total);
    // If weights are NaN: 0 for an unselected expert, NaN for a selected one of weight 0.
#pragma unroll
      for (int e = 0; e < kExperts; ++e)
        p[e][n][i] = kSome && p[e][n][i] < 0 ? A(0) : p[e][n][i] * share;
    }
}

// valid: a bit for each column. Probabilities of columns that are not valid become 0.
template <typename A, int kExperts, int kCount>
__device__ __forceinline__ void select_columns(A (&p)[kExperts][kCount][4], uint32_t valid,
                                               int lane) {
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (!(valid >> (8 * n + 2 * (lane % 4) + i % 2) & 1))
#pragma unroll
        for (int e = 0; e < kExperts; ++e) p[e][n][i] = 0;
}

}  // namespace flmoe::cuda
