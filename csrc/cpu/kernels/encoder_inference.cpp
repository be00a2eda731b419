// Fusion encoders of all experts without gradients, from embedded rows to pooled latents.
//
// An item is an expert with a run of samples of about 96 rows or more. Its rows, queries, keys and
// values stay in the cache through all layers; everything else lives for one block of 96 rows, so
// memory does not grow with the number of experts. Norms are the prologue, biases, GELU and
// residuals the epilogue of a product while its block is in the cache. The last MLP is pooled
// before its second product, because the mean of W h is W times the mean of h. If there are too few
// items for the threads, the blocks of a phase run in parallel instead; the results are the same.
//
// Weights are packed once and kept. Every call reads them once to see whether they have changed.
#include <cmath>

#include "common/kept_weights.h"
#include "cpu/activations.h"
#include "cpu/pair_gate.h"
#include "cpu/panels.h"
#include "cpu/softmax.h"

namespace flmoe::FLMOE_ISA {
namespace {

constexpr int64_t kRows = 96;   // of a block
constexpr int64_t kTile = 24;   // rows of a tile of scores
constexpr int64_t kKeys = 256;  // keys of a tile of scores
constexpr int64_t kLayerTensors = 12;
enum Tensor {
  kGain1,
  kShift1,
  kQ,
  kKV,
  kProj,
  kProjBias,
  kGain2,
  kShift2,
  kIn,
  kInBias,
  kOut,
  kOutBias
};

template <typename T>
constexpr uint64_t kTypeCode = sizeof(T);
template <>
constexpr uint64_t kTypeCode<BFloat16> = 1;

// A polynomial of the content in each lane: a change in one place always changes the digest.
uint64_t digest_of(const void* data, int64_t bytes) {
  constexpr int kChains = 4;
  using Words __attribute__((vector_size(kVectorBytes))) = uint32_t;
  Words chains[kChains] = {}, words[kChains];
  const char* at = static_cast<const char*>(data);
  for (int64_t done = 0; done < bytes; done += sizeof words) {
    if (done + static_cast<int64_t>(sizeof words) > bytes) std::memset(words, 0, sizeof words);
    std::memcpy(words, at + done, min64(sizeof words, bytes - done));
    for (int i = 0; i < kChains; ++i) chains[i] = chains[i] * 0x9e3779b1u + words[i];
  }
  uint64_t digest = static_cast<uint64_t>(bytes);
  for (int i = 0; i < kChains; ++i)
    for (int lane = 0; lane < kVectorBytes / 4; ++lane)
      digest = digest * 0x9e3779b97f4a7c15u + chains[i][lane];
  return digest;
}

// out (rows x columns) [+]= x (rows x depth) packed panels + bias. Rows of `out` have room for
// whole vectors.
template <typename A>
void times(const A* x, int64_t x_row, int64_t rows, int64_t depth, const A* panels, const A* bias,
           int64_t columns, A* out, int64_t out_row, bool add) {
  for (int64_t n0 = 0; n0 < columns; n0 += kPanel<A>) {
    const int64_t count = round_up(min64(kPanel<A>, columns - n0), kLanes<A>);
    if (bias != nullptr)
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t n = n0; n < n0 + count; n += kLanes<A>) {
          A* to = out + r * out_row + n;
          store(to, add ? load(to) + load(bias + n) : load(bias + n));
        }
    gemm<A>(rows, count, depth, x, x_row, 1, panels + n0 * depth, kPanel<A>, out + n0, out_row,
            add || bias != nullptr);
  }
}

// Sizes of a call, and the places of one packed layer in elements.
template <typename A>
struct Sizes {
  int64_t width, hidden, heads, head;
  int64_t blocks, block;               // as many heads as fit a panel are projected at once
  int64_t row, hidden_row, block_row;  // padded to whole vectors
  int64_t places[kLayerTensors], layer;

