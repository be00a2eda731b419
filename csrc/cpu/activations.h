// Activations of an MLP and their derivatives, a vector at a time.
#pragma once

#include "cpu/simd.h"

namespace flmoe::FLMOE_ISA {

// The positions are those of ACTIVATIONS in flmoe_kernels/ops/routed_mlp/reference.py.
enum class Activation : int { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3 };

// 1 / (1 + exp(-x)) without overflow on either side.
template <typename A>
inline Vec<A> sigmoid(Vec<A> x) {
  const Vec<A> small = exp_nonpositive(x < A(0) ? x : -x);
  const Vec<A> share = reciprocal(small + A(1));
  return x < A(0) ? small * share : share;
}

// act(x), and its derivative if requested.
template <typename A>
inline Vec<A> activate(Activation kind, Vec<A> x, Vec<A>* derivative) {
  switch (kind) {
    case Activation::kGelu: {
      Vec<A> cdf, pdf;
      normal_cdf_pdf(x, &cdf, &pdf);
      if (derivative) *derivative = cdf + x * pdf;
      return x * cdf;
    }
    case Activation::kGeluTanh: {
      // (1 + tanh(u)) / 2 is the logistic function of 2 u.
      const A scale = A(1.5957691216057308), cubic = A(0.044715);
      const Vec<A> s = sigmoid<A>(x * scale * (x * x * cubic + A(1)));
      if (derivative) *derivative = s + x * s * (A(1) - s) * scale * (x * x * (3 * cubic) + A(1));
      return x * s;
    }
    case Activation::kRelu: {
      // NaN is not below 0 and passes.
      const auto off = x <= A(0);
      if (derivative) *derivative = off ? Vec<A>{} : splat(A(1));
      return off ? Vec<A>{} : x;
    }
    default: {
      const Vec<A> s = sigmoid<A>(x);
      if (derivative) *derivative = s * (x * (A(1) - s) + A(1));
      return x * s;
    }
  }
}

}  // namespace flmoe::FLMOE_ISA
