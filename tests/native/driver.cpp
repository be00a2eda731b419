// Runs the CPU kernels without Python and torch, and compares them with plain loops: for processors
// that are only emulated. The results are deterministic; the inputs are random with a fixed seed.
#include <array>

#include "plain_moe.h"

namespace flmoe::test {
namespace {

constexpr int kThreads = 2;
const Kernels& kernels = active_kernels();
Comparisons check;
const Mask kAll{0, 65536}, kDropped{0x1234567890abcdef, 39322};

template <typename T>
void linear_case(int64_t experts, int64_t rows, int64_t in, int64_t out) {
  const auto x = draw<T>(experts * rows * in), w = draw<T>(experts * out * in);
  const auto bias = draw<T>(experts * out), grad = draw<T>(experts * rows * out);
  auto y = unwritten<T>(grad.size()), grad_x = unwritten<T>(x.size());
  auto grad_w = unwritten<T>(w.size()), grad_bias = unwritten<T>(bias.size());
  const LinearArgs args{
      x.data(),         w.data(), bias.data(), grad.data(), y.data(), grad_x.data(), grad_w.data(),
      grad_bias.data(), experts,  rows,        in,          out,      kThreads};
  kernels.linear_forward(kType<T>.code, args);
  kernels.linear_backward(kType<T>.code, args);
  check.budget<T>("linear " + std::to_string(rows),
                  {result("out", y), result("grad x", grad_x), result("grad weight", grad_w),
                   result("grad bias", grad_bias)},
                  [&]<typename R>() {
                    return linear(experts, rows, in, out, as<R>(x), as<R>(w), as<R>(bias),
                                  as<R>(grad));
                  });
}

template <typename T>
void mlp_case(int64_t experts, int64_t rows, int64_t in, int64_t hidden, int64_t out,
              const Mask& mask) {
  const auto x = draw<T>(experts * rows * in), w_in = draw<T>(experts * hidden * in, 0.3);
  const auto b_in = draw<T>(experts * hidden), w_out = draw<T>(experts * out * hidden, 0.3);
  const auto b_out = draw<T>(experts * out), grad = draw<T>(experts * rows * out);
  auto h = unwritten<T>(experts * rows * hidden), y = unwritten<T>(grad.size());
  auto grad_x = unwritten<T>(x.size()), grad_w_in = unwritten<T>(w_in.size());
  auto grad_b_in = unwritten<T>(b_in.size()), grad_w_out = unwritten<T>(w_out.size());
  auto grad_b_out = unwritten<T>(b_out.size());
  MlpArgs args{};
  args.x = x.data(), args.w_in = w_in.data(), args.b_in = b_in.data(), args.w_out = w_out.data();
  args.b_out = b_out.data(), args.grad_out = grad.data(), args.dropout = mask.spec();
  args.hidden = h.data(), args.out = y.data(), args.grad_x = grad_x.data();
  args.grad_w_in = grad_w_in.data(), args.grad_b_in = grad_b_in.data();
  args.grad_w_out = grad_w_out.data(), args.grad_b_out = grad_b_out.data();
  args.experts = experts, args.rows = rows, args.in_width = in, args.hidden_width = hidden;
  args.out_width = out, args.threads = kThreads;
  kernels.mlp_forward(kType<T>.code, args);
  kernels.mlp_backward(kType<T>.code, args);
  check.budget<T>("mlp",
                  {result("hidden", h), result("out", y), result("grad x", grad_x),
                   result("grad w_in", grad_w_in), result("grad b_in", grad_b_in),
                   result("grad w_out", grad_w_out), result("grad b_out", grad_b_out)},
                  [&]<typename R>() {
                    return mlp(experts, rows, in, hidden, out, as<R>(x), as<R>(w_in), as<R>(b_in),
                               as<R>(w_out), as<R>(b_out), as<R>(grad), mask);
                  });
}

template <typename T>
void norm_case(int64_t experts, int64_t rows, int64_t width, const Mask& mask) {
  using A = Computed<T>;
  const int64_t n = experts * rows * width;
  const auto residual = draw<T>(n), update = draw<T>(n), grad_sum = draw<T>(n), grad = draw<T>(n);
  const auto gain = draw<T>(experts * width), shift = draw<T>(experts * width);
  auto sum = unwritten<T>(n), normed = sum, grad_residual = sum, grad_update = sum;
  auto mean = unwritten<A>(experts * rows), rstd = mean;
  auto grad_gain = unwritten<T>(gain.size()), grad_shift = grad_gain;
  NormArgs args{};
  args.residual = residual.data(), args.update = update.data(), args.gain = gain.data();
  args.shift = shift.data(), args.eps = 1e-5, args.dropout = mask.spec();
  args.sum = sum.data(), args.normed = normed.data(), args.mean = mean.data();
  args.rstd = rstd.data(), args.grad_sum = grad_sum.data(), args.grad_normed = grad.data();
  args.grad_residual = grad_residual.data(), args.grad_update = grad_update.data();
  args.grad_gain = grad_gain.data(), args.grad_shift = grad_shift.data();
  args.experts = experts, args.rows = rows, args.width = width, args.threads = kThreads;
  kernels.norm_forward(kType<T>.code, args);
  kernels.norm_backward(kType<T>.code, args);
  check.budget<T>(
      "norm",
      {result("sum", sum), result("norm", normed), result("mean", mean), result("rstd", rstd),
       result("grad residual", grad_residual), result("grad update", grad_update),
       result("grad gain", grad_gain), result("grad shift", grad_shift)},
      [&]<typename R>() {
        return norm(experts, rows, width, as<R>(residual), as<R>(update), as<R>(gain), as<R>(shift),
                    R(1e-5), mask, as<R>(grad_sum), as<R>(grad));
      });
}

template <typename T>
void attention_case(const std::vector<int32_t>& bounds, int64_t heads, int64_t width,
                    const Mask& mask) {
  const int64_t rows = bounds.back(), n = rows * heads * width;
  const auto q = draw<T>(n), k = draw<T>(n), v = draw<T>(n), grad = draw<T>(n);
  auto out = unwritten<T>(n), grad_q = out, grad_k = out, grad_v = out;
  auto lse = unwritten<Computed<T>>(rows * heads);
  const auto view = [&](const Values<T>& x) { return RowView{x.data(), n, heads * width, width}; };
  const double scale = 1 / std::sqrt(static_cast<double>(width));
  AttentionForward forward{};
  forward.q = view(q), forward.k = view(k), forward.v = view(v);
  forward.cumulative = bounds.data(), forward.groups = 1, forward.problems = bounds.size() - 1;
  forward.rows = rows, forward.heads = heads, forward.width = width, forward.scale = scale;
  forward.dropout = mask.spec(), forward.out = out.data(), forward.lse = lse.data();
  forward.threads = kThreads;
  kernels.attention_forward(kType<T>.code, forward);
  kernels.attention_backward(kType<T>.code,
                             {forward, view(grad), view(grad_q), view(grad_k), view(grad_v)});
  check.budget<T>("attention " + std::to_string(rows),
                  {result("out", out), result("log-sum-exp", lse), result("grad q", grad_q),
                   result("grad k", grad_k), result("grad v", grad_v)},
                  [&]<typename R>() {
                    return attention(bounds, heads, width, R(scale), as<R>(q), as<R>(k), as<R>(v),
                                     as<R>(grad), mask);
                  });
}

template <typename T>
void encoder_case(const std::vector<int32_t>& samples, const std::vector<int32_t>& segments,
                  int64_t heads, int64_t width, int64_t hidden) {
  const int64_t rows = samples.back(), layers = 2;
  const int64_t sizes[12] = {width,          width,  width * width,  2 * width * width,
                             width * width,  width,  width,          width,
                             width * hidden, hidden, hidden * width, width};
  std::vector<Values<T>> weights;
  std::vector<const void*> pointers;
  for (int64_t i = 0; i < 12 * layers; ++i) weights.push_back(draw<T>(sizes[i % 12], 0.3));
  for (const auto& weight : weights) pointers.push_back(weight.data());
  const auto x = draw<T>(rows * width);
  const int64_t count = segments.size() - 1;
  auto out = unwritten<T>(count * width);
  kernels.encoder_inference(
      kType<T>.code, {x.data(), nullptr, samples.data(), segments.data(), pointers.data(),
                      out.data(), 1, rows, rows, static_cast<int64_t>(samples.size()) - 1, count, 1,
                      layers, width, hidden, heads, 1e-5, false, kThreads});
  check.budget<T>("encoder", {result("out", out)}, [&]<typename R>() {
    Results<R> plain_weights;
    for (const auto& weight : weights) plain_weights.push_back(as<R>(weight));
    return Results<R>{
        encoder(samples, segments, heads, width, hidden, R(1e-5), as<R>(x), plain_weights)};
  });
}

template <typename T>
void pair_case(const std::vector<int>& kinds, int64_t rows, int64_t columns, int64_t rank,
               int64_t width, int64_t top_k, PairReduce reduce, bool masked) {
  using A = Computed<T>;
  constexpr int64_t kBatch = 2, kCount = 7;
  const int64_t experts = kinds.size(), groups = kBatch * experts;
  const bool none = reduce == PairReduce::kNone, pool = reduce == PairReduce::kPool;
  const int64_t y_rows = none ? groups * rows : pool ? groups : kBatch * rows;
  const auto q = draw<T>(groups * rows * rank), k = draw<T>(groups * columns * rank);
  const auto a = draw<T>(groups * rows * width), c = draw<T>(groups * columns * width);
  const auto head = draw<T>(groups * width), grad_y = draw<T>(y_rows * width);
  const auto bias = draw<A>(experts), grad_mass = draw<A>(groups * rows);
  const auto grad_pooled = as<A>(grad_y);  // under kPool it is of the compute type
  std::vector<uint8_t> mask_a(kBatch * rows), mask_b(kBatch * columns);
  for (size_t i = 0; i < mask_a.size(); ++i) mask_a[i] = i % 5 != 3;
  for (size_t i = 0; i < mask_b.size(); ++i) mask_b[i] = i % 7 != 2;

  PairArgs in{};
  const auto view = [&](const auto& x, int64_t length, int64_t size) {
    return RowView{x.data(), experts * length * size, size, length * size};
  };
  in.q = view(q, rows, rank), in.k = view(k, columns, rank), in.a = view(a, rows, width);
  in.c = view(c, columns, width), in.gate_bias = bias.data();
  if (masked) in.mask_a = mask_a.data(), in.mask_b = mask_b.data();
  in.batch = kBatch, in.experts = experts, in.rows = rows, in.columns = columns;
  in.rank = rank, in.width = width, in.top_k = top_k, in.threads = kThreads;
  in.scale = 1 / std::sqrt(static_cast<double>(rank));
  std::copy(kinds.begin(), kinds.end(), in.kinds);

  // Masked rows are not written.
  auto y = zeros<T>(y_rows * width);
  auto y_pooled = zeros<A>(y_rows * width), mass = zeros<A>(groups * rows);
  auto map = zeros<A>(groups * rows * columns);
  auto best = unwritten<A>(kBatch * (experts + 1) * kCount);
  std::vector<int64_t> i(best.size()), j(best.size());
  std::vector<PairCandidate> candidates(pair_candidates(in, kCount));
  auto grad_q = zeros<A>(q.size()), grad_k = zeros<A>(k.size()), grad_a = zeros<A>(a.size());
  auto grad_c = zeros<A>(c.size()), grad_bias = unwritten<A>(experts);
  const RowView head_view{head.data(), experts * width, 0, width};
  const RowView grad_view = none   ? view(grad_y, rows, width)
                            : pool ? RowView{grad_pooled.data(), experts * width, 0, width}
                                   : RowView{grad_y.data(), rows * width, width, 0};
  kernels.pair_forward(
      kType<T>.code,
      {in, reduce, pool ? static_cast<void*>(y_pooled.data()) : y.data(), mass.data()});
  kernels.pair_map(kType<T>.code,
                   {in, head_view, map.data(), 0, nullptr, nullptr, nullptr, nullptr});
  kernels.pair_top(kType<T>.code, {in, head_view, nullptr, kCount, best.data(), i.data(), j.data(),
                                   candidates.data()});
  kernels.pair_backward(kType<T>.code,
                        {in, reduce, grad_view, grad_mass.data(), grad_q.data(), grad_k.data(),
                         grad_a.data(), grad_c.data(), grad_bias.data(), false});
  check.budget<T>(
      "pair_moe " + std::to_string(experts),
      {pool ? result("y", y_pooled) : result("y", y), result("mass", mass), result("map", map),
       result("top pairs", best), result("grad q", grad_q), result("grad k", grad_k),
       result("grad a", grad_a), result("grad c", grad_c), result("grad bias", grad_bias)},
      [&]<typename R>() {
        return pair_moe<R>(in, reduce, kCount,
                           {as<R>(q), as<R>(k), as<R>(a), as<R>(c), as<R>(bias), as<R>(head),
                            as<R>(grad_y), as<R>(grad_mass)});
      });
}

// The experts of each token, every seventh choice dropped, and the rows by expert.
template <typename T>
struct Routing {
  std::vector<int64_t> index;
  Values<T> weight;
  std::vector<int32_t> counts, offsets, permutation;