  explicit Sizes(const EncoderInference& args)
      : width(args.width),
        hidden(args.hidden),
        heads(args.heads),
        head(args.width / args.heads),
        row(round_up(width, kLanes<A>)),
        hidden_row(round_up(hidden, kLanes<A>)) {
    const int64_t fit = kPanel<A> % head == 0 ? kPanel<A> / head : 1;
    const int64_t each = heads % fit == 0 ? fit : 1;
    blocks = heads / each, block = each * head, block_row = round_up(block, kLanes<A>);
    const int64_t square = packed_size<A>(width, width);
    const int64_t vector = panels_of<A>(width) * kPanel<A>;
    const int64_t sizes[kLayerTensors] = {vector,
                                          vector,
                                          blocks * packed_size<A>(width, block),
                                          2 * blocks * packed_size<A>(width, block),
                                          square,
                                          vector,
                                          vector,
                                          vector,
                                          packed_size<A>(width, hidden),
                                          panels_of<A>(hidden) * kPanel<A>,
                                          packed_size<A>(hidden, width),
                                          vector};
    layer = 0;
    for (int t = 0; t < kLayerTensors; ++t) places[t] = layer, layer += sizes[t];
  }

  // Queries (role 0, scaled), keys or values of a block of heads from the normed rows; `weights`
  // are those of a layer.
  void project(const A* normed, int64_t count, const A* weights, int64_t role, int64_t b,
               A* out) const {
    const A* panels = weights + (role == 0 ? places[kQ] : places[kKV]) +
                      (role == 2 ? blocks + b : b) * packed_size<A>(width, block);
    times<A>(normed, row, count, width, panels, nullptr, block, out, block_row, false);
    if (role > 0) return;
    const A scale = A(1) / std::sqrt(static_cast<A>(head));
    for (int64_t i = 0; i < count * block_row; ++i) out[i] *= scale;
  }

  int64_t elements(int t) const {
    switch (t) {
      case kQ:
      case kProj:
        return width * width;
      case kKV:
        return 2 * width * width;
      case kIn:
      case kOut:
        return width * hidden;
      case kInBias:
        return hidden;
      default:
        return width;
    }
  }
};

// weight (columns, depth) to panels.
template <typename T, typename A>
void pack_matrix(const T* weight, int64_t columns, int64_t depth, A* out) {
  for (int64_t n0 = 0; n0 < columns; n0 += kPanel<A>)
    pack_panel<T, A>(weight + n0 * depth, 1, depth, depth, min64(kPanel<A>, columns - n0),
                     out + n0 * depth);
}

template <typename T, typename A>
void pack_tensor(const Sizes<A>& sizes, int t, const T* in, A* out) {
  switch (t) {
    case kQ:
    case kKV:
      for (int64_t b = 0; b < (t == kQ ? 1 : 2) * sizes.blocks; ++b)
        pack_matrix<T, A>(in + b * sizes.block * sizes.width, sizes.block, sizes.width,
                          out + b * packed_size<A>(sizes.width, sizes.block));
      return;
    case kProj:
      return pack_matrix<T, A>(in, sizes.width, sizes.width, out);
    case kIn:
      return pack_matrix<T, A>(in, sizes.hidden, sizes.width, out);
    case kOut:
      return pack_matrix<T, A>(in, sizes.width, sizes.hidden, out);
    default: {
      const int64_t count = sizes.elements(t);
      read_row<T, A>(in, out, count);
      const int64_t padded = panels_of<A>(count) * kPanel<A>;
      for (int64_t i = count; i < padded; ++i) out[i] = 0;
    }
  }
}

// The packed weights of a call, for its duration.
template <typename T, typename A>
class Weights {
 public:
  Weights(const EncoderInference& args, const Sizes<A>& sizes) {
    const int64_t tensors = args.experts * args.layers * kLayerTensors;
    const Buffer<uint64_t> digests(tensors + 1);
    parallel_for(tensors, args.threads, [&](int64_t i, int) {
      digests[i] = digest_of(args.weights[i],
                             sizes.elements(static_cast<int>(i % kLayerTensors)) * sizeof(T));
    });
    // What else the packed form depends on: the types and the heads.
    digests[tensors] = static_cast<uint64_t>(args.heads) << 8 | kTypeCode<T>;
    kept_ = find_weights(digests, tensors + 1);
    if (kept_ == nullptr) {
      kept_ =
          new_weights(args.experts * args.layers * sizes.layer * static_cast<int64_t>(sizeof(A)));
      parallel_for(tensors, args.threads, [&](int64_t i, int) {
        const int t = static_cast<int>(i % kLayerTensors);
        pack_tensor<T, A>(sizes, t, static_cast<const T*>(args.weights[i]),
                          data() + i / kLayerTensors * sizes.layer + sizes.places[t]);
      });
      keep_weights(kept_, digests, tensors + 1);
    }
  }
  ~Weights() { release_weights(kept_); }
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;

