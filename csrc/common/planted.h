// A slowdown planted on purpose, so that the tests of the benchmark gate have a regression to
// catch.
//
// Nothing is planted unless a test asks (plant_slowdown of the Python module); until then a kernel
// pays one relaxed load. Only the kernels of the CPU have it.
#pragma once

#include <time.h>

#include <atomic>
#include <string>
#include <vector>

namespace flmoe {

// The kernels that take one, by the names of their Python bindings.
std::vector<std::string> plantable_kernels();

// From now on `kernel` takes (1 + share) times as long; share 0 takes the slowdown away. Throws
// std::invalid_argument for an unknown kernel, or a share that is not within 0 to 100.
void plant_slowdown(const std::string& kernel, double share);

namespace planted {
extern std::atomic<bool> any;
double share_of(const char* kernel);
}  // namespace planted

// At the end of its scope, spins for the planted share of the processor time that the scope took
// the calling thread, which works along with all others and waits for them: waiting for the
// processor is no time of the kernel's.
class PlantedSlowdown {
 public:
  explicit PlantedSlowdown(const char* kernel) {
    if (planted::any.load(std::memory_order_relaxed)) {
      share_ = planted::share_of(kernel);
      start_ = now();
    }
  }

  ~PlantedSlowdown() {
    if (share_ > 0) spin();
  }

  PlantedSlowdown(const PlantedSlowdown&) = delete;
  PlantedSlowdown& operator=(const PlantedSlowdown&) = delete;

 private:
  static double now() {
    timespec time{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }

  void spin() const {
    const double end = start_ + (now() - start_) * (1 + share_);
    while (now() < end) {
    }
  }

  double share_ = 0;
  double start_ = 0;
};

}  // namespace flmoe
