// Runs the CPU kernels without Python and torch, for processors that are only emulated:
//     driver record FILE     writes the results, on a processor on which the Python tests pass
//     driver compare FILE    compares the results with those in the file
// The results are deterministic; the inputs are random with a fixed seed.
#include <array>

#include "compare.h"

namespace flmoe::test {
namespace {

constexpr int kThreads = 2;
const Kernels& kernels = active_kernels();
Comparisons check;
constexpr int64_t kSeed = 0x1234567890abcdef;
constexpr uint32_t kAll = 65536, kDropped = 39322;  // thresholds of dropout
enum Act { kGelu, kGeluTanh, kRelu, kSilu, kActs };

DropoutSpec dropout(uint32_t threshold) {
  return {&kSeed, threshold};
}

template <typename T>
void linear_case(int64_t experts, int64_t rows, int64_t in, int64_t out) {
  check.budget<T>("linear " + std::to_string(rows), [&]<typename K>() {
    Draw<T, K> draw;
    const auto x = draw(experts * rows * in), w = draw(experts * out * in);
    const auto bias = draw(experts * out), grad = draw(experts * rows * out);
    auto y = unwritten<K>(grad.size()), grad_x = unwritten<K>(x.size());
    auto grad_w = unwritten<K>(w.size()), grad_bias = unwritten<K>(bias.size());
    const LinearArgs args{
        x.data(),      w.data(),         bias.data(), grad.data(), y.data(), grad_x.data(),
        grad_w.data(), grad_bias.data(), experts,     rows,        in,       out,
        kThreads};
    kernels.linear_forward(kType<K>.code, args);
    kernels.linear_backward(kType<K>.code, args);
    return Results{result("out", y), result("grad x", grad_x), result("grad weight", grad_w),
                   result("grad bias", grad_bias)};
  });
}

template <typename T>
void mlp_case(int64_t experts, int64_t rows, int64_t in, int64_t hidden, int64_t out,
              uint32_t threshold) {
  check.budget<T>("mlp", [&]<typename K>() {
    Draw<T, K> draw;
    const auto x = draw(experts * rows * in), w_in = draw(experts * hidden * in, 0.3);
    const auto b_in = draw(experts * hidden), w_out = draw(experts * out * hidden, 0.3);
    const auto b_out = draw(experts * out), grad = draw(experts * rows * out);
    auto h = unwritten<K>(experts * rows * hidden), y = unwritten<K>(grad.size());
    auto grad_x = unwritten<K>(x.size()), grad_w_in = unwritten<K>(w_in.size());
    auto grad_b_in = unwritten<K>(b_in.size()), grad_w_out = unwritten<K>(w_out.size());
    auto grad_b_out = unwritten<K>(b_out.size());
    MlpArgs args{};
    args.x = x.data(), args.w_in = w_in.data(), args.b_in = b_in.data(), args.w_out = w_out.data();
    args.b_out = b_out.data(), args.grad_out = grad.data(), args.dropout = dropout(threshold);
    args.hidden = h.data(), args.out = y.data(), args.grad_x = grad_x.data();
    args.grad_w_in = grad_w_in.data(), args.grad_b_in = grad_b_in.data();
    args.grad_w_out = grad_w_out.data(), args.grad_b_out = grad_b_out.data();
    args.experts = experts, args.rows = rows, args.in_width = in, args.hidden_width = hidden;
    args.out_width = out, args.threads = kThreads;
    kernels.mlp_forward(kType<K>.code, args);
    kernels.mlp_backward(kType<K>.code, args);
    return Results{result("hidden", h),
                   result("out", y),
                   result("grad x", grad_x),
                   result("grad w_in", grad_w_in),
                   result("grad b_in", grad_b_in),
                   result("grad w_out", grad_w_out),
                   result("grad b_out", grad_b_out)};
  });
}

template <typename T>
void norm_case(int64_t experts, int64_t rows, int64_t width, uint32_t threshold) {
  check.budget<T>("norm", [&]<typename K>() {
    Draw<T, K> draw;
    using A = Computed<K>;
    const int64_t n = experts * rows * width;
    const auto residual = draw(n), update = draw(n), grad_sum = draw(n), grad = draw(n);
    const auto gain = draw(experts * width), shift = draw(experts * width);
    auto sum = unwritten<K>(n), normed = sum, grad_residual = sum, grad_update = sum;
    auto mean = unwritten<A>(experts * rows), rstd = mean;
    auto grad_gain = unwritten<K>(gain.size()), grad_shift = grad_gain;
    NormArgs args{};
    args.residual = residual.data(), args.update = update.data(), args.gain = gain.data();
    args.shift = shift.data(), args.eps = 1e-5, args.dropout = dropout(threshold);
    args.sum = sum.data(), args.normed = normed.data(), args.mean = mean.data();
    args.rstd = rstd.data(), args.grad_sum = grad_sum.data(), args.grad_normed = grad.data();
    args.grad_residual = grad_residual.data(), args.grad_update = grad_update.data();
    args.grad_gain = grad_gain.data(), args.grad_shift = grad_shift.data();
    args.experts = experts, args.rows = rows, args.width = width, args.threads = kThreads;
    kernels.norm_forward(kType<K>.code, args);
    kernels.norm_backward(kType<K>.code, args);
    return Results{result("sum", sum),
                   result("norm", normed),
                   result("mean", mean),
                   result("rstd", rstd),
                   result("grad residual", grad_residual),
                   result("grad update", grad_update),
                   result("grad gain", grad_gain),
                   result("grad shift", grad_shift)};
  });
}

template <typename T>
void attention_case(const std::vector<int32_t>& bounds, int64_t heads, int64_t width,
                    uint32_t threshold) {
  check.budget<T>("attention " + std::to_string(bounds.back()), [&]<typename K>() {
    Draw<T, K> draw;
    const int64_t rows = bounds.back(), n = rows * heads * width;
    const auto q = draw(n), k = draw(n), v = draw(n), grad = draw(n);
    auto out = unwritten<K>(n), grad_q = out, grad_k = out, grad_v = out;
    auto lse = unwritten<Computed<K>>(rows * heads);
    const auto view = [&](const Values<K>& x) {
      return RowView{x.data(), n, heads * width, width};
    };
    const double scale = 1 / std::sqrt(static_cast<double>(width));
    AttentionForward forward{};
    forward.q = view(q), forward.k = view(k), forward.v = view(v);
    forward.cumulative = bounds.data(), forward.groups = 1, forward.problems = bounds.size() - 1;
    forward.rows = rows, forward.heads = heads, forward.width = width, forward.scale = scale;
    forward.dropout = dropout(threshold), forward.out = out.data(), forward.lse = lse.data();
    forward.threads = kThreads;
    kernels.attention_forward(kType<K>.code, forward);
    kernels.attention_backward(kType<K>.code,
                               {forward, view(grad), view(grad_q), view(grad_k), view(grad_v)});
    return Results{result("out", out), result("log-sum-exp", lse), result("grad q", grad_q),
                   result("grad k", grad_k), result("grad v", grad_v)};
  });
}

template <typename T>
void encoder_case(const std::vector<int32_t>& samples, const std::vector<int32_t>& segments,
                  int64_t heads, int64_t width, int64_t hidden) {
  check.budget<T>("encoder", [&]<typename K>() {
    Draw<T, K> draw;
    const int64_t rows = samples.back(), layers = 2;
    const int64_t sizes[12] = {width,          width,  width * width,  2 * width * width,
                               width * width,  width,  width,          width,
                               width * hidden, hidden, hidden * width, width};
    std::vector<Values<K>> weights;
    std::vector<const void*> pointers;
    for (int64_t i = 0; i < 12 * layers; ++i) weights.push_back(draw(sizes[i % 12], 0.3));
    for (const auto& weight : weights) pointers.push_back(weight.data());
    const auto x = draw(rows * width);
    const int64_t count = segments.size() - 1;
    auto out = unwritten<K>(count * width);
    kernels.encoder_inference(
        kType<K>.code, {x.data(), nullptr, samples.data(), segments.data(), pointers.data(),
                        out.data(), 1, rows, rows, static_cast<int64_t>(samples.size()) - 1, count,
                        1, layers, width, hidden, heads, 1e-5, false, kThreads});
    return Results{result("out", out)};
  });
}

template <typename T>
void pair_case(const std::vector<int>& kinds, int64_t rows, int64_t columns, int64_t rank,
               int64_t width, int64_t top_k, PairReduce reduce, bool masked) {
  check.budget<T>("pair_moe " + std::to_string(kinds.size()), [&]<typename K>() {
    Draw<T, K> draw;
    using A = Computed<K>;
    constexpr int64_t kBatch = 2, kCount = 7;
    const int64_t experts = kinds.size(), groups = kBatch * experts;
    const bool none = reduce == PairReduce::kNone, pool = reduce == PairReduce::kPool;
    const int64_t y_rows = none ? groups * rows : pool ? groups : kBatch * rows;
    const auto q = draw(groups * rows * rank), k = draw(groups * columns * rank);
    const auto a = draw(groups * rows * width), c = draw(groups * columns * width);
    const auto head = draw(groups * width), grad_y = draw(y_rows * width);
    const auto bias = draw.computed(experts), grad_mass = draw.computed(groups * rows);
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
    auto y = zeros<K>(y_rows * width);
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
        kType<K>.code,
        {in, reduce, pool ? static_cast<void*>(y_pooled.data()) : y.data(), mass.data()});
    kernels.pair_map(kType<K>.code,
                     {in, head_view, map.data(), 0, nullptr, nullptr, nullptr, nullptr});
    kernels.pair_top(kType<K>.code, {in, head_view, nullptr, kCount, best.data(), i.data(),
                                     j.data(), candidates.data()});
    kernels.pair_backward(kType<K>.code,
                          {in, reduce, grad_view, grad_mass.data(), grad_q.data(), grad_k.data(),
                           grad_a.data(), grad_c.data(), grad_bias.data(), false});
    return Results{pool ? result("y", y_pooled) : result("y", y),
                   result("mass", mass),
                   result("map", map),
                   result("top pairs", best),
                   result("grad q", grad_q),
                   result("grad k", grad_k),
                   result("grad a", grad_a),
                   result("grad c", grad_c),
                   result("grad bias", grad_bias)};
  });
}

template <typename T>
void gate_case(int64_t tokens, int64_t choices, int64_t experts, bool over_all) {
  check.budget<T>("gate", [&]<typename K>() {
    Draw<T, K> draw;
    const auto logits = draw(tokens * experts);
    std::vector<int64_t> index(tokens * choices);
    auto weight = unwritten<K>(index.size());
    kernels.routing_gate(kType<K>.code, {logits.data(), index.data(), weight.data(), tokens,
                                         experts, choices, over_all, kThreads});
    const Values<float> chosen(index.begin(), index.end());
    return Results{result("weight", weight), result("index", chosen)};
  });
}

// Rows by expert; every seventh choice is dropped.
struct Routing {
  std::vector<int64_t> index;
  std::vector<int32_t> counts, offsets, permutation;

