// Comparison of kernels with results of another processor, within the error budget of
// flmoe_kernels/core/error_budget.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#define FLMOE_ISA baseline
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace flmoe::test {

template <typename R>
using Values = std::vector<R>;

template <typename T>
using Computed = typename baseline::Compute<T>::Type;

struct TypeFacts {
  const char* name;
  DType code;
  double unit;  // rounding term of the error budget
};
template <typename T>
constexpr TypeFacts kType{};
template <>
inline constexpr TypeFacts kType<float>{"float32", DType::kFloat32, 8 * 0x1p-23};
template <>
inline constexpr TypeFacts kType<double>{"float64", DType::kFloat64, 4096 * 0x1p-52};
template <>
inline constexpr TypeFacts kType<BFloat16>{"bfloat16", DType::kBFloat16, 2 * 0x1p-7};
template <>
inline constexpr TypeFacts kType<Float16>{"float16", DType::kFloat16, 2 * 0x1p-10};

template <typename T>
T stored(double x) {
  T out;
  baseline::write<T, Computed<T>>(&out, static_cast<Computed<T>>(x));
  return out;
}

template <typename R, typename T>
Values<R> as(const Values<T>& x) {
  Values<R> out;
  for (const T& value : x) out.push_back(stored<R>(baseline::read<T, Computed<T>>(&value)));
  return out;
}

// Normal numbers rounded to T, stored as K; equal for every K.
template <typename T, typename K>
class Draw {
 public:
  Values<K> operator()(int64_t count, double scale = 1) { return as<K>(numbers<T>(count, scale)); }
  Values<Computed<K>> computed(int64_t count) {
    return as<Computed<K>>(numbers<Computed<T>>(count, 1));
  }

 private:
  template <typename S>
  Values<S> numbers(int64_t count, double scale) {
    Values<S> out;
    for (int64_t i = 0; i < count; ++i) out.push_back(stored<S>(scale * normal_(generator_)));
    return out;
  }

  std::mt19937 generator_{1};
  std::normal_distribution<double> normal_;
};

template <typename R>
Values<R> zeros(int64_t count) {
  return Values<R>(static_cast<size_t>(count));
}

// Memory of a result: NaN, so that an element that is not written is noticed.
template <typename T>
Values<T> unwritten(int64_t count) {
  return Values<T>(static_cast<size_t>(count), stored<T>(NAN));
}

// A result of a kernel.
struct Result {
  std::string name;
  Values<double> values;
  double unit;
};
using Results = std::vector<Result>;

template <typename T>
Result result(const char* name, const Values<T>& x) {
  return {name, as<double>(x), kType<T>.unit};
}

struct Errors {
  double largest = 0, rms = 0;
};

inline Errors errors(const Values<double>& x, const Values<double>& exact) {
  Errors out;
  for (size_t i = 0; i < x.size(); ++i) {
    const double error = std::fabs(x[i] - exact[i]);
    out.largest = error <= out.largest ? out.largest : error;  // NaN stays
    out.rms += error * error;
  }
  out.rms = std::sqrt(out.rms / static_cast<double>(x.size()));
  return out;
}

// Results are written to a file, or compared with those in a file.
class Comparisons {
 public:
  int passed = 0, failed = 0;

  bool open(const std::string& mode, const char* path) {
    recording_ = mode == "record";
    if (!recording_ && mode != "compare") return false;
    file_ = std::fopen(path, recording_ ? "wb" : "rb");
    return file_ != nullptr;
  }

  bool close() { return std::fclose(file_) == 0; }

  void expect(bool holds, const std::string& what) {
    holds ? ++passed : ++failed;
    if (!holds) std::printf("FAILED %s\n", what.c_str());
  }

  // run() computes in type K, on inputs that T can hold. Results for T and double are recorded.
  template <typename T, typename F>
  void budget(const std::string& name, const F& run) {
    const Results found = run.template operator()<T>();
    const Results exact = recording_ ? run.template operator()<double>() : Results {};
    for (size_t i = 0; i < found.size(); ++i) {
      if (recording_) {
        write(found[i].values), write(exact[i].values);
        continue;
      }
      const Values<double> low = read();
      one(name + " in " + kType<T>.name + ", " + found[i].name, found[i], low, read());
    }
  }

 private:
  bool recording_ = false;
  std::FILE* file_ = nullptr;

  void write(const Values<double>& x) {
    const size_t count = x.size();
    const size_t written = std::fwrite(&count, sizeof count, 1, file_) +
                           std::fwrite(x.data(), sizeof(double), count, file_);
    expect(written == 1 + count, "write");
  }

  Values<double> read() {
    size_t count = 0;
    if (std::fread(&count, sizeof count, 1, file_) != 1) return {};
    Values<double> x(count);
    x.resize(std::fread(x.data(), sizeof(double), count, file_));
    return x;
  }

  void one(const std::string& name, const Result& result, const Values<double>& low,
           const Values<double>& exact) {
    const size_t n = result.values.size();
    if (low.size() != n || exact.size() != n) return expect(false, name + ": number of elements");
    if (n == 0) return;
    const Errors own = errors(low, exact), size = errors(Values<double>(n), exact);
    const Errors limit{2 * own.largest + result.unit * size.largest,
                       2 * own.rms + result.unit * size.rms};
    const auto within = [&](const Values<double>& x) {
      const Errors error = errors(x, exact);
      return error.largest <= limit.largest && error.rms <= limit.rms;
    };
    const Errors error = errors(result.values, exact);
    expect(within(result.values), name + ": error " + text(error) + ", budget " + text(limit));
    if (size.largest == 0) return;
    // Controls: zeros, and the neighbouring lanes that differ most exchanged.
    expect(!within(Values<double>(n)), name + ": zeros pass");
    size_t lane = 0;
    for (size_t i = 0; i + 1 < n; ++i)
      if (std::fabs(exact[i] - exact[i + 1]) > std::fabs(exact[lane] - exact[lane + 1])) lane = i;
    Values<double> wrong = exact;
    if (n > 1) std::swap(wrong[lane], wrong[lane + 1]);
    expect(n == 1 || !within(wrong), name + ": two lanes exchanged pass");
  }

  static std::string text(const Errors& errors) {
    char out[64];
    std::snprintf(out, sizeof out, "%.3g (rms %.3g)", errors.largest, errors.rms);
    return out;
  }
};

}  // namespace flmoe::test
