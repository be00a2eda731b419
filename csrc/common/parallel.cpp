#include "common/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace flmoe {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_gomp() {
#if defined(__linux__)
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

GompParallel gomp() {
  static const GompParallel found = find_gomp();
  return found;
}

struct Loop {
  ItemFn fn;
  void* context;
  int64_t items;
  std::atomic<int64_t> next{0};
  std::atomic<int> threads{0};
  std::once_flag failed;
  std::exception_ptr error;

  void work() {
    const int thread = threads.fetch_add(1);
    try {
      for (int64_t item; (item = next.fetch_add(1)) < items;) fn(context, item, thread);
    } catch (...) {
      std::call_once(failed, [this] { error = std::current_exception(); });
      next.store(items);
    }
  }
};

}  // namespace

void parallel_items(int64_t items, int threads, ItemFn fn, void* context) {
  if (items <= 0) return;
  Loop loop{fn, context, items, {}, {}, {}, {}};
  const int count = static_cast<int>(std::min<int64_t>(std::max(threads, 1), items));
  if (count == 1) {
    loop.work();
  } else if (gomp() != nullptr) {
    gomp()([](void* self) { static_cast<Loop*>(self)->work(); }, &loop,
           static_cast<unsigned>(count), 0);
  } else {
    std::vector<std::thread> helpers;
    for (int i = 1; i < count; ++i) helpers.emplace_back([&loop] { loop.work(); });
    loop.work();
    for (std::thread& helper : helpers) helper.join();
  }
  if (loop.error) std::rethrow_exception(loop.error);
}

const char* parallel_pool() {
  return gomp() != nullptr ? "openmp" : "threads";
}

}  // namespace flmoe
