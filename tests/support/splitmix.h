// Random bits for the C++ drivers of the tests: the same from a seed on every machine, on the host and under nvcc.
#pragma once
#include <cstdint>

// splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)
class Splitmix {
 public:
  explicit Splitmix(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    state_ += 0x9E3779B97F4A7C15u;
    uint64_t z = state_;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

 private:
  uint64_t state_;
};
