// The kernels' definitions as plain loops in a type R, without vectors, blocks or threads.
#pragma once

#include "compare.h"

namespace flmoe::test {

template <typename R>
using Results = std::vector<Values<R>>;

template <typename R>
Values<R> zeros(int64_t count) {
  return Values<R>(static_cast<size_t>(count));
}

// Dropout as flmoe_kernels/core/dropout.py defines it.
struct Mask {
  int64_t seed;
  uint32_t threshold;

  bool keeps(int64_t problem, int64_t head, int64_t row, int64_t column) const {
    uint32_t c[4] = {static_cast<uint32_t>(16 * (column / 128) + column / 2 % 16),
                     static_cast<uint32_t>(row), static_cast<uint32_t>(head),
                     static_cast<uint32_t>(problem)};
    auto k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 7; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
      c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0, c[1] = static_cast<uint32_t>(p1);
      c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1, c[3] = static_cast<uint32_t>(p0);
    }
    return (c[column / 32 % 4] >> (16 * (column % 2)) & 0xffffu) < threshold;
  }

  template <typename R>
  R factor(int64_t problem, int64_t head, int64_t row, int64_t column) const {
    if (threshold >= 65536) return 1;
    return keeps(problem, head, row, column) ? R(65536) / R(threshold) : R(0);
  }

  DropoutSpec spec() const { return {&seed, threshold}; }
};

// out, and the gradients of x, weight and bias.
template <typename R>
Results<R> linear(int64_t experts, int64_t rows, int64_t in, int64_t out, const Values<R>& x,
                  const Values<R>& w, const Values<R>& bias, const Values<R>& grad) {
  Results<R> y = {zeros<R>(experts * rows * out), zeros<R>(x.size()), zeros<R>(w.size()),
                  zeros<R>(bias.size())};
  for (int64_t er = 0; er < experts * rows; ++er)
    for (int64_t o = 0; o < out; ++o) {
      const int64_t eo = er / rows * out + o;
      R sum = bias[eo];
      const R g = grad[er * out + o];
      for (int64_t i = 0; i < in; ++i) {
        sum += x[er * in + i] * w[eo * in + i];
        y[1][er * in + i] += g * w[eo * in + i];
        y[2][eo * in + i] += g * x[er * in + i];
      }
      y[0][er * out + o] = sum;
      y[3][eo] += g;
    }
  return y;
}

enum Act { kGelu, kGeluTanh, kRelu, kSilu, kActs };

template <typename R>
R activation(int act, R x) {
  if (act == kGelu) return x / 2 * std::erfc(-x / std::sqrt(R(2)));
  if (act == kRelu) return x > 0 ? x : 0;
  const R u = act == kSilu ? x : R(1.5957691216057308) * (x + R(0.044715) * x * x * x);
  return x / (1 + std::exp(-u));
}

template <typename R>
R slope(int act, R x) {
  if (act == kGelu)
    return std::erfc(-x / std::sqrt(R(2))) / 2 +
           x * R(0.39894228040143267794) * std::exp(-x * x / 2);
  if (act == kRelu) return x > 0 ? 1 : 0;
  const bool silu = act == kSilu;
  const R scale = R(1.5957691216057308), cubic = R(0.044715);
  const R u = silu ? x : scale * (x + cubic * x * x * x);
  const R du = silu ? R(1) : scale * (1 + 3 * cubic * x * x), s = 1 / (1 + std::exp(-u));
  return s + x * s * (1 - s) * du;
}

// Linear, GELU, dropout, linear: hidden rows, out, and the gradients of x, w_in, b_in, w_out,
// b_out.
template <typename R>
Results<R> mlp(int64_t experts, int64_t rows, int64_t in, int64_t hidden, int64_t out,
               const Values<R>& x, const Values<R>& w_in, const Values<R>& b_in,
               const Values<R>& w_out, const Values<R>& b_out, const Values<R>& grad,
               const Mask& mask) {
  const int64_t n = experts * rows * hidden;
  const Values<R> h = linear(experts, rows, in, hidden, x, w_in, b_in, zeros<R>(n))[0];
  Values<R> kept = h, active = h, grad_h = h;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = i / hidden;
    kept[i] = mask.factor<R>(0, row / rows, row % rows, i % hidden);
    active[i] = activation<R>(kGelu, h[i]) * kept[i];
  }
  Results<R> second = linear(experts, rows, hidden, out, active, w_out, b_out, grad);
  for (int64_t i = 0; i < n; ++i) grad_h[i] = second[1][i] * kept[i] * slope<R>(kGelu, h[i]);
  Results<R> first = linear(experts, rows, in, hidden, x, w_in, b_in, grad_h);
  return {h, second[0], first[1], first[2], first[3], second[2], second[3]};
}

