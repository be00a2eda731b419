// A run of samples of one expert in the encoders without gradients, see cpu/encoder_inference.h.
#pragma once

#include <cmath>

#include "cpu/activations.h"
#include "cpu/inference_weights.h"
#include "cpu/softmax.h"

namespace flmoe::FLMOE_ISA {

constexpr int64_t kInferenceRows = 96;  // of a block: 16 register tiles
// A tile of scores, 24 KiB in float32, stays in the first-level cache.
constexpr int64_t kScoreRows = 24, kScoreKeys = 256;

// out (rows x columns) [+]= x (rows x depth) packed panels + bias. Rows of `out` have room for
// whole vectors.
template <typename Product, typename A = typename Product::A, typename E = typename Product::E>
void times(const E* x, int64_t x_row, int64_t rows, int64_t depth, const E* panels, const A* bias,
           int64_t columns, A* out, int64_t out_row, bool add) {
  const int64_t deep = Sizes<Product>::deep(depth);
  for (int64_t n0 = 0; n0 < columns; n0 += kPanel<A>) {
    const int64_t count = round_up(min64(kPanel<A>, columns - n0), kLanes<A>);
    if (bias != nullptr)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t n = n0; n < n0 + count; n += kLanes<A>) {
          A* to = out + r * out_row + n;
          store(to, add ? load(to) + load(bias + n) : load(bias + n));
        }
    Product::gemm(rows, count, deep, x, x_row, panels + n0 * deep, kPanel<A>, out + n0, out_row,
                  add || bias != nullptr);
  }
}

// Layer norm of a row, written as a row of an operand, whose padding becomes 0.
template <typename A, typename E>
void normalize(const A* x, int64_t width, int64_t row, const A* gain, const A* shift, A eps,
               A* buffer, E* out) {
  A total = 0, squares = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < width; ++d) total += x[d];
  const A mean = total / static_cast<A>(width);
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < width; ++d) squares += (x[d] - mean) * (x[d] - mean);
  const A rstd = A(1) / std::sqrt(squares / static_cast<A>(width) + eps);
  for (int64_t d = 0; d < width; ++d) buffer[d] = (x[d] - mean) * rstd * gain[d] + shift[d];
  for (int64_t d = width; d < row; ++d) buffer[d] = 0;
  write_row<E, A>(buffer, out, row);
}

// How the rows of an expert are cut: into items, and the items into blocks of a phase. Positions
// count from the start of an item.
template <typename Product>
struct Cut {
  const EncoderInference& args;
  int64_t items = 0;
  Buffer<int64_t> samples;  // first sample of each item, then the number of samples
  Buffer<int64_t> starts;   // position of each sample in its item

  explicit Cut(const EncoderInference& args)
      : args(args), samples(args.samples + 1), starts(args.samples) {
    for (int64_t s = 0; s < args.samples; ++s) {
      const bool opens = s == 0 || end(s - 1) >= kInferenceRows;
      if (opens) samples[items++] = s;
      starts[s] = opens ? 0 : end(s - 1);
    }
    samples[items] = args.samples;
  }

  int64_t length(int64_t s) const { return args.cu_samples[s + 1] - args.cu_samples[s]; }
  int64_t end(int64_t s) const { return starts[s] + round_up(length(s), Product::kUnit); }
  int64_t rows(int64_t item) const { return end(samples[item + 1] - 1); }
  int64_t segments() const { return args.segments / args.samples; }

  // The position of the end of a segment of sample s.
  int64_t segment_end(int64_t s, int64_t segment) const {
    return starts[s] + args.cu_segments[segment + 1] - args.cu_samples[s];
  }

  // The end of the block from position r0 of an item. A block of the last layer has whole segments.
  int64_t block_end(int64_t item, int64_t r0, bool last) const {
    const int64_t least = min64(r0 + kInferenceRows, rows(item));
    if (!last) return least;
    int64_t s = samples[item];
    while (end(s) < least) ++s;
    if (end(s) == least) return least;
    for (int64_t segment = s * segments();; ++segment) {
      if (segment + 1 == (s + 1) * segments()) return end(s);
      if (segment_end(s, segment) >= least) return segment_end(s, segment);
    }
  }
};

// A run of samples of one expert, on memory that the caller owns.
template <typename T, typename Product>
struct Item {
  using A = typename Product::A;
  using E = typename Product::E;

