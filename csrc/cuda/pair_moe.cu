// Launches of pair_moe on a GPU, and its short kernels: terms that belong to one token, and sums of
// blocks. The kernel of pairs is in pair_kernel.cuh.
//
// The gradient of p for a pair is offset_i + offset_j + factor_i . c_j, with terms of one token
//     offset_i = grad_mass_i + s1 a_i . g_i,   factor_i = (s2 + s3 a_i) g_i
// for the gradient g_i of y_i; under kPool, where g is the same for all rows, s2 c_j . g is
// offset_j instead. Contributions of pairs have the same form with the head as g. Then
//     grad_q, grad_k and grad_bias   from that of p, see PairMode::kGradient
//     grad_a_i = s1 g_i sum_j p + s3 g_i sum_j p c_j
//     grad_c_j = sum_i p factor_i [+ s2 g sum_i p under kPool]
// Every gradient has a launch of its own, which computes the gate again.
#include "cuda/pair_moe.h"

#include <cuda_runtime.h>

#include <initializer_list>

#include "cuda/convert.cuh"
#include "cuda/pair_launch.h"

namespace flmoe::cuda {
namespace {

// kind -> (s1, s2, s3); the positions are those of KINDS in flmoe_kernels/ops/pair_moe/kinds.py.
constexpr float kCoefficients[kPairKinds][3] = {
    {1, 0, 0}, {0, 1, 0}, {0, 0, 1}, {0.5f, 0.5f, 0}, {0, 0, 0}};
constexpr int kMostTokens = 1 << 30, kRowsOfProject = 8;
constexpr char kTooLarge[] = "pair_moe: expected up to 2^30 tokens and a grid of up to 2^31 blocks";
constexpr char kTooDeep[] =
    "pair_moe: the GPU has too little shared memory for these R and V and this dtype";

struct ProjectArgs {
  RowView x, g;
  bool g_wide, factor_wide;  // in the compute type
  const void* base;          // (batch, experts, length) or null
  const uint8_t* mask;
  void *offset, *factor;  // (batch, experts, length), (batch, experts, length, width)
  float c0[kMaxExperts], c1[kMaxExperts], c2[kMaxExperts];
  int batch, experts, length, width;
};

// offset = base + c0 x . g and factor = (c1 + c2 x) g, 0 for masked tokens. One warp per token;
// x and g are read once; bound by memory. Terms of coefficient 0 have no part.
template <typename T, typename A>
__global__ void __launch_bounds__(32 * kRowsOfProject, 1)
    project_kernel(const __grid_constant__ ProjectArgs in) {
  const int lane = threadIdx.x % 32;
  const int64_t token = int64_t{blockIdx.x} * kRowsOfProject + threadIdx.x / 32;
  const int64_t b = token / in.length, i = token % in.length;
  if (b >= in.batch) return;
  const bool valid = in.mask == nullptr || in.mask[token] != 0;
#pragma unroll
  for (int e = 0; e < kMaxExperts; ++e) {
    if (e >= in.experts) break;
    const int64_t line = (b * in.experts + e) * in.length + i;
    const int64_t of_x = b * in.x.group_stride + e * in.x.head_stride + i * in.x.row_stride;
    const int64_t of_g = b * in.g.group_stride + e * in.g.head_stride + i * in.g.row_stride;
    const bool factors = in.c1[e] + in.c2[e] > 0;
    A total = 0;
    for (int v = lane; v < in.width && (factors || in.c0[e] > 0); v += 32) {
      A product = 0;
      if (valid) {
        const A own = widened(static_cast<const T*>(in.x.data)[of_x + v]);
        const A g = in.g_wide ? static_cast<const A*>(in.g.data)[of_g + v]
                              : A(widened(static_cast<const T*>(in.g.data)[of_g + v]));
        if (in.c0[e] > 0) total += own * g;
        if (in.c1[e] > 0) product += in.c1[e] * g;
        if (in.c2[e] > 0) product += in.c2[e] * own * g;
      }
      if (!factors) continue;
      if (in.factor_wide) {
        static_cast<A*>(in.factor)[line * in.width + v] = product;
      } else {
        narrow(product, static_cast<T*>(in.factor) + line * in.width + v);
      }
    }
#pragma unroll
    for (int apart = 16; apart > 0; apart /= 2) total += __shfl_xor_sync(0xffffffffu, total, apart);
    A offset = 0;
    if (valid && in.base != nullptr) offset = static_cast<const A*>(in.base)[line];
    if (in.c0[e] > 0) offset += in.c0[e] * total;
    if (lane == 0) static_cast<A*>(in.offset)[line] = offset;
  }
}

// out[o, i] = sum over `blocks` of parts[o, block, i]. One warp per output: a lane adds every 32nd.
template <typename A>
__global__ void sum_kernel(const A* parts, A* out, int64_t outer, int64_t blocks, int64_t inner) {
  const int64_t n = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (n >= outer * inner) return;
  const A* const first = parts + n / inner * blocks * inner + n % inner;
  A total = 0;
  for (int64_t block = threadIdx.x % 32; block < blocks; block += 32) total += first[block * inner];
#pragma unroll
  for (int apart = 16; apart > 0; apart /= 2) total += __shfl_xor_sync(0xffffffffu, total, apart);
  if (threadIdx.x % 32 == 0) out[n] = total;
}

RowView contiguous(const void* data, int64_t experts, int64_t length, int64_t width) {
  return {data, experts * length * width, width, length * width};
}

template <typename F>
auto with_type(DType dtype, const F& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(float{}, float{});
    case DType::kFloat64:
      return body(double{}, double{});
    case DType::kBFloat16:
      return body(BFloat16{}, float{});
    default:
      return body(Float16{}, float{});
  }
}

// Takes parts of the workspace; without one it counts their bytes.
class Workspace {
 public:
  explicit Workspace(void* data) : data_(static_cast<char*>(data)) {}
  void* take(int64_t bytes) {
    void* const found = data_ == nullptr ? nullptr : data_ + used_;
    used_ += (bytes + 255) / 256 * 256;
    return found;
  }
  int64_t used() const { return used_; }

