// Softmax attention over packed problems, with dropout, without an (L, L) buffer.
//
// One item is (group, problem, head, block of rows). Keys are processed in blocks of 128 (one
// dropout group), transposed once per item so that scores are a plain register-tiled product; the
// softmax is online, so memory is one tile of scores. Bound: 4 * L * L * width FLOP per problem and
// head.
#include "cpu/attention.h"
#include "cpu/gemm.h"

namespace flmoe::FLMOE_ISA {
namespace {

template <typename T, typename A>
void forward_item(const AttentionForward& args, const Problem& p, int64_t row0, int64_t rows) {
  const int64_t width = args.width, padded = round_up(width, kLanes<A>);
  const Dropout dropout = dropout_of(args.dropout);
  const Buffer<A> q_copy(rows * padded), out(rows * padded), maximum(rows), total(rows);
  const Buffer<A> keys(width * kKeyBlock), values_copy(kKeyBlock * padded);
  const Buffer<A> tile(kForwardTile * kKeyBlock);
  const Rows<A> q = packed_rows<T, A>(row_of<T>(args.q, p.group, p.first + row0, p.head),
                                      args.q.row_stride, rows, width, padded, q_copy);
  for (int64_t i = 0; i < rows; ++i) maximum[i] = -INFINITY, total[i] = 0;
  for (int64_t j0 = 0; j0 < p.length; j0 += kKeyBlock) {
    const int64_t count = min64(kKeyBlock, p.length - j0);
    const int64_t count_padded = round_up(count, kLanes<A>);
    pack_transposed<T, A>(row_of<T>(args.k, p.group, p.first + j0, p.head), args.k.row_stride,
                          count, width, A(args.scale), keys);
    const Rows<A> values = packed_rows<T, A>(row_of<T>(args.v, p.group, p.first + j0, p.head),
                                             args.v.row_stride, count, width, padded, values_copy);
    for (int64_t i0 = 0; i0 < rows; i0 += kForwardTile) {
      const int64_t tile_rows = min64(kForwardTile, rows - i0);
      gemm<A>(tile_rows, count_padded, width, q[i0], q.stride, 1, keys, kKeyBlock, tile, kKeyBlock,
              false);
      for (int64_t i = 0; i < tile_rows; ++i) {
        const A factor =
            softmax_row<A>(tile + i * kKeyBlock, count, maximum + i0 + i, total + i0 + i);
        if (factor != A(1) && j0 > 0)
          for (int64_t d = 0; d < padded; ++d) out[(i0 + i) * padded + d] *= factor;
        if (dropout.active())
          drop_row<A>(tile + i * kKeyBlock, count, dropout, p, p.group * args.problems + p.index,
                      row0 + i0 + i, j0 / kDropoutGroup);
      }
      gemm<A>(tile_rows, padded, count, tile, kKeyBlock, 1, values.data, values.stride,
              out + i0 * padded, padded, j0 > 0);
    }
  }
  const A kept = keep_scale<A>(dropout);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t at = (p.group * args.rows + p.first + row0 + i) * args.heads + p.head;
    const A scale = kept / total[i];
    for (int64_t d = 0; d < padded; ++d) out[i * padded + d] *= scale;
    write_row<T, A>(out + i * padded, static_cast<T*>(args.out) + at * width, width);
    // With a score of inf the sum and all probabilities are NaN, and the log-sum-exp is inf, as in
    // torch.
    static_cast<A*>(args.lse)[at] =
        maximum[i] == A(INFINITY) ? maximum[i] : maximum[i] + std::log(total[i]);
  }
}

}  // namespace

void attention_forward(DType dtype, const AttentionForward& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    each_forward_item<T, A>(args, forward_item<T, A>);
  });
}

}  // namespace flmoe::FLMOE_ISA