  const EncoderInference& args;
  const Sizes<Product>& sizes;
  const Cut<Product>& cut;
  const char* weights;  // of the expert
  const E* shared;      // first layer's q, k and v of all rows of the table, or null
  int64_t expert, index;
  A *pooled, *pooled_hidden;  // means, (segments of the expert)
  int64_t rows = cut.rows(index), first_sample = cut.samples[index];
  int64_t last_sample = cut.samples[index + 1], key_row = key_stride(rows);
  A* x = nullptr;                              // rows
  E *q = nullptr, *v = nullptr, *k = nullptr;  // q, v: (blocks, rows); k: (blocks, depth, key_row)

  // Room for a vector more, because scores are computed in whole vectors.
  static int64_t key_stride(int64_t rows) { return round_up(rows, kLanes<A>) + kLanes<A>; }
  static int64_t sums(const Sizes<Product>& sizes, int64_t rows) { return rows * sizes.row; }
  static int64_t operands(const Sizes<Product>& sizes, int64_t rows) {
    return sizes.blocks *
               (2 * rows * sizes.block_row + sizes.deep(sizes.block) * key_stride(rows)) +
           Product::kUnit * kLanes<A>;  // the last head may be read past its end
  }

  void place(A* memory, E* operand_memory) {
    x = memory;
    q = operand_memory;
    k = q + sizes.blocks * rows * sizes.block_row;
    v = k + sizes.blocks * sizes.deep(sizes.block) * key_row;
  }

  const A* vector(int64_t layer, int t) const {
    return reinterpret_cast<const A*>(weights + layer * sizes.layer + sizes.places[t]);
  }
  const E* matrix(int64_t layer, int t) const {
    return reinterpret_cast<const E*>(weights + layer * sizes.layer + sizes.places[t]);
  }

  // The row of the table at a position of a sample, -1 between samples.
  int64_t table_row(int64_t s, int64_t r) const {
    const int64_t place = r - cut.starts[s];
    if (place >= cut.length(s)) return -1;
    return args.index ? args.index[args.cu_samples[s] + place] : args.cu_samples[s] + place;
  }

  // Calls body(r, row of the table) for positions [r0, r1).
  template <typename F>
  void for_rows(int64_t r0, int64_t r1, const F& body) const {
    int64_t s = first_sample;
    for (int64_t r = r0; r < r1; ++r) {
      while (cut.end(s) <= r) ++s;
      body(r, table_row(s, r));
    }
  }

  void load_rows(int64_t r0, int64_t r1) const {
    const T* table = static_cast<const T*>(args.rows) +
                     (args.row_sets > 1 ? expert : 0) * args.table * sizes.width;
    for_rows(r0, r1, [&](int64_t r, int64_t row) {
      A* to = x + r * sizes.row;
      if (row < 0)
        std::memset(to, 0, sizes.width * sizeof(A));
      else
        read_row<T, A>(table + row * sizes.width, to, sizes.width);
    });
  }

  // The norm of rows [r0, r1) into `normed`.
  void norm_rows(int64_t layer, int gain, int64_t r0, int64_t r1, E* normed) const {
    const Buffer<A> buffer(sizes.row);
    for (int64_t r = r0; r < r1; ++r)
      normalize<A, E>(x + r * sizes.row, sizes.width, sizes.row, vector(layer, gain),
                      vector(layer, gain + 1), A(args.eps), buffer, normed + (r - r0) * sizes.row);
  }

  // Queries (role 0, scaled), keys or values of a block of heads from normed rows.
  void heads_of(const E* normed, int64_t layer, int64_t count, int64_t role, int64_t b,
                E* out) const {
    const E* panels = role == 0 ? matrix(layer, kQ) : matrix(layer, kKV);
    const int64_t values = count * sizes.block_row;
    const Buffer<A> tile(sizeof(E) == sizeof(A) ? 0 : values);
    A* to = sizeof(E) == sizeof(A) ? reinterpret_cast<A*>(out) : tile.data();
    times<Product>(
        normed, sizes.row, count, sizes.width,
        panels + (role == 2 ? sizes.blocks + b : b) * sizes.matrix(sizes.width, sizes.block),
        static_cast<const A*>(nullptr), sizes.block, to, sizes.block_row, false);
    const A scale = A(1) / std::sqrt(static_cast<A>(sizes.head));
    if (role == 0)
      for (int64_t i = 0; i < values; ++i) to[i] *= scale;
    if constexpr (sizeof(E) != sizeof(A)) write_row<E, A>(to, out, values);
  }