 private:
  char* data_;
  int64_t used_ = 0;
};

// The launches of a call for elements T with the compute type A.
template <typename T, typename A>
class Launches {
 public:
  Launches(const PairArgs& args, const Place& place)
      : in_(args), stream_(static_cast<cudaStream_t>(place.stream)) {
    // The runtime is linked into this module, so a pending error comes from an earlier call, which
    // has reported it.
    cudaGetLastError();
    error_ = cudaSetDevice(place.device);
    if (error_ == cudaSuccess)
      error_ =
          cudaDeviceGetAttribute(&shared_, cudaDevAttrMaxSharedMemoryPerBlockOptin, place.device);
    if (args.batch > kMostTokens || args.rows > kMostTokens || args.columns > kMostTokens ||
        args.rank > kMostTokens || args.width > kMostTokens)
      error_ = cudaErrorInvalidConfiguration;
  }

  const char* message() const {
    if (error_ == cudaErrorInvalidConfiguration) return kTooLarge;
    if (error_ == kTooLittleShared) return kTooDeep;
    return error_ == cudaSuccess ? nullptr : cudaGetErrorString(error_);
  }

  // A launch with the gate alone; swapped: rows are the tokens of side b.
  PairLaunch gate(bool swapped) const {
    PairLaunch launch{};
    launch.x = operand(in_.q, in_.rank, sizeof(T));
    launch.z = operand(in_.k, in_.rank, sizeof(T));
    launch.mask_x = in_.mask_a, launch.mask_z = in_.mask_b;
    launch.rows = static_cast<int>(in_.rows), launch.columns = static_cast<int>(in_.columns);
    if (swapped) {
      swap(launch.x, launch.z), swap(launch.mask_x, launch.mask_z);
      swap(launch.rows, launch.columns);
    }
    launch.rank = static_cast<int>(in_.rank), launch.width = static_cast<int>(in_.width);
    launch.scale = in_.scale, launch.bias = in_.gate_bias;
    launch.experts = static_cast<int>(in_.experts), launch.top_k = static_cast<int>(in_.top_k);
    launch.batch = static_cast<int>(in_.batch);
    launch.last = launch.rows;
    return launch;
  }

