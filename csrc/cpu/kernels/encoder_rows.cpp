// Row-wise kernels between the encoder's matrix products: residual + dropout + layer norm, residual
// + dropout + mean pooling, and the choice of each view's rows.
//
// Every kernel reads and writes each element once and is memory-bound; the backward recomputes the
// dropout masks from (seed, expert, row, column). Sums over rows are computed in fixed chunks,
// which are added in order, so gradients of gains do not depend on the number of threads.
#include <cmath>

#include "cpu/kernels/entry.h"

namespace flmoe::FLMOE_ISA {
namespace {

constexpr int64_t kChunk = 64;  // rows per item

// row (padded to whole vectors) *= scale where kept, = 0 elsewhere.
template <typename A>
void drop_values(A* row, int64_t width, const Dropout& dropout, A scale, int64_t stream,
                 int64_t expert, int64_t index) {
  if (!dropout.active()) return;
  uint32_t bits[4];
  for (int64_t c0 = 0; c0 < width; c0 += kDropoutGroup) {
    dropout_bits(dropout, static_cast<uint32_t>(stream), static_cast<uint32_t>(expert),
                 static_cast<uint32_t>(index), static_cast<uint32_t>(c0 / kDropoutGroup), bits);
    const int64_t end = min64(kDropoutGroup, width - c0);
    for (int64_t c = 0; c < end; c += kLanes<A>) {
      A* at = row + c0 + c;
      store(at, keep_lanes<A>(load(at) * scale, lane_bits<A>(bits, static_cast<int>(c))));
    }
  }
}

template <typename A>
A sum_of(const A* x, int64_t n) {
  A total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += x[i];
  return total;
}

// A row, padded to whole vectors.
template <typename A>
struct RowBuffer : Buffer<A> {
  explicit RowBuffer(int64_t width) : Buffer<A>(round_up(width, kLanes<A>)) {}
};

template <typename T, typename A>
const T* at(const void* base, int64_t row, int64_t width) {
  return static_cast<const T*>(base) + row * width;
}

// ---- residual + dropout + layer norm ----

template <typename T, typename A>
struct NormRow {
  const NormArgs& args;
  Dropout dropout;
  A kept;
  int64_t width;
  RowBuffer<A> x, u, gain, shift, twice;

  explicit NormRow(const NormArgs& args)
      : args(args),
        dropout(dropout_of(args.dropout)),
        kept(keep_scale<A>(dropout)),
        width(args.width),
        x(width),
        u(width),
        gain(width),
        shift(width),
        twice(width) {}

  void load_affine(int64_t e) {
    read_row<T, A>(at<T, A>(args.gain, e, width), gain, width);
    if (args.shift != nullptr) read_row<T, A>(at<T, A>(args.shift, e, width), shift, width);
  }

  // row *= d(sum)/d(update): the dropout, for I2MoE both of them.
  void through_dropout(A* row, int64_t e, int64_t r) {
    if (!args.self_residual) {
      drop_values<A>(row, width, dropout, kept, 0, e, r);
      return;
    }
    for (int64_t d = 0; d < width; ++d) twice[d] = row[d];
    drop_values<A>(twice, width, dropout, kept, 1, e, r);
    for (int64_t d = 0; d < width; ++d) row[d] += twice[d];
    drop_values<A>(row, width, dropout, kept, 0, e, r);
  }

  void forward(int64_t e, int64_t r) {
    const int64_t row = e * args.rows + r;
    if (args.update != nullptr) {
      read_row<T, A>(at<T, A>(args.update, row, width), u, width);
      if (args.self_residual) {
        through_dropout(u, e, r);
        for (int64_t d = 0; d < width; ++d) x[d] = u[d];
      } else {
        drop_values<A>(u, width, dropout, kept, 0, e, r);
        const T* residual = at<T, A>(args.residual, row, width);
        for (int64_t d = 0; d < width; ++d) x[d] = read<T, A>(residual + d) + u[d];
      }
      write_row<T, A>(x, static_cast<T*>(args.sum) + row * width, width);
    } else {
      read_row<T, A>(at<T, A>(args.residual, row, width), x, width);
    }
    const A mean = sum_of<A>(x, width) / width;
    for (int64_t d = 0; d < width; ++d) x[d] -= mean;
    const A rstd = A(1) / std::sqrt(dot_of<A>(x, x, width) / width + A(args.eps));
    T* normed = static_cast<T*>(args.normed) + row * width;
    for (int64_t d = 0; d < width; ++d) write<T, A>(normed + d, x[d] * rstd * gain[d] + shift[d]);
    static_cast<A*>(args.mean)[row] = mean;
    static_cast<A*>(args.rstd)[row] = rstd;
  }