  Routing(int64_t tokens, int64_t choices, int64_t experts, bool over_all)
      : index(tokens * choices),
        weight(unwritten<T>(tokens * choices)),
        counts(experts),
        offsets(experts + 1),
        permutation(tokens * choices) {
    const auto logits = draw<T>(tokens * experts);
    kernels.routing_gate(kType<T>.code, {logits.data(), index.data(), weight.data(), tokens,
                                         experts, choices, over_all, kThreads});
    const Values<float> chosen(index.begin(), index.end());
    check.budget<T>("gate", {result("weight", weight), result("index", chosen)},
                    [&]<typename R>() { return gate(experts, choices, over_all, as<R>(logits)); });
    for (size_t r = 0; r < index.size(); r += 7) index[r] = -1;
    const bool in_range = kernels.routing_dispatch({index.data(), counts.data(), offsets.data(),
                                                    permutation.data(), tokens * choices, experts});
    std::vector<int32_t> sorted;
    for (int64_t e = 0; e <= experts; ++e) {
      check.expect(in_range && offsets[e] == static_cast<int32_t>(sorted.size()), "offsets");
      for (size_t r = 0; r < index.size(); ++r)
        if (index[r] == (e < experts ? e : -1)) sorted.push_back(static_cast<int32_t>(r));
    }
    check.expect(sorted == permutation, "permutation");
  }
};

template <typename T>
void routed_case(int64_t tokens, int64_t choices, int64_t experts, int64_t width, int64_t hidden,
                 int act, bool gated) {
  const Routing<T> routing(tokens, choices, experts, act % 2 == 1);
  const Values<T>& weight = routing.weight;
  const int64_t rows = tokens * choices;
  const int64_t in_size = experts * hidden * width, gate_size = gated ? in_size : 0;
  const auto x = draw<T>(tokens * width), w_in = draw<T>(in_size, 0.3);
  const auto b_in = draw<T>(experts * hidden), w_out = draw<T>(in_size, 0.3);
  const auto b_out = draw<T>(experts * width), w_gate = draw<T>(gate_size, 0.3);
  const auto b_gate = draw<T>(gated ? experts * hidden : 0), grad = draw<T>(x.size());
  auto out = unwritten<T>(x.size()), h = unwritten<T>((1 + gated) * rows * hidden);
  auto grad_x = out, grad_weight = zeros<T>(rows), grad_w_in = unwritten<T>(in_size);
  auto grad_b_in = unwritten<T>(b_in.size()), grad_w_out = unwritten<T>(in_size);
  auto grad_b_out = unwritten<T>(b_out.size()), grad_w_gate = unwritten<T>(gate_size);
  auto grad_b_gate = unwritten<T>(b_gate.size());
  RoutedArgs in{};
  in.x = x.data(), in.weight = weight.data(), in.w_in = w_in.data(), in.b_in = b_in.data();
  in.w_out = w_out.data(), in.b_out = b_out.data();
  if (gated) in.w_gate = w_gate.data(), in.b_gate = b_gate.data();
  in.offsets = routing.offsets.data(), in.permutation = routing.permutation.data();
  in.tokens = tokens, in.choices = choices, in.experts = experts, in.width = width;
  in.hidden = hidden, in.w_in_stride = in.w_gate_stride = hidden * width;
  in.act = act, in.threads = kThreads;
  kernels.routed_forward(kType<T>.code, {in, out.data(), h.data()});
  kernels.routed_backward(
      kType<T>.code, {in, grad.data(), h.data(), grad_x.data(), grad_weight.data(),
                      grad_w_in.data(), grad_b_in.data(), grad_w_out.data(), grad_b_out.data(),
                      gated ? grad_w_gate.data() : nullptr, gated ? grad_b_gate.data() : nullptr});
  check.budget<T>("routed_mlp " + std::to_string(act) + (gated ? " gated" : ""),
                  {result("out", out), result("grad x", grad_x), result("grad weight", grad_weight),
                   result("grad w_in", grad_w_in), result("grad b_in", grad_b_in),
                   result("grad w_out", grad_w_out), result("grad b_out", grad_b_out),
                   result("grad w_gate", grad_w_gate), result("grad b_gate", grad_b_gate)},
                  [&]<typename R>() {
                    return routed<R>(
                        in, routing.index,
                        {as<R>(x), as<R>(weight), as<R>(w_in), as<R>(b_in), as<R>(w_out),
                         as<R>(b_out), as<R>(w_gate), as<R>(b_gate), as<R>(grad)});
                  });
}

// The masks are those of the definition bit for bit, so they are the same on all processors. The
// dropout of ones shows them.
template <typename T>
void mask_case(uint32_t threshold) {
  constexpr int64_t kExperts = 2, kRows = 5, kWidth = 301;
  const Mask mask{-0x123456789abcdef, threshold}, other{mask.seed + 1, threshold};
  const Values<T> zero = zeros<T>(kExperts * kRows * kWidth), one(zero.size(), stored<T>(1));
  const Values<T> gain(kExperts * kWidth, stored<T>(1));
  auto sum = zero, normed = zero;
  auto mean = zeros<Computed<T>>(kExperts * kRows), rstd = mean;
  NormArgs args{};
  args.residual = zero.data(), args.update = one.data(), args.gain = args.shift = gain.data();
  args.dropout = mask.spec(), args.sum = sum.data(), args.normed = normed.data();
  args.mean = mean.data(), args.rstd = rstd.data();
  args.experts = kExperts, args.rows = kRows, args.width = kWidth, args.threads = kThreads;
  kernels.norm_forward(kType<T>.code, args);
  const Values<double> kept = as<double>(sum);
  int64_t wrong = 0, control = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(kept.size()); ++i) {
    const int64_t expert = i / kWidth / kRows, row = i / kWidth % kRows, column = i % kWidth;
    wrong += (kept[i] != 0) != mask.keeps(0, expert, row, column);
    control += (kept[i] != 0) != other.keeps(0, expert, row, column);
  }
  const std::string name = std::string("mask in ") + kType<T>.name;
  check.expect(wrong == 0, name + ": " + std::to_string(wrong) + " differ");
  check.expect(control != 0, name + ": the mask of another seed passes");
}

// All values of a type of 16 bits, and rounding to nearest even on both sides of every midpoint.
template <typename T>
void conversion_case(int mantissa, int bias) {
  const auto exact = [&](uint32_t bits) {
    const int exponent = static_cast<int>(bits >> mantissa);
    const double fraction = bits & ((1u << mantissa) - 1);
    return exponent == 0 ? std::ldexp(fraction, 1 - bias - mantissa)
                         : std::ldexp(fraction + (1 << mantissa), exponent - bias - mantissa);
  };
  const uint32_t infinity = (2u * bias + 1) << mantissa;
  Values<T> all;
  Values<float> read(0x10000), inputs;
  for (uint32_t bits = 0; bits < 0x10000; ++bits) all.push_back({static_cast<uint16_t>(bits)});
  baseline::read_row<T, float>(all.data(), read.data(), static_cast<int64_t>(all.size()));
  std::vector<uint16_t> expected;
  int64_t wrong = 0;
  for (uint32_t bits = 0; bits < 0x8000; ++bits)
    for (const float x : {read[bits], -read[bits + 0x8000]})
      wrong += bits > infinity ? x == x : x != (bits == infinity ? INFINITY : exact(bits));
  for (uint32_t bits = 0; bits + 1 < infinity; ++bits)
    for (const int sign : {1, -1}) {
      const auto middle = static_cast<float>((exact(bits) + exact(bits + 1)) / 2);
      const uint32_t rounded[] = {bits, bits + (bits & 1), bits + 1};
      const float around[] = {std::nextafter(middle, 0.0f), middle,
                              std::nextafter(middle, INFINITY)};
      for (int i = 0; i < 3; ++i) {
        inputs.push_back(static_cast<float>(sign) * around[i]);
        expected.push_back(static_cast<uint16_t>(rounded[i] | (sign < 0 ? 0x8000 : 0)));
      }
    }
  for (const float x : {INFINITY, -INFINITY, static_cast<float>(exact(infinity)), NAN})
    inputs.push_back(x), expected.push_back(infinity | (x < 0 ? 0x8000 : 0));
  Values<T> written(inputs.size());
  baseline::write_row<T, float>(inputs.data(), written.data(), written.size());
  for (size_t i = 0; i + 1 < written.size(); ++i) wrong += written[i].bits != expected[i];
  wrong += (written.back().bits & 0x7fff) <= infinity;  // NaN
  check.expect(wrong == 0, std::string("conversion of ") + kType<T>.name + ": " +
                               std::to_string(wrong) + " wrong values");
}

template <typename T>
void all_cases() {
  for (const auto& [rows, in, out] : {std::array<int64_t, 3>{1, 5, 3}, {7, 64, 64}, {290, 17, 67}})
    linear_case<T>(2, rows, in, out);
  for (const Mask& mask : {kAll, kDropped}) {
    mlp_case<T>(2, 103, 13, 139, 17, mask);
    norm_case<T>(2, 67, 133, mask);
    attention_case<T>({0, 5, 5, 146, 154}, 2, 9, mask);
    attention_case<T>({0, 400}, 1, 16, mask);
  }
  encoder_case<T>({0, 7, 110}, {0, 5, 7, 60, 110}, 2, 24, 37);
  encoder_case<T>({0, 31}, {0, 31}, 3, 15, 20);
  const PairReduce reductions[] = {PairReduce::kNone, PairReduce::kExperts, PairReduce::kPool};
  for (const PairReduce reduce : reductions)
    for (const bool masked : {false, true}) {
      pair_case<T>({0, 1, 2, 3}, 27, 135, 5, 17, masked ? 2 : 4, reduce, masked);
      pair_case<T>({2, 4, 3, 0, 1}, 70, 30, 8, 16, masked ? 5 : 3, reduce, masked);
    }
  for (int act = 0; act < kActs; ++act)
    for (const bool gated : {false, true}) routed_case<T>(150, 2, 5, 17, 69, act, gated);
  for (const uint32_t threshold : {1u << 8, 39322u, 65000u}) mask_case<T>(threshold);
}

int run() {
  all_cases<float>();
  all_cases<double>();
  all_cases<BFloat16>();
  all_cases<Float16>();
  conversion_case<BFloat16>(7, 127);
  conversion_case<Float16>(10, 15);
  std::printf("%s: %d comparisons passed, %d failed\n", active_instruction_set(), check.passed,
              check.failed);
  return check.failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace flmoe::test

int main() {
  return flmoe::test::run();
}
