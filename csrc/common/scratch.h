// Scratch memory of the CPU kernels: buffers that live as long as their scope.
//
// Small buffers are stacked in an arena that every thread keeps. Larger buffers are blocks of one
// list that all threads share, so idle threads hold none. The list keeps every block while any is
// in use, so a call takes its memory from the system once, and at most kKeptScratch afterwards,
// whatever the size of the model. With AddressSanitizer, every buffer is an allocation of its
// own with exact size, so that it finds accesses outside.
#pragma once

#include <cstdint>

namespace flmoe {

constexpr int64_t kArena = int64_t{2} << 20;         // of a thread; fits an item at common sizes
constexpr int64_t kArenaBuffer = kArena / 4;         // larger buffers are shared blocks
constexpr int64_t kKeptScratch = int64_t{32} << 20;  // of all shared blocks, when none is in use

// 64-byte aligned, with undefined contents. To be returned by the same thread, last taken first.
void* take_scratch(int64_t bytes);
void return_scratch(void* data);

// Bytes of the shared blocks in use, and of those that are kept for reuse.
struct ScratchBytes {
  int64_t used, kept;
};
ScratchBytes scratch_bytes();

// Requests huge pages for a large new buffer: first-touch faults cost more than the kernels that
// fill it.
void advise_huge(void* data, int64_t bytes);

}  // namespace flmoe
