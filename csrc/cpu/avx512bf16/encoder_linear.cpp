// Dense layers of all experts in bfloat16 by vdpbf16ps; other dtypes run the kernels of avx512.
//
// Items and blocks are those of kernels/encoder_linear.cpp. A weight is packed once per call into
// panels of pair rows. Rows of x and grad_out are read in place where their width is even. In the
// weight gradient depth is the token: both operands of a block of tokens are packed into pair rows,
// and blocks are summed in float32.
#include "cpu/gemm_bf16.h"
#include "cpu/kernels/entry.h"

namespace flmoe::FLMOE_ISA {
namespace {

constexpr int64_t kPanel = kMaxPanelVectors * kLanes<float>;
constexpr int64_t kRowBlock = 96;     // 16 register tiles; 48 KiB of input at width 256
constexpr int64_t kOutBlock = 96;     // rows of the weight gradient per item, which packs x once
constexpr int64_t kTokenBlock = 128;  // depth of one pass of the weight gradient
constexpr int64_t kBiasBlock = 32;    // tokens of grad_bias summed in float32

int64_t panels_of(int64_t columns) {
  return (columns + kPanel - 1) / kPanel;
}

// Elements of one packed (depth x columns) matrix.
int64_t packed_size(int64_t depth, int64_t columns) {
  return panels_of(columns) * kPanel * kPair * pairs_of(depth);
}

// Weights (experts, out, in) in panels, as B of x weight^T (depth in) or of grad_out weight (depth
// out).
void pack_weights(const LinearArgs& args, bool depth_is_in, BFloat16* out) {
  const int64_t width = args.in_width;
  const int64_t depth = depth_is_in ? width : args.out_width;
  const int64_t columns = depth_is_in ? args.out_width : width;
  const int64_t panels = panels_of(columns);
  parallel_for(args.experts * panels, args.threads, [&](int64_t item, int) {
    const auto* weight =
        static_cast<const BFloat16*>(args.weight) + item / panels * width * args.out_width;
    const int64_t n0 = item % panels * kPanel, count = min64(kPanel, columns - n0);
    BFloat16* panel = out + item * kPanel * kPair * pairs_of(depth);
    if (depth_is_in) {
      pack_depth_columns(weight + n0 * width, width, depth, count, kPanel, kPair * kPanel, panel);
    } else {
      pack_depth_rows(weight + n0, width, depth, count, kPanel, panel);
    }
  });
}

// out (rows x columns) = x (rows x depth) packed panels [+ bias], for one block of rows.
void rows_times_panels(const BFloat16* x, int64_t rows, int64_t depth, const BFloat16* panels,
                       int64_t columns, const BFloat16* bias, BFloat16* out) {
  const int64_t pairs = pairs_of(depth), even = kPair * pairs;
  const Buffer<float> tile(rows * kPanel), shift(kPanel);
  const Buffer<BFloat16> copy(even == depth ? 0 : rows * even);
  if (even != depth) {
    pack_even_rows(x, depth, rows, depth, copy);
    x = copy;
  }
  for (int64_t n = 0; n < kPanel; ++n) shift[n] = 0;
  for (int64_t n0 = 0; n0 < columns; n0 += kPanel) {
    const int64_t count = min64(kPanel, columns - n0);
    if (bias != nullptr) read_row<BFloat16, float>(bias + n0, shift, count);
    gemm_bf16<NativeDot>(rows, round_up(count, kLanes<float>), pairs, x, even, kPair,
                         panels + n0 * even, kPair * kPanel, tile, kPanel, false);
    for (int64_t i = 0; i < rows; ++i) {
      float* row = tile + i * kPanel;
      for (int64_t n = 0; n < kPanel; n += kLanes<float>)
        store(row + n, load(row + n) + load(shift + n));
      write_row<BFloat16, float>(row, out + i * columns + n0, count);
    }
  }
}

void batched_rows(const LinearArgs& args, const void* x, int64_t depth, const BFloat16* packed,
                  int64_t columns, const void* bias, void* out) {
  const int64_t blocks = (args.rows + kRowBlock - 1) / kRowBlock;
  parallel_for(args.experts * blocks, args.threads, [&](int64_t item, int) {
    const int64_t e = item / blocks, row0 = item % blocks * kRowBlock;
    const int64_t first = e * args.rows + row0;
    rows_times_panels(static_cast<const BFloat16*>(x) + first * depth,
                      min64(kRowBlock, args.rows - row0), depth,
                      packed + e * packed_size(depth, columns), columns,
                      bias == nullptr ? nullptr : static_cast<const BFloat16*>(bias) + e * columns,
                      static_cast<BFloat16*>(out) + first * columns);
  });
}

// Rows [n0, n0 + count) of grad_weight[e] = grad_out[e]^T x[e], and of grad_bias[e].
struct WeightGradient {
  const LinearArgs& args;
  int64_t e, n0, count, padded;
  Buffer<double> bias_total;
  Buffer<float> total, grad_row, bias_block;
  Buffer<BFloat16> x_block, grad_block;

