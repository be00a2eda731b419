// Selection of the instruction set, once, at first use.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

namespace flmoe {
namespace {

struct Choice {
  const char* name;
  bool (*supported)();
  const Kernels& (*kernels)();
};

#if defined(FLMOE_HAVE_X86_ISAS)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && has_avx2();
}
bool has_avx512bf16() {
  return __builtin_cpu_supports("avx512bf16") && has_avx512();
}
#endif

const Choice kChoices[] = {
#if defined(FLMOE_HAVE_X86_ISAS)
    {"avx512bf16", has_avx512bf16, avx512bf16::kernels},
    {"avx512", has_avx512, avx512::kernels},
    {"avx2", has_avx2, avx2::kernels},
#endif
    {"baseline", [] { return true; }, baseline::kernels},
};

const Choice& choose() {
  const char* wanted = std::getenv("FLMOE_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    for (const Choice& choice : kChoices)
      if (choice.supported()) return choice;
  }
  for (const Choice& choice : kChoices) {
    if (std::strcmp(choice.name, wanted) != 0) continue;
    if (choice.supported()) return choice;
    throw std::runtime_error("FLMOE_ISA: this processor does not support " + std::string(wanted));
  }
  throw std::runtime_error("FLMOE_ISA: expected avx512bf16, avx512, avx2 or baseline, got " +
                           std::string(wanted));
}

const Choice& active() {
  static const Choice& choice = choose();
  return choice;
}

}  // namespace

const Kernels& active_kernels() {
  return active().kernels();
}
const char* active_instruction_set() {
  return active().name;
}

bool instruction_set_runs(const char* name) {
  for (const Choice& choice : kChoices)
    if (std::strcmp(choice.name, name) == 0) return choice.supported();
  return false;
}

}  // namespace flmoe
