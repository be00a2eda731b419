// Softmax attention in bfloat16 by vdpbf16ps; other dtypes run the kernels of avx512.
//
// Items and dropout are those of cpu/attention.h, the softmax that of cpu/softmax.h. Scores, sums
// and the softmax are float32; as operands of the second product, probabilities and the gradients
// of scores are rounded to bfloat16. Scores are scaled after the product, because a scaled q would
// be rounded.
#include "cpu/attention.h"
#include "cpu/gemm_bf16.h"

namespace flmoe::FLMOE_ISA {
namespace {

constexpr int64_t kForwardTile = 24;
constexpr int64_t kBackwardTile = 48;  // even: the depth of two of the five products
constexpr int64_t kPairRow = kPair * kKeyBlock;

// A view's rows of one problem and head, from row `first` of the problem.
struct Rows {
  const BFloat16* data;
  int64_t stride;

  Rows(const RowView& view, const Problem& p, int64_t first)
      : data(row_of<BFloat16>(view, p.group, p.first + first, p.head)), stride(view.row_stride) {}
};

void forward_item(const AttentionForward& args, const Problem& p, int64_t row0, int64_t rows) {
  const int64_t width = args.width, padded = round_up(width, kLanes<float>);
  const int64_t pairs = pairs_of(width), even = kPair * pairs;
  const auto scale = static_cast<float>(args.scale);
  const Dropout dropout = dropout_of(args.dropout);
  const Buffer<BFloat16> q(rows * even), keys(kKeyBlock * even), values(kKeyBlock * padded);
  const Buffer<float> out(rows * padded), maximum(rows), total(rows);
  const Buffer<float> tile(kForwardTile * kKeyBlock);
  const Buffer<BFloat16> probabilities(kForwardTile * kKeyBlock);
  const Rows queries(args.q, p, row0);
  pack_even_rows(queries.data, queries.stride, rows, width, q);
  for (int64_t i = 0; i < rows; ++i) maximum[i] = -INFINITY, total[i] = 0;
  for (int64_t i = 0; i < rows * padded; ++i) out[i] = 0;

  for (int64_t j0 = 0; j0 < p.length; j0 += kKeyBlock) {
    const int64_t count = min64(kKeyBlock, p.length - j0);
    const int64_t count_padded = round_up(count, kLanes<float>);
    const Rows k(args.k, p, j0), v(args.v, p, j0);
    pack_depth_columns(k.data, k.stride, width, count, count_padded, kPairRow, keys);
    pack_depth_rows(v.data, v.stride, count, width, padded, values);
    for (int64_t i0 = 0; i0 < rows; i0 += kForwardTile) {
      const int64_t tile_rows = min64(kForwardTile, rows - i0);
      gemm<NativeDot>(tile_rows, count_padded, pairs, q + i0 * even, even, kPair, keys, kPairRow,
                      tile, kKeyBlock, false);
      for (int64_t i = 0; i < tile_rows; ++i) {
        float* scores = tile + i * kKeyBlock;
        float* sums = out + (i0 + i) * padded;
        for (int64_t j = 0; j < count_padded; j += kLanes<float>)
          store(scores + j, load(scores + j) * scale);
        const float factor = softmax_row<float>(scores, count, maximum + i0 + i, total + i0 + i);
        if (factor != 1.0f)
          for (int64_t d = 0; d < padded; d += kLanes<float>)
            store(sums + d, load(sums + d) * factor);
        if (dropout.active())
          drop_row<float>(scores, count, dropout, p, p.group * args.problems + p.index,
                          row0 + i0 + i, j0 / kDropoutGroup);
        for (int64_t j = 0; j < count_padded; j += kLanes<float>)
          store_rounded(probabilities + i * kKeyBlock + j, load(scores + j));
      }
      gemm<NativeDot>(tile_rows, padded, pairs_of(count), probabilities, kKeyBlock, kPair, values,
                      kPair * padded, out + i0 * padded, padded, true);
    }
  }
  const auto kept = keep_scale<float>(dropout);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (p.group * args.rows + p.first + row0 + i) * args.heads + p.head;
    const float factor = kept / total[i];
    for (int64_t d = 0; d < padded; ++d) out[i * padded + d] *= factor;
    write_row<BFloat16, float>(out + i * padded, static_cast<BFloat16*>(args.out) + at * width,
                               width);
    // As in kernels/expert_attention.cpp: inf for a score of inf.
    static_cast<float*>(args.lse)[at] =
        maximum[i] == INFINITY ? maximum[i] : maximum[i] + std::log(total[i]);
  }
}

struct BackwardItem {
  const AttentionBackward& args;
  const AttentionForward& f;
  const Problem& p;
  bool wants_q, wants_k, wants_v;
  int64_t width, padded, even;
  Dropout dropout;
  float scale, kept;
  // Whole problem: rows as A, pair rows as B.
  Buffer<BFloat16> q, grad_out, q_pairs, grad_out_pairs;
  Buffer<float> grad_q, lse, delta;
  // One key block: pair rows with the depth of width, and with the depth of keys.
  Buffer<BFloat16> keys_t, values_t, key_pairs;
  Buffer<float> grad_keys, grad_values;
  // One tile: float32, rounded rows, rounded pair rows.
  Buffer<float> scores, grads;
  Buffer<BFloat16> probability_rows, grad_rows, probability_pairs, grad_pairs;

