#include "common/scratch.h"

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace flmoe {

#if defined(__SANITIZE_ADDRESS__)
#define FLMOE_EXACT_SCRATCH 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FLMOE_EXACT_SCRATCH 1
#endif
#endif

#if defined(FLMOE_EXACT_SCRATCH)

void* take_scratch(int64_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, 64, static_cast<size_t>(std::max<int64_t>(bytes, 1))) != 0)
    throw std::bad_alloc();
  return data;
}

void return_scratch(void* data) {
  std::free(data);
}

ScratchBytes scratch_bytes() {
  return {0, 0};
}

#else

namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kBlockUnit = int64_t{64} << 10;

int64_t round_to(int64_t bytes, int64_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

// mmap, because malloc may keep a freed buffer in the heap of the thread that allocated it.
void* map_memory(int64_t bytes) {
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  advise_huge(data, bytes);
  return data;
}

void unmap_memory(void* data, int64_t bytes) {
  (void)munmap(data, static_cast<size_t>(bytes));
}

// Trivial, so that an access needs no check whether the thread has initialised it.
struct Arena {
  char* base;
  int64_t used;
};
constinit thread_local Arena arena{};

char* new_arena() {
  struct Owner {
    char* base = static_cast<char*>(map_memory(kArena));
    ~Owner() {
      unmap_memory(base, kArena);
      arena = {};
    }
  };
  thread_local Owner owner;
  return owner.base;
}

struct Block {
  void* data;
  int64_t bytes;
};

bool smaller(const Block& x, const Block& y) {
  return x.bytes < y.bytes;
}

class SharedBlocks {
 public:
  void* take(int64_t bytes) {
    std::lock_guard<std::mutex> guard(mutex_);
    // Returning a block must not allocate.
    used_.reserve(used_.size() + 1);
    free_.reserve(free_.size() + used_.size() + 1);
    auto best = free_.end();
    for (auto block = free_.begin(); block != free_.end(); ++block)
      if (block->bytes >= bytes && (best == free_.end() || smaller(*block, *best))) best = block;
    if (best == free_.end()) {
      // All are too small: the new one replaces the largest, so the list does not grow with sizes.
      drop_largest();
      const int64_t size = round_to(bytes, kBlockUnit);
      used_.push_back({map_memory(size), size});
    } else {
      used_.push_back(*best);
      free_.erase(best);
    }
    return used_.back().data;
  }

  void give_back(void* data) {
    std::lock_guard<std::mutex> guard(mutex_);
    const auto block = std::find_if(used_.begin(), used_.end(),
                                    [data](const Block& each) { return each.data == data; });
    free_.push_back(*block);
    used_.erase(block);
    while (used_.empty() && total(free_) > kKeptScratch) drop_largest();
  }

  ScratchBytes bytes() {
    std::lock_guard<std::mutex> guard(mutex_);
    return {total(used_), total(free_)};
  }

  // A fork copies a locked mutex, which nobody unlocks in the child.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static int64_t total(const std::vector<Block>& blocks) {
    int64_t bytes = 0;
    for (const Block& block : blocks) bytes += block.bytes;
    return bytes;
  }
  void drop_largest() {
    const auto largest = std::max_element(free_.begin(), free_.end(), smaller);
    if (largest == free_.end()) return;
    unmap_memory(largest->data, largest->bytes);
    free_.erase(largest);
  }

  std::mutex mutex_;
  std::vector<Block> used_, free_;
};

SharedBlocks& shared_blocks() {
  // Never destroyed, because a thread may return a block while the process ends.
  static SharedBlocks& blocks = []() -> SharedBlocks& {
    pthread_atfork([] { shared_blocks().lock(); }, [] { shared_blocks().unlock(); },
                   [] { shared_blocks().unlock(); });
    return *new SharedBlocks;
  }();
  return blocks;
}

}  // namespace

void* take_scratch(int64_t bytes) {
  const int64_t size = round_to(bytes, kAlignment);
  Arena& own = arena;
  if (size > kArenaBuffer || own.used + size > kArena) return shared_blocks().take(bytes);
  if (own.base == nullptr) own.base = new_arena();
  void* data = own.base + own.used;
  own.used += size;
  return data;
}

void return_scratch(void* data) {
  Arena& own = arena;
  const auto offset = reinterpret_cast<uintptr_t>(data) - reinterpret_cast<uintptr_t>(own.base);
  if (own.base == nullptr || offset >= static_cast<uintptr_t>(kArena))
    shared_blocks().give_back(data);
  else
    own.used = std::min(own.used, static_cast<int64_t>(offset));
}

ScratchBytes scratch_bytes() {
  return shared_blocks().bytes();
}

#endif

void advise_huge(void* data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
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
