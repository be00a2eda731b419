#include "common/kept_weights.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#include "common/scratch.h"

namespace flmoe {
namespace {

constexpr size_t kMostEntries = 16;
constexpr int64_t kMostBytes = int64_t{256} << 20;

struct Entry : KeptWeights {
  int64_t bytes;
  int users;
  std::vector<uint64_t> digests;  // empty unless it can be found
};

std::mutex mutex;
// The last used comes last. Never destroyed, because a thread may still compute while the process
// ends.
std::vector<Entry*>& entries() {
  static std::vector<Entry*>& all = *new std::vector<Entry*>;
  return all;
}

void destroy(Entry* entry) {
  std::free(entry->data);
  delete entry;
}

// Forgets the oldest unused entries beyond the limits; the newest stays.
void trim() {
  std::vector<Entry*>& all = entries();
  int64_t bytes = 0;
  for (const Entry* entry : all) bytes += entry->bytes;
  for (size_t i = 0; i + 1 < all.size() && (bytes > kMostBytes || all.size() > kMostEntries);) {
    if (all[i]->users > 0) {
      ++i;
      continue;
    }
    bytes -= all[i]->bytes;
    destroy(all[i]);
    all.erase(all.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

}  // namespace

KeptWeights* find_weights(const uint64_t* digests, int64_t count) {
  std::lock_guard<std::mutex> guard(mutex);
  std::vector<Entry*>& all = entries();
  const auto found = std::find_if(all.begin(), all.end(), [&](const Entry* entry) {
    return std::equal(entry->digests.begin(), entry->digests.end(), digests, digests + count);
  });
  if (found == all.end()) return nullptr;
  std::rotate(found, found + 1, all.end());
  ++all.back()->users;
  return all.back();
}

KeptWeights* new_weights(int64_t bytes) {
  const auto size = static_cast<size_t>((std::max<int64_t>(bytes, 1) + 63) / 64 * 64);
  auto* entry = new Entry{};
  entry->data = std::aligned_alloc(64, size);
  if (entry->data == nullptr) {
    delete entry;
    throw std::bad_alloc();
  }
  advise_huge(entry->data, static_cast<int64_t>(size));
  entry->bytes = static_cast<int64_t>(size);
  entry->users = 1;
  return entry;
}

void keep_weights(KeptWeights* weights, const uint64_t* digests, int64_t count) {
  std::lock_guard<std::mutex> guard(mutex);
  auto* entry = static_cast<Entry*>(weights);
  entry->digests.assign(digests, digests + count);
  entries().push_back(entry);
}

void release_weights(KeptWeights* weights) {
  std::lock_guard<std::mutex> guard(mutex);
  auto* entry = static_cast<Entry*>(weights);
  --entry->users;
  if (entry->digests.empty())
    destroy(entry);
  else
    trim();
}

}  // namespace flmoe