  A* data() const { return static_cast<A*>(kept_->data); }

 private:
  KeptWeights* kept_;
};

// Layer norm of a row; gain and shift are padded with zeros, so the padding of `out` is 0.
template <typename A>
void normalize(const A* x, int64_t width, const A* gain, const A* shift, A eps, A* out) {
  A total = 0, squares = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t d = 0; d < width; ++d) total += x[d];
  const A mean = total / static_cast<A>(width);
#pragma omp simd reduction(+ : squares)
  for (int64_t d = 0; d < width; ++d) squares += (x[d] - mean) * (x[d] - mean);
  const A rstd = A(1) / std::sqrt(squares / static_cast<A>(width) + eps);
  for (int64_t d = 0; d < width; ++d) out[d] = (x[d] - mean) * rstd * gain[d] + shift[d];
}

// A run of samples of one expert, on memory that the caller owns.
template <typename T, typename A>
struct Item {
  const EncoderInference& args;
  const Sizes<A>& sizes;
  const A* weights;  // of the expert
  const A* shared;   // first layer's q, k and v of all rows of the table, or null
  int64_t expert, first_sample, last_sample, first, rows, key_row;
  A *x, *q, *v, *k;           // x: rows; q, v: (heads, rows); k: (heads, width of a head, rows)
  A *pooled, *pooled_hidden;  // means, (segments of the expert)

  static int64_t key_stride(int64_t rows) { return round_up(rows, kLanes<A>) + kLanes<A>; }
  static int64_t memory(const Sizes<A>& sizes, int64_t rows) {
    // A vector more, because the last head of a block may be read past its end.
    return rows * sizes.row + 2 * sizes.blocks * rows * sizes.block_row + kLanes<A> +
           sizes.width * key_stride(rows);
  }

  void place(A* memory) {
    key_row = key_stride(rows);
    x = memory;
    q = x + rows * sizes.row;
    v = q + sizes.blocks * rows * sizes.block_row;
    k = v + sizes.blocks * rows * sizes.block_row + kLanes<A>;
  }

  const A* weight(int64_t layer, int t) const {
    return weights + layer * sizes.layer + sizes.places[t];
  }