  BackwardItem(const AttentionBackward& args, const Problem& p)
      : args(args),
        f(args.forward),
        p(p),
        wants_q(args.grad_q.data != nullptr),
        wants_k(args.grad_k.data != nullptr),
        wants_v(args.grad_v.data != nullptr),
        width(f.width),
        padded(round_up(width, kLanes<float>)),
        even(kPair * pairs_of(width)),
        dropout(dropout_of(f.dropout)),
        scale(static_cast<float>(f.scale)),
        kept(keep_scale<float>(dropout)),
        q(p.length * even),
        grad_out(p.length * even),
        q_pairs(kPair * pairs_of(p.length) * padded),
        grad_out_pairs(kPair * pairs_of(p.length) * padded),
        grad_q(p.length * padded),
        lse(p.length),
        delta(p.length),
        keys_t(kKeyBlock * even),
        values_t(kKeyBlock * even),
        key_pairs(kKeyBlock * padded),
        grad_keys(kKeyBlock * padded),
        grad_values(kKeyBlock * padded),
        scores(kBackwardTile * kKeyBlock),
        grads(kBackwardTile * kKeyBlock),
        probability_rows(kBackwardTile * kKeyBlock),
        grad_rows(kBackwardTile * kKeyBlock),
        probability_pairs(kBackwardTile * kKeyBlock),
        grad_pairs(kBackwardTile * kKeyBlock) {}

  int64_t element(int64_t row) const {
    return (p.group * f.rows + p.first + row) * f.heads + p.head;
  }

  void load_problem() {
    const Rows queries(f.q, p, 0), grads_in(args.grad_out, p, 0);
    pack_even_rows(queries.data, queries.stride, p.length, width, q);
    pack_even_rows(grads_in.data, grads_in.stride, p.length, width, grad_out);
    pack_depth_rows(queries.data, queries.stride, p.length, width, padded, q_pairs);
    pack_depth_rows(grads_in.data, grads_in.stride, p.length, width, padded, grad_out_pairs);
    const Buffer<float> out_row(padded), grad_out_row(padded);
    for (int64_t d = width; d < padded; ++d) out_row[d] = 0, grad_out_row[d] = 0;
    for (int64_t i = 0; i < p.length; ++i) {
      lse[i] = static_cast<const float*>(f.lse)[element(i)];
      if (lse[i] == INFINITY) lse[i] = NAN;  // so that all probabilities of the row are NaN
      read_row<BFloat16, float>(static_cast<const BFloat16*>(f.out) + element(i) * width, out_row,
                                width);
      read_row<BFloat16, float>(grad_out + i * even, grad_out_row, width);
      VecF sum = {};
      for (int64_t d = 0; d < padded; d += kLanes<float>)
        sum += load(out_row + d) * load(grad_out_row + d);
      delta[i] = sum_lanes<float>(sum);
    }
    for (int64_t i = 0; i < p.length * padded; ++i) grad_q[i] = 0;
  }

  void load_block(int64_t j0, int64_t count, int64_t count_padded) {
    const Rows k(f.k, p, j0), v(f.v, p, j0);
    pack_depth_columns(k.data, k.stride, width, count, count_padded, kPairRow, keys_t);
    pack_depth_columns(v.data, v.stride, width, count, count_padded, kPairRow, values_t);
    pack_depth_rows(k.data, k.stride, count, width, padded, key_pairs);
    for (int64_t i = 0; i < count * padded; ++i) grad_keys[i] = 0, grad_values[i] = 0;
  }

