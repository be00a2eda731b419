#include "common/planted.h"

#include <array>
#include <cstring>
#include <stdexcept>

namespace flmoe {
namespace {

constexpr std::array kKernels = {
    "attention_forward", "attention_backward", "routing_gate",   "gelu_forward",    "gelu_backward",
    "linear_forward",    "linear_backward",    "loss_forward",   "loss_backward",   "norm_forward",
    "norm_backward",     "pair_forward",       "pair_backward",  "pair_map",        "pair_top",
    "pool_forward",      "pool_backward",      "routed_forward", "routed_backward", "views_forward",
    "views_backward",
};

std::array<std::atomic<double>, kKernels.size()> shares{};

// The place of a kernel, or their number where there is none of this name.
size_t place(const char* kernel) {
  size_t i = 0;
  while (i < kKernels.size() && std::strcmp(kKernels[i], kernel) != 0) ++i;
  return i;
}

}  // namespace

namespace planted {

std::atomic<bool> any{false};

double share_of(const char* kernel) {
  const size_t i = place(kernel);
  return i < kKernels.size() ? shares[i].load(std::memory_order_relaxed) : 0;
}

}  // namespace planted

std::vector<std::string> plantable_kernels() {
  return {kKernels.begin(), kKernels.end()};
}

void plant_slowdown(const std::string& kernel, double share) {
  const size_t i = place(kernel.c_str());
  if (i == kKernels.size())
    throw std::invalid_argument("kernel: expected one of plantable_kernels(), got " + kernel);
  if (!(share >= 0 && share <= 100))
    throw std::invalid_argument("share: expected 0 to 100, got " + std::to_string(share));
  shares[i].store(share, std::memory_order_relaxed);
  bool any = false;
  for (const std::atomic<double>& planted : shares) any = any || planted.load() > 0;
  planted::any.store(any, std::memory_order_relaxed);
}

}  // namespace flmoe
