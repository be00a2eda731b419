// Tiles of pair_moe's kernels: copies to shared memory, and the two products of a warp.
//
// A warp has 16 rows. The results of a product are in the layout of mma.sync for every element
// type: with g = lane / 4 and t = lane % 4, tile[n][i] is row g + 8 * (i / 2), column
// 8 * n + 2 * t + i % 2. Products of 16-bit elements are mma.sync m16n8k16 with float32 sums; those
// of float32 and float64 are multiply-adds, which need no splitting of float32 into TF32 parts: on
// sm_90 their 96 multiply-adds per pair and expert (R 32, V 64) take 0.75 cycles of an SM, three
// TF32 products 0.56 at the full rate, which mma.sync does not reach (an estimate, not measured).
//
// The depth of operands is cut into slices of kSliceBytes; a tile is a slice of one expert, with
// rows of 16 bytes more, so that the eight rows of a load are in different banks. Places are
// offsets in shared memory, in bytes; those of mma.sync's operands are addresses.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/types.h"
#include "cuda/convert.cuh"

namespace flmoe::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;

// Compute type; whether products use the matrix units; columns of a tile of pairs; elements of the
// depth that one product has.
template <typename T>
struct Element {
  using Sum = float;
  static constexpr bool kMatrix = true;
  static constexpr int kColumns = 16, kDepth = 16;
};
template <>
struct Element<float> {
  using Sum = float;
  static constexpr bool kMatrix = false;
  static constexpr int kColumns = 16, kDepth = 4;
};
template <>
struct Element<double> {
  using Sum = double;
  static constexpr bool kMatrix = false;
  static constexpr int kColumns = 8, kDepth = 4;
};

template <typename T>
constexpr int kTiles = Element<T>::kColumns / 8;

extern __shared__ __align__(16) char shared[];

// x, as a value that the compiler does not compute again.
__device__ __forceinline__ uint32_t kept(uint32_t x) {
  asm volatile("mov.b32 %0, %1;" : "=r"(x) : "r"(x));
  return x;
}
// Address of the place 0.
__device__ __forceinline__ uint32_t shared_window() {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Copies kBytes, or writes zeros without reading.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool there) {
  if constexpr (kBytes == 16) {
    asm volatile(
        "{.reg .pred none; setp.eq.u32 none, %2, 0; cp.async.cg.shared.global [%0], [%1], 16, "
        "none;}" ::"r"(to),
        "l"(from), "r"(uint32_t{there})
        : "memory");
  } else {
    asm volatile(
        "{.reg .pred none; setp.eq.u32 none, %2, 0; cp.async.ca.shared.global [%0], [%1], %3, "
        "none;}" ::"r"(to),
        "l"(from), "r"(uint32_t{there}), "n"(kBytes)
        : "memory");
  }
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}

template <typename T>
__device__ __forceinline__ T& at(int offset) {
  return *reinterpret_cast<T*>(shared + offset);
}

// Four matrices of 8 x 8 16-bit elements; `address` is that of this thread's row.
__device__ __forceinline__ void load_matrices(uint32_t address, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t address, uint32_t (&x)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(address)
               : "memory");
}

#define FLMOE_MMA(type)                                                      \
  asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

template <typename T>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  if constexpr (sizeof(T) == 2 && Element<T>::kMatrix) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      FLMOE_MMA("bf16");
    } else {
      FLMOE_MMA("f16");
    }
  }
}
#undef FLMOE_MMA

template <typename T>
__device__ __forceinline__ uint32_t packed(float low, float high) {
  uint32_t word;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

// Elements that are loaded at once.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Few {
  T x[kCount];
};