  // q, k and v of rows [r0, r1).
  void project(int64_t layer, int64_t r0, int64_t r1) const {
    if (layer == 0) load_rows(r0, r1);
    const bool computes = layer > 0 || shared == nullptr;
    const int64_t count = r1 - r0, row = sizes.block_row;
    const Buffer<E> normed(computes ? count * sizes.row : 0), heads(count * row);
    if (computes) norm_rows(layer, kGain1, r0, r1, normed);
    for (int64_t role = 0; role < 3; ++role)
      for (int64_t b = 0; b < sizes.blocks; ++b) {
        if (computes)
          heads_of(normed, layer, count, role, b, heads);
        else
          copy_shared(r0, r1, role, b, heads);
        if (role == 0)
          std::memcpy(q + (b * rows + r0) * row, heads, count * row * sizeof(E));
        else if (role == 1)
          Product::put_keys(heads, row, count, sizes.block,
                            k + b * sizes.deep(sizes.block) * key_row + Product::kUnit * r0,
                            key_row);
        else
          Product::put_values(heads, row, count, sizes.block, v + (b * rows + r0) * row);
      }
  }

  void copy_shared(int64_t r0, int64_t r1, int64_t role, int64_t b, E* heads) const {
    const int64_t row = sizes.block_row;
    const E* from = shared + ((expert * 3 + role) * sizes.blocks + b) * args.table * row;
    for_rows(r0, r1, [&](int64_t r, int64_t place) {
      E* to = heads + (r - r0) * row;
      if (place < 0)
        std::memset(to, 0, row * sizeof(E));
      else
        std::memcpy(to, from + place * row, row * sizeof(E));
    });
  }

  // Attention of rows [r0, r1), all of the sample at positions [s0, s1), into out (r1 - r0, row).
  void attend(int64_t r0, int64_t r1, int64_t s0, int64_t s1, E* out) const {
    const int64_t width = round_up(sizes.head, kLanes<A>), row = sizes.block_row;
    const Buffer<A> tile(kScoreRows * kScoreKeys), sum(kScoreRows * width);
    const Buffer<E> converted(sizeof(E) == sizeof(A) ? 0 : kScoreRows * kScoreKeys);
    A maximum[kScoreRows], total[kScoreRows];
    for (int64_t h = 0; h < sizes.heads; ++h) {
      const int64_t b = h * sizes.head / sizes.block, column = h * sizes.head % sizes.block;
      const E* keys_of = k + (b * sizes.deep(sizes.block) + column) * key_row;
      const E* values_of = v + b * rows * row + Product::kUnit * column;
      for (int64_t i0 = r0; i0 < r1; i0 += kScoreRows) {
        const int64_t count = min64(kScoreRows, r1 - i0);
        for (int64_t i = 0; i < count; ++i) maximum[i] = -INFINITY, total[i] = 0;
        for (int64_t j0 = s0; j0 < s1; j0 += kScoreKeys) {
          const int64_t keys = min64(kScoreKeys, s1 - j0);
          Product::gemm(count, round_up(keys, kLanes<A>), sizes.deep(sizes.head),
                        q + (b * rows + i0) * row + column, row, keys_of + Product::kUnit * j0,
                        key_row, tile, kScoreKeys, false);
          for (int64_t i = 0; i < count; ++i) {
            const A factor = softmax_row<A>(tile + i * kScoreKeys, keys, maximum + i, total + i);
            if (j0 > s0 && factor != A(1))
              for (int64_t d = 0; d < width; ++d) sum[i * width + d] *= factor;
          }
          const E* operand = Product::operand(tile, kScoreKeys, count, converted);
          Product::gemm(count, width, sizes.deep(keys), operand, kScoreKeys, values_of + j0 * row,
                        row, sum, width, j0 > s0);
        }
        for (int64_t i = 0; i < count; ++i) {
          const A share = A(1) / total[i];
          for (int64_t d = 0; d < sizes.head; ++d) sum[i * width + d] *= share;
          write_row<E, A>(sum + i * width, out + (i0 - r0 + i) * sizes.row + h * sizes.head,
                          sizes.head);
        }
      }
    }
  }

