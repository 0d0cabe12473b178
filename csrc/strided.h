// The tensors that problem structs are made of. No torch headers here.
#pragma once
#include <cstdint>

namespace pyext {

enum class DType : int { f32, bf16, f16, f64 };

// A (batch, head, row, feature) tensor with unit feature stride; strides are in elements, 0 broadcasts.
template <class Pointer>
struct Strided {
  Pointer data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
};
using Input = Strided<const void*>;
using Output = Strided<void*>;

}  // namespace pyext
