#include "common/parallel.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <sys/mman.h>
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

struct Scratch {
  struct Slot {
    void* data = nullptr;
    int64_t bytes = 0;
  };
  std::vector<Slot> slots;
  ~Scratch() {
    for (Slot& slot : slots) std::free(slot.data);
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

void* thread_scratch(int slot, int64_t bytes) {
  thread_local Scratch scratch;
  if (static_cast<int>(scratch.slots.size()) <= slot) scratch.slots.resize(slot + 1);
  Scratch::Slot& entry = scratch.slots[slot];
  if (entry.bytes < bytes) {
    std::free(entry.data);
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    entry.data = std::aligned_alloc(64, rounded);
    entry.bytes = entry.data ? rounded : 0;
    if (entry.data == nullptr) throw std::bad_alloc();
    advise_huge(entry.data, rounded);
  }
  return entry.data;
}

void advise_huge(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHuge = int64_t{2} << 20;
  if (bytes < 2 * kHuge) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHuge * kHuge;
  // Only a hint: it has no effect if the kernel rejects it (no huge pages configured).
  if (end > begin) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data;
  (void)bytes;
#endif
}

}  // namespace flmoe
