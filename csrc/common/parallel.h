// Parallel loop of all CPU kernels.
//
// Work items are scheduled dynamically, so results must not depend on which thread runs an item:
// every item owns its outputs. The loop uses torch's OpenMP pool (located at run time), because a
// second pool would compete with torch's spinning workers for the same cores; if there is no such
// pool, it starts threads.
#pragma once

#include <cstdint>

namespace flmoe {

using ItemFn = void (*)(void* context, int64_t item, int thread);

// Calls fn(context, item, thread) once for each item in [0, items); thread < threads.
void parallel_items(int64_t items, int threads, ItemFn fn, void* context);

// The name of the pool in use: "openmp" or "threads".
const char* parallel_pool();

template <typename F>
void parallel_for(int64_t items, int threads, const F& body) {
  parallel_items(
      items, threads,
      [](void* context, int64_t item, int thread) {
        (*static_cast<const F*>(context))(item, thread);
      },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace flmoe