  // One row of a tile: scores -> dropped probabilities (for grad_v), grad_out . v -> gradient of
  // the scores.
  void tile_row(int64_t i, int64_t row, int64_t j0, int64_t count) {
    uint32_t bits[4];
    if (dropout.active())
      dropout_bits(dropout, static_cast<uint32_t>(p.group * f.problems + p.index),
                   static_cast<uint32_t>(p.head), static_cast<uint32_t>(row),
                   static_cast<uint32_t>(j0 / kDropoutGroup), bits);
    const int64_t at = i * kKeyBlock;
    for (int64_t j = 0; j < count; j += kLanes<float>) {
      const VecF x = exp_nonpositive(load(scores + at + j) * scale - lse[row]);
      VecF dropped = x, g = load(grads + at + j);
      if (dropout.active()) {
        // A factor, not a selection: as in torch, a dropped NaN stays NaN.
        const VecF factor =
            keep_lanes<float>(splat(kept), lane_bits<float>(bits, static_cast<int>(j)));
        dropped = x * factor;
        g *= factor;
      }
      store_rounded(probability_rows + at + j, dropped);
      store_rounded(grad_rows + at + j, x * (g - delta[row]));
    }
    if (count % kPair != 0) grad_rows[at + count] = {0};  // a pair ends with the last key
  }

  void tile(int64_t i0, int64_t rows, int64_t j0, int64_t count) {
    const int64_t pairs = pairs_of(width), count_padded = round_up(count, kLanes<float>);
    gemm<NativeDot>(rows, count_padded, pairs, q + i0 * even, even, kPair, keys_t, kPairRow, scores,
                    kKeyBlock, false);
    if (wants_q || wants_k)
      gemm<NativeDot>(rows, count_padded, pairs, grad_out + i0 * even, even, kPair, values_t,
                      kPairRow, grads, kKeyBlock, false);
    for (int64_t i = 0; i < rows; ++i) tile_row(i, i0 + i, j0, count);
    if (wants_v) {
      pack_depth_rows(probability_rows, kKeyBlock, rows, count, kKeyBlock, probability_pairs);
      gemm<NativeDot>(count, padded, pairs_of(rows), probability_pairs, kPair, kPairRow,
                      grad_out_pairs + i0 * padded, kPair * padded, grad_values, padded, true);
    }
    if (wants_k) {
      pack_depth_rows(grad_rows, kKeyBlock, rows, count, kKeyBlock, grad_pairs);
      gemm<NativeDot>(count, padded, pairs_of(rows), grad_pairs, kPair, kPairRow,
                      q_pairs + i0 * padded, kPair * padded, grad_keys, padded, true);
    }
    if (wants_q)
      gemm<NativeDot>(rows, padded, pairs_of(count), grad_rows, kKeyBlock, kPair, key_pairs,
                      kPair * padded, grad_q + i0 * padded, padded, true);
  }

  // Writes rows of sums times `factor` to the gradient, from row `first` of the problem.
  void write_rows(float* sums, float factor, int64_t rows, const RowView& grad, int64_t first) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < padded; ++d) sums[i * padded + d] *= factor;
      const BFloat16* to = row_of<BFloat16>(grad, p.group, p.first + first + i, p.head);
      write_row<BFloat16, float>(sums + i * padded, const_cast<BFloat16*>(to), width);
    }
  }

  void run() {
    load_problem();
    for (int64_t j0 = 0; j0 < p.length; j0 += kKeyBlock) {
      const int64_t count = min64(kKeyBlock, p.length - j0);
      load_block(j0, count, round_up(count, kLanes<float>));
      for (int64_t i0 = 0; i0 < p.length; i0 += kBackwardTile)
        tile(i0, min64(kBackwardTile, p.length - i0), j0, count);
      if (wants_k) write_rows(grad_keys, scale, count, args.grad_k, j0);
      if (wants_v) write_rows(grad_values, 1.0f, count, args.grad_v, j0);
    }
    if (wants_q) write_rows(grad_q, scale, p.length, args.grad_q, 0);
  }
};

}  // namespace

void attention_forward(DType dtype, const AttentionForward& args) {
  if (dtype != DType::kBFloat16) return avx512::kernels().attention_forward(dtype, args);
  each_forward_item<BFloat16, float>(args, forward_item);
}

void attention_backward(DType dtype, const AttentionBackward& args) {
  if (dtype != DType::kBFloat16) return avx512::kernels().attention_backward(dtype, args);
  each_backward_item<BFloat16>(args, [&](const Problem& p) { BackwardItem(args, p).run(); });
}

}  // namespace flmoe::FLMOE_ISA