// sum = residual + dropout(update), and its layer norm; then mean, rstd, and the gradients of
// residual, update, gain and shift from those of sum and norm.
template <typename R>
Results<R> norm(int64_t experts, int64_t rows, int64_t width, const Values<R>& residual,
                const Values<R>& update, const Values<R>& gain, const Values<R>& shift, R eps,
                const Mask& mask, const Values<R>& grad_sum, const Values<R>& grad_norm) {
  const int64_t n = experts * rows;
  const Values<R> none = zeros<R>(experts * width);
  Results<R> y = {residual, residual, zeros<R>(n), zeros<R>(n), grad_sum, update, none, none};
  for (int64_t r = 0; r < n; ++r) {
    const int64_t e = r / rows, at = r * width;
    const auto kept = [&](int64_t d) { return mask.factor<R>(0, e, r % rows, d); };
    R mean = 0, squares = 0, c1 = 0, c2 = 0;
    for (int64_t d = 0; d < width; ++d) mean += y[0][at + d] += update[at + d] * kept(d);
    mean /= R(width);
    for (int64_t d = 0; d < width; ++d) squares += (y[0][at + d] - mean) * (y[0][at + d] - mean);
    const R rstd = 1 / std::sqrt(squares / R(width) + eps);
    y[2][r] = mean, y[3][r] = rstd;
    const auto unit = [&](int64_t d) { return (y[0][at + d] - mean) * rstd; };
    for (int64_t d = 0; d < width; ++d) {
      const R g = grad_norm[at + d], x = unit(d);
      y[1][at + d] = x * gain[e * width + d] + shift[e * width + d];
      y[6][e * width + d] += g * x, y[7][e * width + d] += g;
      c1 += g * gain[e * width + d] / R(width), c2 += g * gain[e * width + d] * x / R(width);
    }
    for (int64_t d = 0; d < width; ++d) {
      y[4][at + d] += rstd * (grad_norm[at + d] * gain[e * width + d] - c1 - unit(d) * c2);
      y[5][at + d] = y[4][at + d] * kept(d);
    }
  }
  return y;
}

// Attention of packed problems, (rows, heads, width): out, log-sum-exp, and the gradients of q, k
// and v.
template <typename R>
Results<R> attention(const std::vector<int32_t>& bounds, int64_t heads, int64_t width, R scale,
                     const Values<R>& q, const Values<R>& k, const Values<R>& v,
                     const Values<R>& grad, const Mask& mask) {
  const int64_t n = q.size();
  Results<R> y = {zeros<R>(n), zeros<R>(n / width), zeros<R>(n), zeros<R>(n), zeros<R>(n)};
  for (int64_t p = 0; p + 1 < static_cast<int64_t>(bounds.size()); ++p)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t i = bounds[p]; i < bounds[p + 1]; ++i) {
        const int64_t first = bounds[p], length = bounds[p + 1] - first;
        const int64_t row = (i * heads + h) * width;
        const auto at = [&](int64_t j) { return ((first + j) * heads + h) * width; };
        const auto dot = [&](const Values<R>& x, const Values<R>& z, int64_t j) {
          R sum = 0;
          for (int64_t d = 0; d < width; ++d) sum += x[row + d] * z[at(j) + d];
          return sum;
        };
        Values<R> p_row = zeros<R>(length), dp = p_row, kept = p_row;
        R top = -INFINITY, total = 0, mean = 0;
        for (int64_t j = 0; j < length; ++j) p_row[j] = scale * dot(q, k, j);
        for (int64_t j = 0; j < length; ++j) top = std::max(top, p_row[j]);
        for (int64_t j = 0; j < length; ++j) total += p_row[j] = std::exp(p_row[j] - top);
        y[1][i * heads + h] = top + std::log(total);
        for (int64_t j = 0; j < length; ++j) {
          p_row[j] /= total;
          kept[j] = mask.factor<R>(p, h, i - first, j);
          dp[j] = kept[j] * dot(grad, v, j);
          mean += p_row[j] * dp[j];
        }
        for (int64_t j = 0; j < length; ++j)
          for (int64_t d = 0; d < width; ++d) {
            const R ds = scale * p_row[j] * (dp[j] - mean), weight = p_row[j] * kept[j];
            y[0][row + d] += weight * v[at(j) + d];
            y[2][row + d] += ds * k[at(j) + d];
            y[3][at(j) + d] += ds * q[row + d];
            y[4][at(j) + d] += weight * grad[row + d];
          }
      }
  return y;
}

// One expert's encoder without dropout: the means of the segments. weights: 12 tensors for each
// layer, in the order of EncoderInference.
template <typename R>
Values<R> encoder(const std::vector<int32_t>& samples, const std::vector<int32_t>& segments,
                  int64_t heads, int64_t width, int64_t hidden, R eps, Values<R> x,
                  const Results<R>& weights) {
  const int64_t rows = x.size() / width, n = x.size();
  const Values<R> none = zeros<R>(n), no_bias = zeros<R>(2 * width);
  const Mask all{0, 65536};
  const R scale = 1 / std::sqrt(R(width) / R(heads));
  for (size_t at = 0; at < weights.size(); at += 12) {
    const Values<R>* w = &weights[at];
    const auto normed = [&](const Values<R>& gain, const Values<R>& shift) {
      return norm(1, rows, width, x, none, gain, shift, eps, all, none, none)[1];
    };
    const auto times = [&](const Values<R>& in, const Values<R>& weight, const Values<R>& bias) {
      const int64_t out = weight.size() / width;
      return linear(1, rows, width, out, in, weight, bias, zeros<R>(rows * out))[0];
    };
    const auto add = [&](const Values<R>& more) {
      for (int64_t i = 0; i < n; ++i) x[i] += more[i];
    };
    const Values<R> first = normed(w[0], w[1]);
    const auto half = w[3].begin() + width * width;  // keys, then values
    const Values<R> q = times(first, w[2], no_bias);
    const Values<R> k = times(first, {w[3].begin(), half}, no_bias);
    const Values<R> v = times(first, {half, w[3].end()}, no_bias);
    add(times(attention(samples, heads, width / heads, scale, q, k, v, none, all)[0], w[4], w[5]));
    add(mlp(1, rows, width, hidden, width, normed(w[6], w[7]), w[8], w[9], w[10], w[11], none,
            all)[1]);
  }
  Values<R> means = zeros<R>((segments.size() - 1) * width);
  for (size_t s = 0; s + 1 < segments.size(); ++s)
    for (int64_t at = segments[s] * width; at < segments[s + 1] * width; ++at)
      means[s * width + at % width] += x[at] / R(segments[s + 1] - segments[s]);
  return means;
}

}  // namespace flmoe::test