  void run(PairMode mode, const PairLaunch& launch) {
    if (error_ == cudaSuccess) error_ = launch_pairs<T>(mode, launch, shared_, stream_);
  }

  // y, or the gradient of a or c: sums of p times `other`, see PairLaunch.
  void sums(bool swapped, const RowView& own, bool own_wide, const RowView& other,
            const float (&s)[3][kMaxExperts], const RowView& out, PairReduce reduce, void* mass) {
    PairLaunch launch = gate(swapped);
    launch.own = own, launch.own_wide = own_wide;
    launch.w = operand(other, in_.width, sizeof(T));
    for (int e = 0; e < launch.experts; ++e) {
      launch.s1[e] = s[0][e], launch.s2[e] = s[1][e], launch.s3[e] = s[2][e];
      if (s[1][e] + s[2][e] > 0) launch.products |= 1u << e;
    }
    launch.out = out, launch.reduce = reduce, launch.row_sums = mass;
    run(PairMode::kSums, launch);
  }

  void project(const RowView& x, const uint8_t* mask, int64_t length, const RowView& g, bool g_wide,
               const void* base, const float (&c)[3][kMaxExperts], void* offset, void* factor,
               bool factor_wide) {
    ProjectArgs args{x, g, g_wide, factor_wide, base, mask, offset, factor, {}, {}, {}, 0, 0, 0, 0};
    for (int e = 0; e < kMaxExperts; ++e)
      args.c0[e] = c[0][e], args.c1[e] = c[1][e], args.c2[e] = c[2][e];
    args.batch = static_cast<int>(in_.batch), args.experts = static_cast<int>(in_.experts);
    args.length = static_cast<int>(length), args.width = static_cast<int>(in_.width);
    const int64_t grid = (in_.batch * length + kRowsOfProject - 1) / kRowsOfProject;
    if (error_ == cudaSuccess && grid > INT32_MAX) error_ = cudaErrorInvalidConfiguration;
    if (error_ != cudaSuccess) return;
    project_kernel<T, A><<<static_cast<unsigned>(grid), 32 * kRowsOfProject, 0, stream_>>>(args);
    error_ = cudaGetLastError();
  }

  void sum_blocks(const void* parts, void* out, int64_t outer, int64_t blocks, int64_t inner) {
    constexpr int kThreads = 128;
    const int64_t grid = (outer * inner * 32 + kThreads - 1) / kThreads;
    if (error_ == cudaSuccess && grid > INT32_MAX) error_ = cudaErrorInvalidConfiguration;
    if (error_ != cudaSuccess) return;
    sum_kernel<A><<<static_cast<unsigned>(grid), kThreads, 0, stream_>>>(
        static_cast<const A*>(parts), static_cast<A*>(out), outer, blocks, inner);
    error_ = cudaGetLastError();
  }

  static PairOperand operand(const RowView& view, int64_t width, int64_t element) {
    const int64_t sizes = view.group_stride | view.row_stride | view.head_stride | width;
    const int64_t bytes = reinterpret_cast<intptr_t>(view.data) | sizes * element;
    return {view, bytes % 16 == 0};
  }

 private:
  template <typename X>
  static void swap(X& x, X& y) {
    const X kept = x;
    x = y, y = kept;
  }

  const PairArgs& in_;
  cudaStream_t stream_;
  cudaError_t error_;
  int shared_ = 0;
};

int64_t blocks_of(DType dtype, const PairArgs& in) {
  const int rows = with_type(dtype, [&](auto element, auto) {
    return pair_block_rows<decltype(element)>(static_cast<int>(in.experts));
  });
  return (in.rows + rows - 1) / rows;
}

// s1, s2, s3 of the experts.
struct Coefficients {
  float s[3][kMaxExperts] = {};
  explicit Coefficients(const PairArgs& in) {
    for (int64_t e = 0; e < in.experts; ++e)
      for (int i = 0; i < 3; ++i) s[i][e] = kCoefficients[in.kinds[e]][i];
  }
};

// The parts of a pair's value that belong to one token, in a workspace.
struct Sides {
  void *offset_i, *offset_j = nullptr, *factor;
  uint32_t products = 0;

