// Packed copies of weights, kept between calls and found by the content of the weights.
//
// Digests, not versions of tensors, decide: a change through `.data` or another array that shares
// the memory leaves a version as it is.
#pragma once

#include <cstdint>

namespace flmoe {

struct KeptWeights {
  void* data;
};

// The copy with these digests, or null. To be released.
KeptWeights* find_weights(const uint64_t* digests, int64_t count);

// An empty block, 64-byte aligned. To be released; keep_weights makes it findable.
KeptWeights* new_weights(int64_t bytes);
void keep_weights(KeptWeights* weights, const uint64_t* digests, int64_t count);

void release_weights(KeptWeights* weights);

}  // namespace flmoe