  void load_rows(int64_t r0, int64_t r1) const {
    const T* table = static_cast<const T*>(args.rows) +
                     (args.row_sets > 1 ? expert : 0) * args.table * sizes.width;
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t row = args.index ? args.index[first + r] : first + r;
      read_row<T, A>(table + row * sizes.width, x + r * sizes.row, sizes.width);
    }
  }

  // The norm of rows [r0, r1) into `normed`.
  void norm_rows(int64_t layer, int gain, int64_t r0, int64_t r1, A* normed) const {
    for (int64_t r = r0; r < r1; ++r)
      normalize<A>(x + r * sizes.row, sizes.width, weight(layer, gain), weight(layer, gain + 1),
                   A(args.eps), normed + (r - r0) * sizes.row);
  }

  // keys (count, block_row) to the columns from r0 of a block of heads.
  void put_keys(const A* keys, int64_t block, int64_t r0, int64_t count) const {
    A* to = k + block * sizes.block * key_row + r0;
    int64_t r = 0;
    if constexpr (kHasShuffle) {
      for (; r + kLanes<A> <= count; r += kLanes<A>)
        for (int64_t d = 0; d < sizes.block; d += kLanes<A>) {
          Vec<A> square[kLanes<A>];
          for (int64_t i = 0; i < kLanes<A>; ++i)
            square[i] = load(keys + (r + i) * sizes.block_row + d);
          transpose<A>(square);
          for (int64_t i = 0; i < min64(kLanes<A>, sizes.block - d); ++i)
            store(to + (d + i) * key_row + r, square[i]);
        }
    }
    for (; r < count; ++r)
      for (int64_t d = 0; d < sizes.block; ++d) to[d * key_row + r] = keys[r * sizes.block_row + d];
  }

  // q, k and v of rows [r0, r1).
  void project(int64_t layer, int64_t r0, int64_t r1) const {
    if (layer == 0) load_rows(r0, r1);
    const bool computes = layer > 0 || shared == nullptr;
    const int64_t count = r1 - r0, row = sizes.block_row;
    const Buffer<A> normed(count * sizes.row), keys(count * row);
    if (computes) norm_rows(layer, kGain1, r0, r1, normed);
    for (int64_t role = 0; role < 3; ++role)
      for (int64_t b = 0; b < sizes.blocks; ++b) {
        A* to = role == 1 ? keys.data() : (role == 0 ? q : v) + (b * rows + r0) * row;
        if (computes) {
          sizes.project(normed, count, weights + layer * sizes.layer, role, b, to);
        } else {
          const A* from = shared + ((expert * 3 + role) * sizes.blocks + b) * args.table * row;
          for (int64_t r = 0; r < count; ++r)
            std::memcpy(to + r * row, from + args.index[first + r0 + r] * row, row * sizeof(A));
        }
        if (role == 1) put_keys(keys, b, r0, count);
      }
  }

  // Attention of rows [r0, r1), all of one sample whose rows are [s0, s1), into out (r1 - r0, row).
  void attend(int64_t r0, int64_t r1, int64_t s0, int64_t s1, A* out) const {
    const int64_t width = round_up(sizes.head, kLanes<A>), row = sizes.block_row;
    const bool direct = width == sizes.head;
    const Buffer<A> tile(kTile * kKeys), edge(direct ? 0 : kTile * width);
    for (int64_t h = 0; h < sizes.heads; ++h) {
      const int64_t column = h * sizes.head % sizes.block;
      const int64_t start = h * sizes.head / sizes.block * rows * row + column;
      for (int64_t i0 = r0; i0 < r1; i0 += kTile) {
        const int64_t count = min64(kTile, r1 - i0);
        A maximum[kTile], total[kTile];
        for (int64_t i = 0; i < count; ++i) maximum[i] = -INFINITY, total[i] = 0;
        A* to = direct ? out + (i0 - r0) * sizes.row + h * width : edge.data();
        const int64_t to_row = direct ? sizes.row : width;
        for (int64_t j0 = s0; j0 < s1; j0 += kKeys) {
          const int64_t keys = min64(kKeys, s1 - j0);
          gemm<A>(count, round_up(keys, kLanes<A>), sizes.head, q + start + i0 * row, row, 1,
                  k + h * sizes.head * key_row + j0, key_row, tile, kKeys, false);
          for (int64_t i = 0; i < count; ++i) {
            const A factor = softmax_row<A>(tile + i * kKeys, keys, maximum + i, total + i);
            if (j0 > s0 && factor != A(1))
              for (int64_t d = 0; d < width; ++d) to[i * to_row + d] *= factor;
          }
          gemm<A>(count, width, keys, tile, kKeys, 1, v + start + j0 * row, row, to, to_row,
                  j0 > s0);
        }
        for (int64_t i = 0; i < count; ++i) {
          const A share = A(1) / total[i];
          A* row_out = out + (i0 - r0 + i) * sizes.row + h * sizes.head;
          for (int64_t d = 0; d < sizes.head; ++d) row_out[d] = to[i * to_row + d] * share;
        }
      }
    }
  }

  // x of rows [r0, r1) after the attention branch, and the second norm.
  void attention_branch(int64_t layer, int64_t r0, int64_t r1, A* normed) const {
    A* attended = normed;
    for (int64_t s = first_sample; s < last_sample; ++s) {
      const int64_t s0 = args.cu_samples[s] - first, s1 = args.cu_samples[s + 1] - first;
      const int64_t i0 = s0 > r0 ? s0 : r0, i1 = min64(s1, r1);
      if (i0 < i1) attend(i0, i1, s0, s1, attended + (i0 - r0) * sizes.row);
    }
    times<A>(attended, sizes.row, r1 - r0, sizes.width, weight(layer, kProj),
             weight(layer, kProjBias), sizes.width, x + r0 * sizes.row, sizes.row,
             !args.self_residual);
    if (args.self_residual)
      for (int64_t i = r0 * sizes.row; i < r1 * sizes.row; ++i) x[i] += x[i];
    norm_rows(layer, kGain2, r0, r1, normed);
  }

  // GELU(normed W_in + b_in) of `count` rows.
  void activate_hidden(int64_t layer, const A* normed, int64_t count, A* hidden) const {
    for (int64_t n0 = 0; n0 < sizes.hidden; n0 += kPanel<A>) {
      const int64_t columns = min64(kPanel<A>, sizes.hidden - n0);
      times<A>(normed, sizes.row, count, sizes.width, weight(layer, kIn) + n0 * sizes.width,
               weight(layer, kInBias) + n0, columns, hidden + n0, sizes.hidden_row, false);
      for (int64_t r = 0; r < count; ++r)
        for (int64_t n = n0; n < n0 + columns; n += kLanes<A>) {
          A* at = hidden + r * sizes.hidden_row + n;
          store(at, activate<A>(Activation::kGelu, load(at), nullptr));
        }
    }
  }

  void layer_block(int64_t layer, int64_t r0, int64_t r1) const {
    const Buffer<A> normed((r1 - r0) * sizes.row), hidden((r1 - r0) * sizes.hidden_row);
    attention_branch(layer, r0, r1, normed);
    activate_hidden(layer, normed, r1 - r0, hidden);
    times<A>(hidden, sizes.hidden_row, r1 - r0, sizes.hidden, weight(layer, kOut),
             weight(layer, kOutBias), sizes.width, x + r0 * sizes.row, sizes.row, true);
  }

  // The last layer of rows [r0, r1), whole segments: the segments' means of x and of the hidden
  // rows.
  void pool_block(int64_t r0, int64_t r1) const {
    const int64_t layer = args.layers - 1;
    const Buffer<A> normed(min64(kRows, r1 - r0) * sizes.row);
    const Buffer<A> hidden(min64(kRows, r1 - r0) * sizes.hidden_row);
    const int64_t each = args.segments / args.samples;
    int64_t segment = first_sample * each;
    for (int64_t b0 = r0; b0 < r1; b0 += kRows) {
      const int64_t b1 = min64(b0 + kRows, r1);
      attention_branch(layer, b0, b1, normed);
      activate_hidden(layer, normed, b1 - b0, hidden);
      for (int64_t r = b0; r < b1; ++r) {
        while (args.cu_segments[segment + 1] - first <= r) ++segment;
        const A share =
            A(1) / static_cast<A>(args.cu_segments[segment + 1] - args.cu_segments[segment]);
        A *sum = pooled + segment * sizes.row, *more = pooled_hidden + segment * sizes.hidden_row;
        for (int64_t d = 0; d < sizes.row; ++d) sum[d] += share * x[r * sizes.row + d];
        for (int64_t f = 0; f < sizes.hidden_row; ++f)
          more[f] += share * hidden[(r - b0) * sizes.hidden_row + f];
      }
    }
  }
};