  WeightGradient(const LinearArgs& args, int64_t e, int64_t n0, int64_t count)
      : args(args),
        e(e),
        n0(n0),
        count(count),
        padded(round_up(args.in_width, kLanes<float>)),
        bias_total(kOutBlock),
        total(kOutBlock * padded),
        grad_row(kOutBlock),
        bias_block(kOutBlock),
        x_block(kTokenBlock * padded),
        grad_block(kTokenBlock * kOutBlock) {
    for (int64_t n = 0; n < kOutBlock; ++n) bias_total[n] = 0, bias_block[n] = 0;
    for (int64_t i = 0; i < kOutBlock * padded; ++i) total[i] = 0;
  }

  const BFloat16* grad_of(int64_t token) const {
    return static_cast<const BFloat16*>(args.grad_out) + (e * args.rows + token) * args.out_width +
           n0;
  }

  void add_bias(int64_t first, int64_t tokens) {
    for (int64_t r = 0; r < tokens; ++r) {
      read_row<BFloat16, float>(grad_of(first + r), grad_row, count);
      for (int64_t n = 0; n < count; ++n) bias_block[n] += grad_row[n];
      if (r % kBiasBlock == kBiasBlock - 1 || r == tokens - 1) {
        for (int64_t n = 0; n < count; ++n) bias_total[n] += bias_block[n], bias_block[n] = 0;
      }
    }
  }

  // The sums of a block of tokens are added to the total by the product itself.
  void add_weight(int64_t first, int64_t tokens) {
    const int64_t width = args.in_width;
    const auto* x = static_cast<const BFloat16*>(args.x) + (e * args.rows + first) * width;
    pack_depth_rows(x, width, tokens, width, padded, x_block);
    pack_depth_rows(grad_of(first), args.out_width, tokens, count, count, grad_block);
    gemm_bf16<NativeDot>(count, padded, pairs_of(tokens), grad_block, kPair, kPair * count, x_block,
                         kPair * padded, total, padded, true);
  }

  void run() {
    for (int64_t first = 0; first < args.rows; first += kTokenBlock) {
      const int64_t tokens = min64(kTokenBlock, args.rows - first);
      if (args.grad_bias != nullptr) add_bias(first, tokens);
      if (args.grad_weight != nullptr) add_weight(first, tokens);
    }
    const int64_t row = e * args.out_width + n0;
    if (args.grad_weight != nullptr) {
      auto* out = static_cast<BFloat16*>(args.grad_weight) + row * args.in_width;
      for (int64_t n = 0; n < count; ++n)
        write_row<BFloat16, float>(total + n * padded, out + n * args.in_width, args.in_width);
    }
    if (args.grad_bias != nullptr) {
      for (int64_t n = 0; n < count; ++n)
        write<BFloat16, float>(static_cast<BFloat16*>(args.grad_bias) + row + n,
                               static_cast<float>(bias_total[n]));
    }
  }
};

}  // namespace

void linear_forward(DType dtype, const LinearArgs& args) {
  if (dtype != DType::kBFloat16) return avx512::kernels().linear_forward(dtype, args);
  const Buffer<BFloat16> packed(args.experts * packed_size(args.in_width, args.out_width));
  pack_weights(args, true, packed);
  batched_rows(args, args.x, args.in_width, packed, args.out_width, args.bias, args.out);
}

void linear_backward(DType dtype, const LinearArgs& args) {
  if (dtype != DType::kBFloat16) return avx512::kernels().linear_backward(dtype, args);
  if (args.grad_x != nullptr) {
    const Buffer<BFloat16> packed(args.experts * packed_size(args.out_width, args.in_width));
    pack_weights(args, false, packed);
    batched_rows(args, args.grad_out, args.out_width, packed, args.in_width, nullptr, args.grad_x);
  }
  if (args.grad_weight == nullptr && args.grad_bias == nullptr) return;
  const int64_t blocks = (args.out_width + kOutBlock - 1) / kOutBlock;
  parallel_for(args.experts * blocks, args.threads, [&](int64_t item, int) {
    const int64_t n0 = item % blocks * kOutBlock;
    WeightGradient(args, item / blocks, n0, min64(kOutBlock, args.out_width - n0)).run();
  });
}

}  // namespace flmoe::FLMOE_ISA