  Sides(const PairArgs& in, const Coefficients& s, bool pool, int64_t sum, int64_t element,
        Workspace& workspace) {
    for (int64_t e = 0; e < in.experts; ++e)
      if (s.s[2][e] > 0 || (s.s[1][e] > 0 && !pool)) products |= 1u << e;
    offset_i = workspace.take(in.batch * in.experts * in.rows * sum);
    if (pool) offset_j = workspace.take(in.batch * in.experts * in.columns * sum);
    factor = workspace.take(in.batch * in.experts * in.rows * in.width * element);
  }
};

// Computes the sides for the gradient g of y (or a head).
template <typename T, typename A>
void project_sides(Launches<T, A>& launches, const PairArgs& in, const Coefficients& s,
                   const RowView& g, bool g_wide, bool pool, const void* grad_mass,
                   const Sides& sides, bool factor_wide) {
  float own[3][kMaxExperts] = {}, other[3][kMaxExperts] = {};
  for (int e = 0; e < kMaxExperts; ++e) {
    own[0][e] = s.s[0][e], own[1][e] = pool ? 0 : s.s[1][e], own[2][e] = s.s[2][e];
    other[0][e] = s.s[1][e];
  }
  launches.project(in.a, in.mask_a, in.rows, g, g_wide, grad_mass, own, sides.offset_i,
                   sides.factor, factor_wide);
  if (pool)
    launches.project(in.c, in.mask_b, in.columns, g, g_wide, nullptr, other, sides.offset_j,
                     nullptr, false);
}

// Gives a launch the values of pairs.
template <typename T, typename A>
void set_values(PairLaunch& launch, const PairArgs& in, const Sides& sides, bool swapped,
                int64_t element) {
  using L = Launches<T, A>;
  const RowView factor = contiguous(sides.factor, in.experts, in.rows, in.width);
  launch.u = L::operand(factor, in.width, element);
  launch.w = L::operand(in.c, in.width, sizeof(T));
  launch.offset_x = sides.offset_i, launch.offset_z = sides.offset_j;
  launch.products = sides.products;
  if (!swapped) return;
  const PairOperand kept = launch.u;
  launch.u = launch.w, launch.w = kept;
  launch.offset_x = sides.offset_j, launch.offset_z = sides.offset_i;
}

int64_t sum_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : 4;
}
int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

struct BackwardParts {
  Sides sides;
  void* bias;
  BackwardParts(DType dtype, const PairBackward& args, const Coefficients& s, Workspace& workspace)
      : sides(args.in, s, args.reduce == PairReduce::kPool, sum_size(dtype), element_size(dtype),
              workspace),
        bias(workspace.take(args.in.batch * blocks_of(dtype, args.in) * args.in.experts *
                            sum_size(dtype))) {}
};

}  // namespace

int64_t pair_forward_workspace(DType dtype, const PairForward& args) {
  const PairArgs& in = args.in;
  if (args.reduce != PairReduce::kPool) return 0;
  return in.batch * in.experts * blocks_of(dtype, in) * in.width * sum_size(dtype);
}

const char* pair_forward(DType dtype, const PairForward& args, void* workspace,
                         const Place& place) {
  const PairArgs& in = args.in;
  return with_type(dtype, [&](auto element, auto sum) {
    Launches<decltype(element), decltype(sum)> launches(in, place);
    const Coefficients s(in);
    const int64_t blocks = blocks_of(dtype, in);
    RowView out = contiguous(args.y, in.experts, in.rows, in.width);
    if (args.reduce == PairReduce::kExperts) out = contiguous(args.y, 1, in.rows, in.width);
    if (args.reduce == PairReduce::kPool) out = contiguous(workspace, in.experts, blocks, in.width);
    launches.sums(false, in.a, false, in.c, s.s, out, args.reduce, args.mass);
    if (args.reduce == PairReduce::kPool)
      launches.sum_blocks(workspace, args.y, in.batch * in.experts, blocks, in.width);
    return launches.message();
  });
}