// How the rows of an expert are cut: into items, and the items into blocks of a phase.
struct Cut {
  const EncoderInference& args;
  int64_t items = 0;
  Buffer<int64_t> samples;  // first sample of each item, then the number of samples

  explicit Cut(const EncoderInference& args) : args(args), samples(args.samples + 1) {
    for (int64_t s = 0; s < args.samples; ++s)
      if (s == 0 || args.cu_samples[s] - args.cu_samples[samples[items - 1]] >= kRows)
        samples[items++] = s;
    samples[items] = args.samples;
  }

  int64_t rows(int64_t item) const {
    return args.cu_samples[samples[item + 1]] - args.cu_samples[samples[item]];
  }

  // The end of the block from row r0 of an item. A block of the last layer has whole segments.
  int64_t block_end(int64_t item, int64_t r0, bool last) const {
    const int64_t all = rows(item);
    if (!last) return min64(r0 + kRows, all);
    const int64_t first = args.cu_samples[samples[item]], each = args.segments / args.samples;
    int64_t segment = samples[item] * each;
    while (args.cu_segments[segment] - first <= r0) ++segment;
    while (args.cu_segments[segment] - first < min64(r0 + kRows, all)) ++segment;
    return args.cu_segments[segment] - first;
  }
};

template <typename T, typename A>
struct Inference {
  const EncoderInference& args;
  const Sizes<A> sizes;
  const Weights<T, A> weights;
  const Cut cut;
  const bool shares;  // the first layer's projections of the table are computed once
  const Buffer<A> shared, pooled, pooled_hidden;

