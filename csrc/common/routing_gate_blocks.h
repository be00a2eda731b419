// The gate on a GPU: each token's experts and weights, in blocks of common/routing_block.h.
#pragma once

#include <cmath>

#include "common/routing.h"
#include "common/routing_block.h"
#include "common/types.h"

namespace flmoe::routing {

template <typename T>
struct Wide {
  using Type = float;
};
template <>
struct Wide<double> {
  using Type = double;
};

struct GateTokens {
  const void* logits;
  int64_t* index;
  void* weight;
  int64_t tokens;
  int32_t experts, top_k;
  bool over_all;
};

// Lanes per token: a power of two, so that groups do not cross warps.
static inline FLMOE_BOTH int lanes_per_token(int32_t experts) {
  int width = 1;
  while (width < kLanes && width < experts) width *= 2;
  return width;
}

// Each group of lanes chooses the experts of one token. A lane holds kItems logits; if kItems is 0,
// it reads them again for every choice. Bound by reading logits once.
template <typename T, int kItems>
struct Gate {
  GateTokens in;

  template <typename Block>
  FLMOE_BODY void operator()(Block& block, int64_t number) const {
    block.warps([&](auto& warp, int w) {
      const int width = lanes_per_token(in.experts);
      choose(warp, (number * Block::kWarps + w) * (kLanes / width), width);
    });
  }

  template <typename Warp>
  FLMOE_BODY void choose(Warp& warp, int64_t first, int width) const {
    using A = typename Wide<T>::Type;
    constexpr int kHeld = kItems > 0 ? kItems : 1;
    typename Warp::template Each<A> held[kHeld], last_value, value, top, total;
    typename Warp::template Each<int32_t> last, expert;
    const auto logits = [&](int lane) {
      return static_cast<const T*>(in.logits) + (first + lane / width) * in.experts;
    };
    const auto there = [&](int lane) { return first + lane / width < in.tokens; };
    // Calls f(logit, expert) for each logit of a lane.
    const auto own = [&](int lane, const auto& f) {
      if (!there(lane)) return;
      if constexpr (kItems > 0) {
        FLMOE_UNROLL for (int i = 0; i < kItems; ++i) {
          const int32_t e = lane % width + i * width;
          if (e < in.experts) f(held[i][lane], e);
        }
      } else {
        for (int64_t e = lane % width; e < in.experts; e += width)
          f(Warp::template read<T, A>(logits(lane) + e), static_cast<int32_t>(e));
      }
    };
    warp.each([&](int lane) {
      total[lane] = 0;
      if constexpr (kItems > 0) {
        FLMOE_UNROLL for (int i = 0; i < kItems; ++i) {
          const int32_t e = lane % width + i * width;
          held[i][lane] =
              there(lane) && e < in.experts ? Warp::template read<T, A>(logits(lane) + e) : A(0);
        }
      }
    });
    for (int32_t n = 0; n < in.top_k; ++n) {
      // The best expert that comes after the last chosen expert.
      warp.each([&](int lane) {
        expert[lane] = -1, value[lane] = 0;
        own(lane, [&](A x, int32_t e) {
          if (n > 0 && !comes_before(last_value[lane], last[lane], x, e)) return;
          if (expert[lane] < 0 || comes_before(x, e, value[lane], expert[lane]))
            value[lane] = x, expert[lane] = e;
        });
      });
      warp.best(value, expert, width);
      warp.each([&](int lane) {
        last_value[lane] = value[lane], last[lane] = expert[lane];
        if (n == 0) top[lane] = value[lane];
        if (!in.over_all) total[lane] += std::exp(value[lane] - top[lane]);
        // Stored by the lane that reads it again below.
        if (there(lane) && lane % width == n % width)
          in.index[(first + lane / width) * in.top_k + n] = expert[lane];
      });
    }
    if (in.over_all) {
      warp.each([&](int lane) {
        own(lane, [&](A x, int32_t) { total[lane] += std::exp(x - top[lane]); });
      });
      warp.sum(total, width);
    }
    warp.each([&](int lane) {
      if (!there(lane)) return;
      const int64_t row = (first + lane / width) * in.top_k;
      for (int32_t n = lane % width; n < in.top_k; n += width) {
        const A x = Warp::template read<T, A>(logits(lane) + in.index[row + n]);
        Warp::template write<T, A>(static_cast<T*>(in.weight) + row + n,
                                   std::exp(x - top[lane]) / total[lane]);
      }
    });
  }
};

template <typename T, typename Launch>
void launch_gate(Launch& launch, const GateTokens& in) {
  const int64_t per_block = kManyThreads / lanes_per_token(in.experts);
  const int64_t blocks = ceil_div(in.tokens, per_block);
  if (in.experts <= kLanes) {
    launch.template run<kManyThreads>(blocks, Gate<T, 1>{in});
  } else if (in.experts <= 2 * kLanes) {
    launch.template run<kManyThreads>(blocks, Gate<T, 2>{in});
  } else if (in.experts <= 8 * kLanes) {
    launch.template run<kManyThreads>(blocks, Gate<T, 8>{in});
  } else {
    launch.template run<kManyThreads>(blocks, Gate<T, 0>{in});
  }
}

}  // namespace flmoe::routing
