// Host side of the conformance program: random inputs, device memory, and the dump that conformance.py compares. The
// same code runs on a GPU (nvcc) and in the emulator (g++), so both get the same inputs from the same seed.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "../support/splitmix.h"
#include "ptx.h"

#ifndef __CUDACC__
extern "C" void simt_register(const void* address, size_t bytes, const char* name, int writable, int initialised);
extern "C" void simt_forget_buffers();
extern "C" const char* simt_error();
#endif

namespace pyext {

// Numbers made of random bits.
class Random : public Splitmix {
 public:
  using Splitmix::Splitmix;
  uint32_t bits() { return static_cast<uint32_t>(next() >> 32); }
  int below(int limit) { return static_cast<int>(next() % static_cast<uint64_t>(limit)); }
  // Of all magnitudes from 2^-40 to 2^40, zero, and infinity; no NaN, whose bits formats are free to choose.
  float number() {
    const int kind = below(32);
    if (kind == 0) return 0;
    if (kind == 1) return HUGE_VALF;
    const float size = ldexpf(1 + static_cast<float>(below(1 << 23)) * 0x1p-23f, below(81) - 40);
    return below(2) ? size : -size;
  }
};

// Device memory with a copy on the host; fails loudly, once and for all.
inline void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "conformance: %s\n", what);
  std::exit(1);
}

template <class T>
class Buffer {
 public:
  explicit Buffer(std::vector<T> values) : host_(std::move(values)) {
    const size_t bytes = host_.size() * sizeof(T);
#ifdef __CUDACC__
    require(cudaMalloc(&device_, bytes) == cudaSuccess, "out of device memory");
    require(cudaMemcpy(device_, host_.data(), bytes, cudaMemcpyHostToDevice) == cudaSuccess, "copy to device failed");
#else
    device_ = static_cast<T*>(std::aligned_alloc(256, (bytes + 255) / 256 * 256));
    std::memcpy(device_, host_.data(), bytes);
    simt_register(device_, bytes, "conformance", 1, 1);
#endif
  }
  explicit Buffer(size_t count) : Buffer(std::vector<T>(count)) {}  // zeros
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#ifdef __CUDACC__
    cudaFree(device_);
#else
    simt_forget_buffers();
    std::free(device_);
#endif
  }
  T* data() { return device_; }
  // What the device has now, as 32-bit words.
  std::vector<uint32_t> words() {
    const size_t bytes = host_.size() * sizeof(T);
    std::vector<uint32_t> result((bytes + 3) / 4);
#ifdef __CUDACC__
    require(cudaMemcpy(result.data(), device_, bytes, cudaMemcpyDeviceToHost) == cudaSuccess, "kernel or copy failed");
#else
    std::memcpy(result.data(), device_, bytes);
#endif
    return result;
  }

 private:
  std::vector<T> host_;
  T* device_ = nullptr;
};

inline std::vector<uint32_t> random_bits(Random& random, size_t count) {
  std::vector<uint32_t> values(count);
  for (uint32_t& value : values) value = random.bits();
  return values;
}
inline std::vector<float> random_numbers(Random& random, size_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = random.number();
  return values;
}
// Pairs of 16-bit numbers: integers in [-8, 8], whose products and sums any order of fp32 additions gets exactly, or
// (`exact` false) fractions.
template <class T>
std::vector<uint32_t> random_pairs(Random& random, size_t count, bool exact = true) {
  const auto one = [&]() -> uint32_t {
    const float x = exact ? static_cast<float>(random.below(17) - 8) : static_cast<float>(random.below(511) - 255) / 64;
    // Both formats hold these, so truncation is exact.
    if (std::is_same<T, bf16>::value) {
      uint32_t bits;
      std::memcpy(&bits, &x, sizeof bits);
      return bits >> 16;
    }
    if (x == 0) return 0;
    int exponent;
    const float mantissa = frexpf(fabsf(x), &exponent);  // in [1/2, 1)
    return (x < 0 ? 0x8000u : 0u) | static_cast<uint32_t>(exponent + 14) << 10 |
           (static_cast<uint32_t>(mantissa * 2048) & 1023);
  };
  std::vector<uint32_t> values(count);
  for (uint32_t& value : values) {
    value = one();
    value |= one() << 16;
  }
  return values;
}

// One line of the dump: name, how device and emulator are compared, and the words of the result.
//   exact: all bits;  ulp: fp32, two units in the last place of each number;
//   sum: fp32, two units in the last place of the line's largest number.
class Dump {
 public:
  explicit Dump(const char* path) : file_(std::fopen(path, "w")) { require(file_ != nullptr, "cannot write the dump"); }
  ~Dump() { std::fclose(file_); }
  Dump(const Dump&) = delete;
  Dump& operator=(const Dump&) = delete;
  void line(const std::string& name, const char* comparison, const std::vector<uint32_t>& words) {
    std::fprintf(file_, "%s %s", name.c_str(), comparison);
    for (const uint32_t word : words) std::fprintf(file_, " %08x", word);
    std::fputc('\n', file_);
  }

 private:
  std::FILE* file_;
};

// Launches on `out` (whose content it returns) and inputs that stay alive; all kernels have 128 threads.
template <class... Parameters, class... Arguments>
void launch(const std::string& name, void (*kernel)(Parameters...), size_t shared_bytes, Arguments... arguments) {
  const cudaError_t error = ptx::launch(kernel, dim3(1), dim3(128), shared_bytes, cudaStream_t{}, arguments...);
#ifdef __CUDACC__
  const char* reason = cudaGetErrorString(error == cudaSuccess ? cudaDeviceSynchronize() : error);
  const bool passed = cudaGetLastError() == cudaSuccess && error == cudaSuccess;
#else
  const char* reason = simt_error();
  const bool passed = error == cudaSuccess;
#endif
  require(passed, (name + ": " + reason).c_str());
}

}  // namespace pyext
