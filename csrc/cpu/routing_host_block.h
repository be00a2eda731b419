// Simulation of a GPU block (csrc/common/routing_block.h) on the host, for tests: every step runs
// its threads one after another, in an order that changes from step to step. Results that depend on
// the order would be a race on a GPU. A thread that accesses another thread's variable, which is
// impossible on a GPU, is an error.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

// Scalars are converted as in the CPU's baseline kernels.
#define FLMOE_ISA baseline
#include "common/routing.h"
#include "cpu/simd.h"

namespace flmoe::host {

// An endless sequence of permutations of n items, n a power of two; 0 gives the identity.
class Orders {
 public:
  explicit Orders(uint64_t seed) : state_(seed) {}

  template <typename F>
  void each(int64_t n, const F& f) {
    uint64_t step = 1, start = 0;
    if (state_ != 0) {
      state_ = state_ * 6364136223846793005u + 1442695040888963407u;
      step = (state_ >> 33) | 1, start = state_ >> 17;
    }
    for (int64_t i = 0; i < n; ++i)
      f(static_cast<int>((start + static_cast<uint64_t>(i) * step) & static_cast<uint64_t>(n - 1)));
  }

 private:
  uint64_t state_;
};

// Content of memory that must not be read before it is written.
constexpr unsigned char kJunk = 0xa5;

// The running thread of kCount (32 in a warp, more in a block), or -1 between steps.
template <int kCount>
inline thread_local int running = -1;

// Runs a step: f(i) for all i, with i recorded as the running thread.
template <int kCount, typename F>
void run_step(Orders& orders, const F& f) {
  struct Restore {
    ~Restore() { running<kCount> = -1; }
  } restore;
  orders.each(kCount, [&](int i) {
    running<kCount> = i;
    f(i);
  });
}

// A variable of kCount threads. In steps, a thread can only access its own value; operations
// between threads (shuffles, scans) read all values with at().
template <typename T, int kCount>
class Lanes {
 public:
  Lanes() { std::memset(static_cast<void*>(values_), kJunk, sizeof values_); }
  T& operator[](int i) { return values_[own(i)]; }
  const T& operator[](int i) const { return values_[own(i)]; }
  T& at(int i) { return values_[i]; }
  const T& at(int i) const { return values_[i]; }

 private:
  static int own(int i) {
    if (i != running<kCount>) throw std::logic_error("a thread takes another thread's variable");
    return i;
  }

  T values_[kCount];
};

struct Warp {
  static constexpr int kLanes = 32;
  template <typename T>
  using Each = Lanes<T, kLanes>;
  Orders& orders;

  template <typename F>
  void each(const F& f) {
    run_step<kLanes>(orders, f);
  }

  void match(const Each<int32_t>& key, Each<uint32_t>& peers) const {
    for (int i = 0; i < kLanes; ++i) {
      peers.at(i) = 0;
      for (int j = 0; j < kLanes; ++j) peers.at(i) |= uint32_t{key.at(i) == key.at(j)} << j;
    }
  }

  // The butterflies of csrc/cuda/routing_device_block.cuh.
  template <typename A>
  void best(Each<A>& value, Each<int32_t>& expert, int width) const {
    for (int apart = width / 2; apart > 0; apart /= 2) {
      const Each<A> values = value;
      const Each<int32_t> experts = expert;
      for (int i = 0; i < kLanes; ++i) {
        const int other = i ^ apart;
        const A x = values.at(other);
        const int32_t e = experts.at(other);
        if (e < 0) continue;
        if (experts.at(i) < 0 || comes_before(x, e, values.at(i), experts.at(i)))
          value.at(i) = x, expert.at(i) = e;
      }
    }
  }

  template <typename A>
  void sum(Each<A>& value, int width) const {
    for (int apart = width / 2; apart > 0; apart /= 2) {
      const Each<A> values = value;
      for (int i = 0; i < kLanes; ++i) value.at(i) = values.at(i) + values.at(i ^ apart);
    }
  }

  static int32_t count(uint32_t bits) { return __builtin_popcount(bits); }
  template <typename T, typename A>
  static A read(const T* p) {
    return baseline::read<T, A>(p);
  }
  template <typename T, typename A>
  static void write(T* p, A x) {
    baseline::write<T, A>(p, x);
  }
};

template <int kBlockThreads>
struct Block {
  static constexpr int kThreads = kBlockThreads, kWarps = kThreads / Warp::kLanes;
  template <typename T>
  using Each = Lanes<T, kThreads>;
  Orders& orders;
  int32_t* tally;  // kTallies of them

  template <typename F>
  void each(const F& f) {
    run_step<kThreads>(orders, f);
  }

  template <typename F>
  void warps(const F& f) {
    orders.each(kWarps, [&](int number) {
      Warp warp{orders};
      f(warp, number);
    });
  }

  int32_t exclusive_sum(Each<int32_t>& value) const {
    int32_t sum = 0;
    for (int i = 0; i < kThreads; ++i) {
      const int32_t own = value.at(i);
      value.at(i) = sum;
      sum += own;
    }
    return sum;
  }
};

// Runs launches immediately, with blocks in a shuffled order, each with random data in shared
// memory.
class Launch {
 public:
  explicit Launch(uint64_t order) : orders_(order), tally_(kTallies) {}

  template <int kThreads, typename Body>
  void run(int64_t blocks, const Body& body) {
    ++launches;
    int64_t padded = 1;
    while (padded < blocks) padded *= 2;
    orders_.each(padded, [&](int number) {
      if (number >= blocks) return;
      std::memset(tally_.data(), kJunk, tally_.size() * sizeof(int32_t));
      Block<kThreads> block{orders_, tally_.data()};
      body(block, number);
    });
  }

  int launches = 0;

 private:
  Orders orders_;
  std::vector<int32_t> tally_;
};

}  // namespace flmoe::host