  explicit Inference(const EncoderInference& args)
      : args(args),
        sizes(args),
        weights(args, sizes),
        cut(args),
        shares(args.index != nullptr && 2 * args.table <= args.rows_total),
        shared(shares ? args.experts * args.table * 3 * sizes.blocks * sizes.block_row : 0),
        pooled(args.experts * args.segments * sizes.row),
        pooled_hidden(args.experts * args.segments * sizes.hidden_row) {}

  const A* weights_of(int64_t expert) const {
    return weights.data() + expert * args.layers * sizes.layer;
  }

  Item<T, A> item_of(int64_t expert, int64_t i) const {
    const int64_t s0 = cut.samples[i], s1 = cut.samples[i + 1];
    return {args,
            sizes,
            weights_of(expert),
            shares ? shared.data() : nullptr,
            expert,
            s0,
            s1,
            args.cu_samples[s0],
            cut.rows(i),
            0,
            nullptr,
            nullptr,
            nullptr,
            nullptr,
            pooled + expert * args.segments * sizes.row,
            pooled_hidden + expert * args.segments * sizes.hidden_row};
  }

  // Phases of a layer: projections, then everything else.
  void run_block(const Item<T, A>& item, int64_t phase, int64_t r0, int64_t r1) const {
    const int64_t layer = phase / 2;
    if (phase % 2 == 0)
      item.project(layer, r0, r1);
    else if (layer + 1 < args.layers)
      item.layer_block(layer, r0, r1);
    else
      item.pool_block(r0, r1);
  }

  bool last(int64_t phase) const { return phase == 2 * args.layers - 1; }

  void run_items() const {
    parallel_for(args.experts * cut.items, args.threads, [&](int64_t place, int) {
      const int64_t i = place % cut.items, rows = cut.rows(i);
      Item<T, A> item = item_of(place / cut.items, i);
      const Buffer<A> memory(Item<T, A>::memory(sizes, rows));
      item.place(memory);
      for (int64_t phase = 0; phase < 2 * args.layers; ++phase)
        for (int64_t r0 = 0, r1; r0 < rows; r0 = r1) {
          r1 = cut.block_end(i, r0, last(phase));
          run_block(item, phase, r0, r1);
        }
    });
  }

