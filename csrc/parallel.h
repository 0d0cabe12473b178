// How kernels ask for threads. The op supplies torch's thread pool; tests may supply anything. No torch headers here.
#pragma once
#include <cstdint>

namespace pyext {

struct Parallel {
  int threads;
  // Runs body(index, context) for every index in [0, count), possibly at the same time.
  void (*run)(int64_t count, void (*body)(int64_t index, void* context), void* context);
};

}  // namespace pyext