// Where a lane begins to read its part of 16 rows (kColumns: of the columns) of a product, in rows
// of kLine bytes.
template <bool kMatrix, int kLine>
__device__ __forceinline__ int lane_of_rows(int lane) {
  return kMatrix ? lane % 16 * kLine + lane / 16 * 16 : lane / 4 * kLine;
}
template <bool kMatrix, int kLine>
__device__ __forceinline__ int lane_of_columns(int lane) {
  return kMatrix ? (lane / 16 * 8 + lane % 8) * kLine + lane / 8 % 2 * 16 : lane % 4 * 2 * kLine;
}
// The same for the values of columns, which are summed; kSlice: bytes from one slice of them to the
// next, 0 if there is one.
template <typename T, int kLine, int kSlice>
__device__ __forceinline__ int lane_of_values(int lane) {
  if constexpr (Element<T>::kMatrix) return lane % 16 * kLine + lane / 16 * 16;
  const int byte = lane % 4 * 2 * static_cast<int>(sizeof(T));
  if constexpr (kSlice == 0) return byte;
  return byte / (kLine - 16) * kSlice + byte % (kLine - 16);
}

// c += x . z by multiply-adds in the type of x, see add_products.
template <typename X, typename Z, int kCount, int kLine>
__device__ __forceinline__ void add_four_products(X (&c)[kCount][4], int x, int z) {
  const Few<X, 4> low = at<Few<X, 4>>(x), high = at<Few<X, 4>>(x + 8 * kLine);
#pragma unroll
  for (int n = 0; n < kCount; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Few<Z, 4> other = at<Few<Z, 4>>(z + (8 * n + i) * kLine);
#pragma unroll
      for (int d = 0; d < 4; ++d) {
        const X value = widened(other.x[d]);
        c[n][i] += low.x[d] * value;
        c[n][2 + i] += high.x[d] * value;
      }
    }
}

// c += x . z over Element<T>::kDepth, for 16 rows and kTiles * 8 columns.
template <typename T, int kLine>
__device__ __forceinline__ void add_products(typename Element<T>::Sum (&c)[kTiles<T>][4], int x,
                                             int z) {
  if constexpr (Element<T>::kMatrix) {
    uint32_t a[4], b[4];
    load_matrices(x, a);
    load_matrices(z, b);
    multiply_add<T>(c[0], a, b[0], b[1]);
    multiply_add<T>(c[1], a, b[2], b[3]);
  } else {
    add_four_products<T, T, kTiles<T>, kLine>(c, x, z);
  }
}

// sums += p @ values, with p rounded to T: values are kTiles * 8 rows of kWide columns; kSlice:
// bytes from one slice of them to the next, 0 if there is one.
template <typename T, int kWide, int kLine, int kSlice>
__device__ __forceinline__ void add_weighted(typename Element<T>::Sum (&sums)[kWide / 8][4],
                                             const typename Element<T>::Sum (&p)[kTiles<T>][4],
                                             int values, int lane) {
  using Sum = typename Element<T>::Sum;
  constexpr int kBytes = 8 * sizeof(T), kRow = kSlice == 0 ? kWide * kBytes : kLine - 16;
  if constexpr (Element<T>::kMatrix) {
    const uint32_t a[4] = {packed<T>(p[0][0], p[0][1]), packed<T>(p[0][2], p[0][3]),
                           packed<T>(p[1][0], p[1][1]), packed<T>(p[1][2], p[1][3])};
#pragma unroll
    for (int n = 0; n < kWide / 8; n += 2) {
      uint32_t b[4];
      load_transposed(values + n * kBytes / kRow * kSlice + n * kBytes % kRow, b);
      multiply_add<T>(sums[n], a, b[0], b[1]);
      multiply_add<T>(sums[n + 1], a, b[2], b[3]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 8 * kTiles<T>; ++j) {
      // The lane of this row that has column j.
      const int source = (lane & ~3) + j % 8 / 2;
      const Sum low = __shfl_sync(kWholeWarp, p[j / 8][j % 2], source);
      const Sum high = __shfl_sync(kWholeWarp, p[j / 8][2 + j % 2], source);
#pragma unroll
      for (int n = 0; n < kWide / 8; ++n) {
        const Few<Sum, 2> value =
            at<Few<Sum, 2>>(values + j * kLine + n * kBytes / kRow * kSlice + n * kBytes % kRow);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          sums[n][i] += low * value.x[i];
          sums[n][2 + i] += high * value.x[i];
        }
      }
    }
  }
}

}  // namespace flmoe::cuda