  // The same, with the blocks of a phase in parallel.
  void run_phases() const {
    int64_t each = 0, blocks = 0;
    for (int64_t i = 0; i < cut.items; ++i) {
      each += Item<T, A>::memory(sizes, cut.rows(i));
      for (int64_t r0 = 0; r0 < cut.rows(i); r0 = cut.block_end(i, r0, false)) ++blocks;
    }
    const Buffer<A> memory(args.experts * each);
    const Buffer<int64_t> block(3 * blocks);
    for (int64_t phase = 0; phase < 2 * args.layers; ++phase) {
      int64_t count = 0;
      for (int64_t i = 0; i < cut.items; ++i)
        for (int64_t r0 = 0, r1; r0 < cut.rows(i); r0 = r1) {
          r1 = cut.block_end(i, r0, last(phase));
          block[3 * count] = i, block[3 * count + 1] = r0, block[3 * count++ + 2] = r1;
        }
      parallel_for(args.experts * count, args.threads, [&](int64_t place, int) {
        const int64_t* at = block + place % count * 3;
        Item<T, A> item = item_of(place / count, at[0]);
        A* own = memory + place / count * each;
        for (int64_t i = 0; i < at[0]; ++i) own += Item<T, A>::memory(sizes, cut.rows(i));
        item.place(own);
        run_block(item, phase, at[1], at[2]);
      });
    }
  }

  // q, k and v of every row of the table in the first layer.
  void project_table() const {
    const int64_t blocks = (args.table + kRows - 1) / kRows, width = sizes.block_row;
    parallel_for(args.experts * blocks, args.threads, [&](int64_t place, int) {
      const int64_t expert = place / blocks, r0 = place % blocks * kRows;
      const int64_t count = min64(kRows, args.table - r0);
      const Buffer<A> row(sizes.row), normed(count * sizes.row);
      const A* own = weights_of(expert);
      const T* table = static_cast<const T*>(args.rows) +
                       ((args.row_sets > 1 ? expert : 0) * args.table + r0) * sizes.width;
      for (int64_t r = 0; r < count; ++r) {
        read_row<T, A>(table + r * sizes.width, row, sizes.width);
        normalize<A>(row, sizes.width, own + sizes.places[kGain1], own + sizes.places[kShift1],
                     A(args.eps), normed + r * sizes.row);
      }
      for (int64_t b = 0; b < 3 * sizes.blocks; ++b)
        sizes.project(normed, count, own, b / sizes.blocks, b % sizes.blocks,
                      shared + ((expert * 3 * sizes.blocks + b) * args.table + r0) * width);
    });
  }

  void write_latents() const {
    const int64_t blocks = (args.segments + kRows - 1) / kRows;
    parallel_for(args.experts * blocks, args.threads, [&](int64_t place, int) {
      const int64_t expert = place / blocks, s0 = place % blocks * kRows;
      const int64_t count = min64(kRows, args.segments - s0);
      const int64_t at = expert * args.segments + s0;
      const A* own = weights_of(expert) + (args.layers - 1) * sizes.layer;
      times<A>(pooled_hidden + at * sizes.hidden_row, sizes.hidden_row, count, sizes.hidden,
               own + sizes.places[kOut], own + sizes.places[kOutBias], sizes.width,
               pooled + at * sizes.row, sizes.row, true);
      for (int64_t s = 0; s < count; ++s) {
        A* latent = pooled + (at + s) * sizes.row;
        if (args.cu_segments[s0 + s] == args.cu_segments[s0 + s + 1])
          std::memset(latent, 0, sizes.width * sizeof(A));
        write_row<T, A>(latent, static_cast<T*>(args.out) + (at + s) * sizes.width, sizes.width);
      }
    });
  }

  void run() const {
    std::memset(pooled, 0, args.experts * args.segments * sizes.row * sizeof(A));
    std::memset(pooled_hidden, 0, args.experts * args.segments * sizes.hidden_row * sizeof(A));
    if (shares) project_table();
    if (args.experts * cut.items >= 4 * args.threads)
      run_items();
    else
      run_phases();
    write_latents();
  }
};

}  // namespace

void encoder_inference(DType dtype, const EncoderInference& args) {
  with_dtype(dtype, [&]<typename T>() {
    if (args.samples > 0) Inference<T, typename Compute<T>::Type>(args).run();
  });
}

}  // namespace flmoe::FLMOE_ISA