  Routing(int64_t rows, int64_t experts)
      : index(rows), counts(experts), offsets(experts + 1), permutation(rows) {
    for (int64_t r = 0; r < rows; ++r) index[r] = r % 7 == 0 ? -1 : r * r % 11 % experts;
    const bool in_range = kernels.routing_dispatch(
        {index.data(), counts.data(), offsets.data(), permutation.data(), rows, experts});
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
  check.budget<T>("routed_mlp " + std::to_string(act) + (gated ? " gated" : ""), [&]<typename K>() {
    Draw<T, K> draw;
    const int64_t rows = tokens * choices;
    const Routing routing(rows, experts);
    const auto weight = draw(rows);
    const int64_t in_size = experts * hidden * width, gate_size = gated ? in_size : 0;
    const auto x = draw(tokens * width), w_in = draw(in_size, 0.3);
    const auto b_in = draw(experts * hidden), w_out = draw(in_size, 0.3);
    const auto b_out = draw(experts * width), w_gate = draw(gate_size, 0.3);
    const auto b_gate = draw(gated ? experts * hidden : 0), grad = draw(x.size());
    auto out = unwritten<K>(x.size()), h = unwritten<K>((1 + gated) * rows * hidden);
    auto grad_x = out, grad_weight = zeros<K>(rows), grad_w_in = unwritten<K>(in_size);
    auto grad_b_in = unwritten<K>(b_in.size()), grad_w_out = unwritten<K>(in_size);
    auto grad_b_out = unwritten<K>(b_out.size()), grad_w_gate = unwritten<K>(gate_size);
    auto grad_b_gate = unwritten<K>(b_gate.size());
    RoutedArgs in{};
    in.x = x.data(), in.weight = weight.data(), in.w_in = w_in.data(), in.b_in = b_in.data();
    in.w_out = w_out.data(), in.b_out = b_out.data();
    if (gated) in.w_gate = w_gate.data(), in.b_gate = b_gate.data();
    in.offsets = routing.offsets.data(), in.permutation = routing.permutation.data();
    in.tokens = tokens, in.choices = choices, in.experts = experts, in.width = width;
    in.hidden = hidden, in.w_in_stride = in.w_gate_stride = hidden * width;
    in.act = act, in.threads = kThreads;
    kernels.routed_forward(kType<K>.code, {in, out.data(), h.data()});
    kernels.routed_backward(
        kType<K>.code,
        {in, grad.data(), h.data(), grad_x.data(), grad_weight.data(), grad_w_in.data(),
         grad_b_in.data(), grad_w_out.data(), grad_b_out.data(),
         gated ? grad_w_gate.data() : nullptr, gated ? grad_b_gate.data() : nullptr});
    return Results{result("out", out),
                   result("grad x", grad_x),
                   result("grad weight", grad_weight),
                   result("grad w_in", grad_w_in),
                   result("grad b_in", grad_b_in),
                   result("grad w_out", grad_w_out),
                   result("grad b_out", grad_b_out),
                   result("grad w_gate", grad_w_gate),
                   result("grad b_gate", grad_b_gate)};
  });
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
  for (const uint32_t threshold : {kAll, kDropped}) {
    mlp_case<T>(2, 103, 13, 139, 17, threshold);
    attention_case<T>({0, 5, 5, 146, 154}, 2, 9, threshold);
    attention_case<T>({0, 400}, 1, 16, threshold);
  }
  for (const uint32_t threshold : {kAll, 65000u, kDropped, 1u << 8})
    norm_case<T>(2, 67, 301, threshold);
  encoder_case<T>({0, 7, 110}, {0, 5, 7, 60, 110}, 2, 24, 37);
  encoder_case<T>({0, 31}, {0, 31}, 3, 15, 20);
  const PairReduce reductions[] = {PairReduce::kNone, PairReduce::kExperts, PairReduce::kPool};
  for (const PairReduce reduce : reductions)
    for (const bool masked : {false, true}) {
      pair_case<T>({0, 1, 2, 3}, 27, 135, 5, 17, masked ? 2 : 4, reduce, masked);
      pair_case<T>({2, 4, 3, 0, 1}, 70, 30, 8, 16, masked ? 5 : 3, reduce, masked);
    }
  for (const bool over_all : {false, true}) gate_case<T>(150, 2, 5, over_all);
  for (int act = 0; act < kActs; ++act)
    for (const bool gated : {false, true}) routed_case<T>(150, 2, 5, 17, 69, act, gated);
}

int run(const std::string& mode, const char* path) {
  if (!check.open(mode, path)) {
    std::printf("driver: expected record or compare and a file, got %s %s\n", mode.c_str(), path);
    return 2;
  }
  all_cases<float>();
  all_cases<double>();
  all_cases<BFloat16>();
  all_cases<Float16>();
  conversion_case<BFloat16>(7, 127);
  conversion_case<Float16>(10, 15);
  check.expect(check.close(), "the file is complete");
  std::printf("%s: %d checks passed, %d failed\n", active_instruction_set(), check.passed,
              check.failed);
  return check.failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace flmoe::test

int main(int count, char** arguments) {
  return count == 3 ? flmoe::test::run(arguments[1], arguments[2]) : 2;
}