  void backward(int64_t e, int64_t r, A* grad_gain, A* grad_shift) {
    const int64_t row = e * args.rows + r;
    A* grad = u;
    if (args.grad_normed != nullptr) {
      const A mean = static_cast<const A*>(args.mean)[row];
      const A rstd = static_cast<const A*>(args.rstd)[row];
      read_row<T, A>(at<T, A>(args.sum, row, width), x, width);
      read_row<T, A>(at<T, A>(args.grad_normed, row, width), grad, width);
      for (int64_t d = 0; d < width; ++d) {
        x[d] = (x[d] - mean) * rstd;
        grad_gain[d] += grad[d] * x[d];
        grad_shift[d] += grad[d];
        grad[d] *= gain[d];
      }
      if (args.grad_residual == nullptr && args.grad_update == nullptr) return;
      const A c1 = sum_of(grad, width) / width, c2 = dot_of<A>(grad, x, width) / width;
      for (int64_t d = 0; d < width; ++d) grad[d] = rstd * (grad[d] - c1 - x[d] * c2);
    } else {
      for (int64_t d = 0; d < width; ++d) grad[d] = 0;
    }
    if (args.grad_sum != nullptr) {
      const T* grad_sum = at<T, A>(args.grad_sum, row, width);
      for (int64_t d = 0; d < width; ++d) grad[d] += read<T, A>(grad_sum + d);
    }
    if (args.grad_residual != nullptr)
      write_row<T, A>(grad, static_cast<T*>(args.grad_residual) + row * width, width);
    if (args.grad_update != nullptr) {
      through_dropout(grad, e, r);
      write_row<T, A>(grad, static_cast<T*>(args.grad_update) + row * width, width);
    }
  }
};

template <typename F>
void for_chunks(int64_t experts, int64_t rows, int threads, const F& body) {
  const int64_t chunks = (rows + kChunk - 1) / kChunk;
  parallel_for(experts * chunks, threads, [&](int64_t item, int) {
    const int64_t first = item % chunks * kChunk;
    body(item / chunks, item, first, min64(first + kChunk, rows));
  });
}

// ---- mean pooling ----

template <typename T, typename A>
void pool_item(const PoolArgs& args, int64_t e, int64_t v, int64_t segment) {
  const Dropout dropout = dropout_of(args.dropout);
  const A kept = keep_scale<A>(dropout);
  const int64_t width = args.width, first = args.cumulative[segment];
  const int64_t last = args.cumulative[segment + 1];
  const RowBuffer<A> sum(width), u(width);
  for (int64_t d = 0; d < width; ++d) sum[d] = 0;
  for (int64_t r = first; r < last; ++r) {
    const int64_t index = v * args.rows + r;
    const int64_t row = e * args.views * args.rows + index;
    const T* residual = at<T, A>(args.residual, row, width);
    for (int64_t d = 0; d < width; ++d) sum[d] += read<T, A>(residual + d);
    if (!args.has_update) continue;
    read_row<T, A>(at<T, A>(args.update, row, width), u, width);
    drop_values<A>(u, width, dropout, kept, 0, e, index);
    for (int64_t d = 0; d < width; ++d) sum[d] += u[d];
  }
  const A scale = A(1) / static_cast<A>(last > first ? last - first : 1);
  for (int64_t d = 0; d < width; ++d) sum[d] *= scale;
  const int64_t out = (e * args.views + v) * args.segments + segment;
  write_row<T, A>(sum, static_cast<T*>(args.out) + out * width, width);
}

template <typename T, typename A>
void pool_backward_item(const PoolArgs& args, int64_t e, int64_t v, int64_t segment) {
  const Dropout dropout = dropout_of(args.dropout);
  const A kept = keep_scale<A>(dropout);
  const int64_t width = args.width, first = args.cumulative[segment];
  const int64_t last = args.cumulative[segment + 1];
  const RowBuffer<A> grad(width), u(width);
  const int64_t out = (e * args.views + v) * args.segments + segment;
  const T* grad_out = at<T, A>(args.grad_out, out, width);
  const A scale = A(1) / static_cast<A>(last > first ? last - first : 1);
  for (int64_t d = 0; d < width; ++d) grad[d] = read<T, A>(grad_out + d) * scale;
  for (int64_t r = first; r < last; ++r) {
    const int64_t index = v * args.rows + r;
    const int64_t row = e * args.views * args.rows + index;
    if (args.grad_residual != nullptr)
      write_row<T, A>(grad, static_cast<T*>(args.grad_residual) + row * width, width);
    if (args.grad_update == nullptr) continue;
    for (int64_t d = 0; d < width; ++d) u[d] = grad[d];
    drop_values<A>(u, width, dropout, kept, 0, e, index);
    write_row<T, A>(u, static_cast<T*>(args.grad_update) + row * width, width);
  }
}

template <typename F>
void for_segments(const PoolArgs& args, const F& body) {
  parallel_for(args.experts * args.views * args.segments, args.threads, [&](int64_t item, int) {
    const int64_t segment = item % args.segments, v = item / args.segments % args.views;
    body(item / args.segments / args.views, v, segment);
  });
}

}  // namespace

void norm_forward(DType dtype, const NormArgs& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    for_chunks(args.experts, args.rows, args.threads,
               [&](int64_t e, int64_t, int64_t first, int64_t last) {
                 NormRow<T, A> row(args);
                 row.load_affine(e);
                 for (int64_t r = first; r < last; ++r) row.forward(e, r);
               });
  });
}

