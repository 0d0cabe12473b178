// Memory for the sanitizer driver: typed buffers beside a page that faults, strided views of them, and random numbers.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../support/splitmix.h"
#include "strided.h"

namespace pyext {

// What is running, for the message of whoever fails.
struct Context {
  std::string text, isa;
};
inline Context& context() {
  static Context current;
  return current;
}

inline void require(bool holds, const std::string& message) {
  if (holds) return;
  std::fprintf(stderr, "FAILED %s [%s]: %s\n", context().text.c_str(), context().isa.c_str(), message.c_str());
  std::abort();
}

// Numbers made of random bits.
class Random : public Splitmix {
 public:
  using Splitmix::Splitmix;
  int64_t below(int64_t limit) { return static_cast<int64_t>(next() % static_cast<uint64_t>(limit)); }
  bool one_in(int64_t n) { return below(n) == 0; }
};

// A (batch, heads, rows, columns) tensor with unit last stride.
struct View {
  int64_t size[4], stride[4];

  // heads_inside: memory order (batch, rows, heads, columns). gap: elements between rows.
  static View make(int64_t batch, int64_t heads, int64_t rows, int64_t columns, bool heads_inside, int64_t gap) {
    const int64_t row = columns + gap;
    if (heads_inside) return {{batch, heads, rows, columns}, {rows * heads * row, row, heads * row, 1}};
    return {{batch, heads, rows, columns}, {heads * rows * row, rows * row, row, 1}};
  }
  // From the first element to the last, without the last gap.
  int64_t elements() const {
    int64_t last = 0;
    for (int d = 0; d < 4; ++d) {
      if (size[d] == 0) return 0;
      last += (size[d] - 1) * stride[d];
    }
    return last + 1;
  }
  template <class Body>
  void for_each(Body body) const {
    for (int64_t b = 0; b < size[0]; ++b) {
      for (int64_t h = 0; h < size[1]; ++h) {
        for (int64_t r = 0; r < size[2]; ++r) {
          for (int64_t c = 0; c < size[3]; ++c) body(b * stride[0] + h * stride[1] + r * stride[2] + c);
        }
      }
    }
  }
};

// A buffer between two pages that fault. Its last element lies right before the second one, or its first right after
// the first one. All bits set is NaN in every float format: that is the fill.
class Memory {
 public:
  Memory(int64_t elements, DType dtype, bool guard_before)
      : Memory(elements, dtype == DType::f64 ? 8 : (dtype == DType::f32 ? 4 : 2), guard_before) {
    dtype_ = dtype;
  }
  Memory(int64_t elements, int width, bool guard_before) : bytes_(static_cast<size_t>(elements * width)) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inside = (bytes_ + page - 1) / page * page;
    mapped_ = inside + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    require(base_ != MAP_FAILED, "out of memory");
    if (inside) require(mprotect(base_ + page, inside, PROT_READ | PROT_WRITE) == 0, "mprotect failed");
    data_ = base_ + page + (guard_before ? 0 : inside - bytes_);
  }
  ~Memory() { munmap(base_, mapped_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data() { return data_; }
  std::vector<char> bytes() const { return std::vector<char>(data_, data_ + bytes_); }
  void fill_nan() { std::memset(data_, 0xFF, bytes_); }
  bool all_nan() const {
    return std::all_of(data_, data_ + bytes_, [](char byte) { return byte == '\xFF'; });
  }
  void set_nan(int64_t offset) { std::memset(at(offset), 0xFF, width()); }

  double get(int64_t offset) const {
    if (dtype_ == DType::f64) return load<double>(offset);
    if (dtype_ == DType::f32) return load<float>(offset);
    const uint16_t half = load<uint16_t>(offset);
    const uint32_t wide = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    if (dtype_ == DType::bf16) return value;
    const int exponent = (half >> 10) & 31, mantissa = half & 1023;
    const double sign = half & 0x8000 ? -1 : 1;
    if (exponent == 31) return mantissa ? std::nan("") : sign * HUGE_VAL;
    return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
  }

  // Exact for the numbers the driver makes: multiples of 1/64 in [-2, 2]. Those with more than 8 bits lose some as
  // bf16.
  void set(int64_t offset, double value) {
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    const uint32_t half_exponent = ((bits >> 23) & 255) - 112;
    switch (dtype_) {
      case DType::f64:
        return store(offset, value);
      case DType::f32:
        return store(offset, narrow);
      case DType::bf16:
        return store(offset, static_cast<uint16_t>(bits >> 16));
      case DType::f16:
        if (narrow == 0) return store(offset, uint16_t{0});
        return store(offset, static_cast<uint16_t>((bits >> 16 & 0x8000) | half_exponent << 10 | (bits >> 13 & 1023)));
    }
  }

 private:
  size_t width() const { return dtype_ == DType::f64 ? 8 : (dtype_ == DType::f32 ? 4 : 2); }
  char* at(int64_t offset) const { return data_ + static_cast<size_t>(offset) * width(); }
  template <class T>
  T load(int64_t offset) const {
    T value;
    std::memcpy(&value, at(offset), sizeof value);
    return value;
  }
  template <class T>
  void store(int64_t offset, T value) {
    std::memcpy(at(offset), &value, sizeof value);
  }

  DType dtype_ = DType::f32;
  size_t bytes_, mapped_;
  char *base_, *data_;
};

}  // namespace pyext