int64_t pair_backward_workspace(DType dtype, const PairBackward& args) {
  Workspace workspace(nullptr);
  const BackwardParts parts(dtype, args, Coefficients(args.in), workspace);
  return workspace.used();
}

const char* pair_backward(DType dtype, const PairBackward& args, void* data, const Place& place) {
  const PairArgs& in = args.in;
  const bool pool = args.reduce == PairReduce::kPool;
  const Coefficients s(in);
  Workspace workspace(data);
  const BackwardParts parts(dtype, args, s, workspace);
  const Sides& sides = parts.sides;
  return with_type(dtype, [&](auto element, auto sum) {
    using T = decltype(element);
    using A = decltype(sum);
    Launches<T, A> launches(in, place);
    // The gradient of a does not use the sides.
    if (args.grad_q || args.grad_k || args.grad_c || args.grad_bias)
      project_sides(launches, in, s, args.grad_y, pool, pool, args.grad_mass, sides, false);
    const auto gradient = [&](bool swapped, void* grad, void* bias) {
      if (grad == nullptr && bias == nullptr) return;
      PairLaunch launch = launches.gate(swapped);
      set_values<T, A>(launch, in, sides, swapped, sizeof(T));
      launch.out = contiguous(grad, in.experts, launch.rows, in.rank);
      launch.row_sums = bias;
      launches.run(PairMode::kGradient, launch);
    };
    gradient(false, args.grad_q, args.grad_bias == nullptr ? nullptr : parts.bias);
    gradient(true, args.grad_k, nullptr);
    if (args.grad_bias != nullptr)
      launches.sum_blocks(parts.bias, args.grad_bias, 1, in.batch * blocks_of(dtype, in),
                          in.experts);
    float of_a[3][kMaxExperts] = {}, of_c[3][kMaxExperts] = {};
    for (int e = 0; e < kMaxExperts; ++e) {
      of_a[0][e] = s.s[0][e], of_a[2][e] = s.s[2][e];
      of_c[0][e] = pool ? s.s[1][e] : 0, of_c[1][e] = (sides.products >> e & 1) != 0;
    }
    if (args.grad_a != nullptr)
      launches.sums(false, args.grad_y, pool, in.c, of_a,
                    contiguous(args.grad_a, in.experts, in.rows, in.width), PairReduce::kNone,
                    nullptr);
    if (args.grad_c != nullptr)
      launches.sums(
          true, args.grad_y, pool, contiguous(sides.factor, in.experts, in.rows, in.width), of_c,
          contiguous(args.grad_c, in.experts, in.columns, in.width), PairReduce::kNone, nullptr);
    return launches.message();
  });
}

int64_t pair_map_workspace(DType dtype, const PairScores& args) {
  Workspace workspace(nullptr);
  const int64_t sum = sum_size(dtype);
  const Sides sides(args.in, Coefficients(args.in), true, sum, sum, workspace);
  return workspace.used();
}

const char* pair_map(DType dtype, const PairScores& args, const PairRows& rows, void* data,
                     const Place& place) {
  const PairArgs& in = args.in;
  const Coefficients s(in);
  Workspace workspace(data);
  const Sides sides(in, s, true, sum_size(dtype), sum_size(dtype), workspace);
  return with_type(dtype, [&](auto element, auto sum) {
    using T = decltype(element);
    using A = decltype(sum);
    Launches<T, A> launches(in, place);
    if (rows.first == 0)
      project_sides(launches, in, s, args.head, false, true, nullptr, sides, true);
    PairLaunch launch = launches.gate(false);
    set_values<T, A>(launch, in, sides, false, sizeof(A));
    launch.first = static_cast<int>(rows.first), launch.last = static_cast<int>(rows.last);
    launch.out = contiguous(args.map, in.experts, rows.last - rows.first, in.columns);
    launches.run(PairMode::kMap, launch);
    return launches.message();
  });
}

}  // namespace flmoe::cuda