void norm_backward(DType dtype, const NormArgs& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    const int64_t chunks = (args.rows + kChunk - 1) / kChunk, width = args.width;
    const int64_t stride = 2 * width;
    const Buffer<A> partial(args.experts * chunks * stride), total(stride);
    for_chunks(args.experts, args.rows, args.threads,
               [&](int64_t e, int64_t chunk, int64_t first, int64_t last) {
                 A *gain = partial + chunk * stride, *shift = gain + width;
                 for (int64_t d = 0; d < stride; ++d) gain[d] = 0;
                 NormRow<T, A> row(args);
                 row.load_affine(e);
                 for (int64_t r = first; r < last; ++r) row.backward(e, r, gain, shift);
               });
    for (int64_t e = 0; e < args.experts; ++e) {
      for (int64_t d = 0; d < stride; ++d) total[d] = 0;
      for (int64_t c = 0; c < chunks; ++c) {
        const A* add = partial + (e * chunks + c) * stride;
        for (int64_t d = 0; d < stride; ++d) total[d] += add[d];
      }
      if (args.grad_gain != nullptr)
        write_row<T, A>(total, static_cast<T*>(args.grad_gain) + e * width, width);
      if (args.grad_shift != nullptr)
        write_row<T, A>(total + width, static_cast<T*>(args.grad_shift) + e * width, width);
    }
  });
}

void pool_forward(DType dtype, const PoolArgs& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    for_segments(
        args, [&](int64_t e, int64_t v, int64_t segment) { pool_item<T, A>(args, e, v, segment); });
  });
}

void pool_backward(DType dtype, const PoolArgs& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    // Rows outside all segments have received no gradient.
    const int64_t first = args.cumulative[0], covered = args.cumulative[args.segments];
    for (void* grad : {args.grad_residual, args.grad_update}) {
      if (grad == nullptr) continue;
      for (int64_t ev = 0; ev < args.experts * args.views; ++ev) {
        T* rows = static_cast<T*>(grad) + ev * args.rows * args.width;
        std::memset(rows, 0, first * args.width * sizeof(T));
        std::memset(rows + covered * args.width, 0, (args.rows - covered) * args.width * sizeof(T));
      }
    }
    for_segments(args, [&](int64_t e, int64_t v, int64_t segment) {
      pool_backward_item<T, A>(args, e, v, segment);
    });
  });
}

void views_forward(DType dtype, const ViewsArgs& args) {
  with_dtype(dtype, [&]<typename T>() {
    const int64_t width = args.width, n = args.rows;
    for_chunks(args.experts * args.views, n, args.threads,
               [&](int64_t ev, int64_t, int64_t first, int64_t last) {
                 const int64_t e = ev / args.views, v = ev % args.views;
                 for (int64_t r = first; r < last; ++r) {
                   const int64_t replaced = args.modality[r] == v - 1 ? 1 : 0;
                   std::memcpy(static_cast<T*>(args.out) + (ev * n + r) * width,
                               static_cast<const T*>(args.x) + ((e * 2 + replaced) * n + r) * width,
                               width * sizeof(T));
                 }
               });
  });
}

void views_backward(DType dtype, const ViewsArgs& args) {
  with_dtype(dtype, [&]<typename T>() {
    using A = typename Compute<T>::Type;
    const int64_t width = args.width, n = args.rows;
    // Here x is the gradient of the views, and out is that of the (original, noise) rows.
    for_chunks(args.experts, n, args.threads, [&](int64_t e, int64_t, int64_t first, int64_t last) {
      const Buffer<A> sum(width);
      for (int64_t r = first; r < last; ++r) {
        T* original = static_cast<T*>(args.out) + ((e * 2) * n + r) * width;
        T* noise = original + n * width;
        for (int64_t d = 0; d < width; ++d) sum[d] = 0;
        std::memset(noise, 0, width * sizeof(T));  // unless a view replaces it
        for (int64_t v = 0; v < args.views; ++v) {
          const T* grad = static_cast<const T*>(args.x) + ((e * args.views + v) * n + r) * width;
          if (args.modality[r] == v - 1) {
            std::memcpy(noise, grad, width * sizeof(T));
          } else {
            for (int64_t d = 0; d < width; ++d) sum[d] += read<T, A>(grad + d);
          }
        }
        write_row<T, A>(sum, original, width);
      }
    });
  });
}

}  // namespace flmoe::FLMOE_ISA
