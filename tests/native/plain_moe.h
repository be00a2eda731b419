// The mixtures of experts as plain loops in a type R.
#pragma once

#include "plain.h"

namespace flmoe::test {

// q, k, a, c; the gate's bias; head of pair_map; gradients of y and mass.
template <typename R>
struct PairInputs {
  Values<R> q, k, a, c, bias, head, grad_y, grad_mass;
};

// y, mass, the map, its `count` largest values of each expert and of their sum, and the gradients
// of q, k, a, c and bias.
template <typename R>
Results<R> pair_moe(const PairArgs& in, PairReduce reduce, int64_t count, const PairInputs<R>& x) {
  constexpr R kMessages[kPairKinds][3] = {
      {1, 0, 0}, {0, 1, 0}, {0, 0, 1}, {R(0.5), R(0.5), 0}, {0, 0, 0}};
  const int64_t E = in.experts, V = in.width, pairs = in.rows * in.columns;
  Values<R> y = zeros<R>(x.grad_y.size()), mass = zeros<R>(in.batch * E * in.rows);
  Values<R> map = zeros<R>(in.batch * E * pairs), best;
  PairInputs<R> g{zeros<R>(x.q.size()),
                  zeros<R>(x.k.size()),
                  zeros<R>(x.a.size()),
                  zeros<R>(x.c.size()),
                  zeros<R>(E),
                  {},
                  {},
                  {}};
  for (int64_t b = 0; b < in.batch; ++b) {
    Results<R> scores(E + 1);
    for (int64_t i = 0; i < in.rows; ++i)
      for (int64_t j = 0; j < in.columns; ++j) {
        if (in.mask_a && !in.mask_a[b * in.rows + i]) continue;
        if (in.mask_b && !in.mask_b[b * in.columns + j]) continue;
        const auto row = [&](int64_t e) { return (b * E + e) * in.rows + i; };
        const auto column = [&](int64_t e) { return (b * E + e) * in.columns + j; };
        Values<R> logit = zeros<R>(E), p = logit, dp = logit;
        for (int64_t e = 0; e < E; ++e) {
          for (int64_t d = 0; d < in.rank; ++d)
            logit[e] += x.q[row(e) * in.rank + d] * x.k[column(e) * in.rank + d];
          logit[e] = logit[e] * R(in.scale) + x.bias[e];
        }
        const R top = *std::max_element(logit.begin(), logit.end());
        R total = 0, mean = 0, sum = 0;
        for (int64_t e = 0; e < E; ++e) {
          int64_t before = 0;
          for (int64_t f = 0; f < E; ++f)
            before += logit[f] > logit[e] || (logit[f] == logit[e] && f < e);
          total += p[e] = before < in.top_k ? std::exp(logit[e] - top) : 0;
        }
        for (int64_t e = 0; e < E; ++e) {
          p[e] /= total;
          mass[row(e)] += p[e];
          dp[e] = x.grad_mass[row(e)];
          R score = 0;
          const R* s = kMessages[in.kinds[e]];
          const int64_t out = reduce == PairReduce::kNone      ? row(e)
                              : reduce == PairReduce::kExperts ? b * in.rows + i
                                                               : b * E + e;
          for (int64_t d = 0; d < V; ++d) {
            const R a = x.a[row(e) * V + d], c = x.c[column(e) * V + d];
            const R message = s[0] * a + s[1] * c + s[2] * a * c, grad = x.grad_y[out * V + d];
            y[out * V + d] += p[e] * message;
            score += p[e] * message * x.head[(b * E + e) * V + d];
            dp[e] += grad * message;
            g.a[row(e) * V + d] += p[e] * grad * (s[0] + s[2] * c);
            g.c[column(e) * V + d] += p[e] * grad * (s[1] + s[2] * a);
          }
          map[(b * E + e) * pairs + i * in.columns + j] = score;
          scores[e].push_back(score);
          sum += score;
          mean += p[e] * dp[e];
        }
        scores[E].push_back(sum);
        for (int64_t e = 0; e < E; ++e) {
          const R d_logit = p[e] * (dp[e] - mean);
          g.bias[e] += d_logit;
          for (int64_t d = 0; d < in.rank; ++d) {
            g.q[row(e) * in.rank + d] += R(in.scale) * d_logit * x.k[column(e) * in.rank + d];
            g.k[column(e) * in.rank + d] += R(in.scale) * d_logit * x.q[row(e) * in.rank + d];
          }
        }
      }
    for (Values<R>& each : scores) {
      std::sort(each.rbegin(), each.rend());
      best.insert(best.end(), each.begin(), each.begin() + count);
    }
  }
  return {y, mass, map, best, g.q, g.k, g.a, g.c, g.bias};
}

// Weights of the top_k experts of each token, and their numbers.
template <typename R>
Results<R> gate(int64_t experts, int64_t top_k, bool over_all, const Values<R>& logits) {
  Results<R> y(2);
  for (size_t at = 0; at < logits.size(); at += experts) {
    const R* x = &logits[at];
    std::vector<int64_t> order(experts);
    for (int64_t e = 0; e < experts; ++e) order[e] = e;
    std::stable_sort(order.begin(), order.end(), [&](int64_t e, int64_t f) { return x[e] > x[f]; });
    R total = 0;
    for (int64_t n = 0; n < (over_all ? experts : top_k); ++n)
      total += std::exp(x[order[n]] - x[order[0]]);
    for (int64_t n = 0; n < top_k; ++n) {
      y[0].push_back(std::exp(x[order[n]] - x[order[0]]) / total);
      y[1].push_back(static_cast<R>(order[n]));
    }
  }
  return y;
}

// x, weight, w_in, b_in, w_out, b_out, w_gate, b_gate (empty without), gradient of out.
template <typename R>
struct RoutedInputs {
  Values<R> x, weight, w_in, b_in, w_out, b_out, w_gate, b_gate, grad;
};

// out, and the gradients of all inputs but `grad`. index (tokens, choices): -1 = dropped.
template <typename R>
Results<R> routed(const RoutedArgs& in, const std::vector<int64_t>& index,
                  const RoutedInputs<R>& x) {
  const int64_t D = in.width, F = in.hidden;
  const bool gated = !x.w_gate.empty();
  Values<R> out = zeros<R>(x.x.size());
  RoutedInputs<R> g{out,
                    zeros<R>(x.weight.size()),
                    zeros<R>(x.w_in.size()),
                    zeros<R>(x.b_in.size()),
                    zeros<R>(x.w_out.size()),
                    zeros<R>(x.b_out.size()),
                    zeros<R>(x.w_gate.size()),
                    zeros<R>(x.b_gate.size()),
                    {}};
  for (int64_t r = 0; r < static_cast<int64_t>(index.size()); ++r) {
    const int64_t e = index[r], n = r / in.choices;
    if (e < 0) continue;
    const R weight = x.weight[r];
    Values<R> linear = {x.b_in.begin() + e * F, x.b_in.begin() + (e + 1) * F}, value = linear;
    Values<R> opened = zeros<R>(F);
    for (int64_t f = 0; f < F; ++f) {
      if (gated) opened[f] = x.b_gate[e * F + f];
      for (int64_t d = 0; d < D; ++d) {
        linear[f] += x.x[n * D + d] * x.w_in[(e * F + f) * D + d];
        if (gated) opened[f] += x.x[n * D + d] * x.w_gate[(e * F + f) * D + d];
      }
      value[f] = gated ? activation(in.act, opened[f]) * linear[f] : activation(in.act, linear[f]);
    }
    Values<R> grad_value = zeros<R>(F);
    for (int64_t d = 0; d < D; ++d) {
      const R grad = x.grad[n * D + d];
      R sum = x.b_out[e * D + d];
      for (int64_t f = 0; f < F; ++f) {
        sum += value[f] * x.w_out[(e * D + d) * F + f];
        grad_value[f] += weight * grad * x.w_out[(e * D + d) * F + f];
        g.w_out[(e * D + d) * F + f] += weight * grad * value[f];
      }
      out[n * D + d] += weight * sum;
      g.weight[r] += grad * sum;
      g.b_out[e * D + d] += weight * grad;
    }
    for (int64_t f = 0; f < F; ++f) {
      const R of_linear =
          grad_value[f] * (gated ? activation(in.act, opened[f]) : slope(in.act, linear[f]));
      const R of_opened = gated ? grad_value[f] * slope(in.act, opened[f]) * linear[f] : 0;
      g.b_in[e * F + f] += of_linear;
      if (gated) g.b_gate[e * F + f] += of_opened;
      for (int64_t d = 0; d < D; ++d) {
        const int64_t at = (e * F + f) * D + d;
        g.x[n * D + d] += of_linear * x.w_in[at];
        g.w_in[at] += of_linear * x.x[n * D + d];
        if (!gated) continue;
        g.x[n * D + d] += of_opened * x.w_gate[at];
        g.w_gate[at] += of_opened * x.x[n * D + d];
      }
    }
  }
  return {out, g.x, g.weight, g.w_in, g.b_in, g.w_out, g.b_out, g.w_gate, g.b_gate};
}

}  // namespace flmoe::test