  // x of rows [r0, r1) after the attention branch, and the second norm.
  void attention_branch(int64_t layer, int64_t r0, int64_t r1, E* normed) const {
    // Rows between samples, and the padding of an odd width.
    if (Product::kUnit > 1) std::memset(normed, 0, (r1 - r0) * sizes.row * sizeof(E));
    for (int64_t s = first_sample; s < last_sample && cut.starts[s] < r1; ++s) {
      const int64_t s0 = cut.starts[s], s1 = s0 + cut.length(s);
      const int64_t i0 = s0 > r0 ? s0 : r0, i1 = min64(s1, r1);
      if (i0 < i1) attend(i0, i1, s0, s1, normed + (i0 - r0) * sizes.row);
    }
    times<Product>(normed, sizes.row, r1 - r0, sizes.width, matrix(layer, kProj),
                   vector(layer, kProjBias), sizes.width, x + r0 * sizes.row, sizes.row,
                   !args.self_residual);
    if (args.self_residual)
      for (int64_t i = r0 * sizes.row; i < r1 * sizes.row; ++i) x[i] += x[i];
    norm_rows(layer, kGain2, r0, r1, normed);
  }

  // GELU(normed W_in + b_in) of `count` rows.
  void activate_hidden(int64_t layer, const E* normed, int64_t count, A* hidden) const {
    for (int64_t n0 = 0; n0 < sizes.hidden; n0 += kPanel<A>) {
      const int64_t columns = min64(kPanel<A>, sizes.hidden - n0);
      times<Product>(normed, sizes.row, count, sizes.width,
                     matrix(layer, kIn) + n0 * sizes.deep(sizes.width), vector(layer, kInBias) + n0,
                     columns, hidden + n0, sizes.hidden_row, false);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t n = n0; n < n0 + columns; n += kLanes<A>) {
          A* at = hidden + r * sizes.hidden_row + n;
          store(at, activate<A>(Activation::kGelu, load(at), nullptr));
        }
    }
  }

  void layer_block(int64_t layer, int64_t r0, int64_t r1) const {
    const int64_t count = r1 - r0;
    const Buffer<E> normed(count * sizes.row);
    const Buffer<A> hidden(count * sizes.hidden_row);
    const Buffer<E> converted(sizeof(E) == sizeof(A) ? 0 : count * sizes.hidden_row);
    attention_branch(layer, r0, r1, normed);
    activate_hidden(layer, normed, count, hidden);
    times<Product>(Product::operand(hidden, sizes.hidden_row, count, converted), sizes.hidden_row,
                   count, sizes.hidden, matrix(layer, kOut), vector(layer, kOutBias), sizes.width,
                   x + r0 * sizes.row, sizes.row, true);
  }

  // The last layer of rows [r0, r1), whole segments: the segments' means of x and of the hidden
  // rows.
  void pool_block(int64_t r0, int64_t r1) const {
    const int64_t most = min64(kInferenceRows, r1 - r0);
    const Buffer<E> normed(most * sizes.row);
    const Buffer<A> hidden(most * sizes.hidden_row);
    for (int64_t b0 = r0; b0 < r1; b0 += kInferenceRows) {
      const int64_t b1 = min64(b0 + kInferenceRows, r1);
      attention_branch(args.layers - 1, b0, b1, normed);
      activate_hidden(args.layers - 1, normed, b1 - b0, hidden);
      for (int64_t s = first_sample; s < last_sample && cut.starts[s] < b1; ++s) {
        int64_t begin = cut.starts[s];
        for (int64_t g = s * cut.segments(); g < (s + 1) * cut.segments(); ++g) {
          const int64_t end = cut.segment_end(s, g);
          add_means(g, A(1) / static_cast<A>(end - begin), begin > b0 ? begin : b0, min64(end, b1),
                    hidden - b0 * sizes.hidden_row);
          begin = end;
        }
      }
    }
  }

  void add_means(int64_t segment, A share, int64_t r0, int64_t r1, const A* hidden) const {
    A *sum = pooled + segment * sizes.row, *more = pooled_hidden + segment * sizes.hidden_row;
    for (int64_t r = r0; r < r1; ++r) {
      for (int64_t d = 0; d < sizes.width; ++d) sum[d] += share * x[r * sizes.row + d];
      for (int64_t f = 0; f < sizes.hidden; ++f)
        more[f] += share * hidden[r * sizes.hidden_row + f];
    }
  }
};

}  // namespace flmoe::FLMOE_ISA
