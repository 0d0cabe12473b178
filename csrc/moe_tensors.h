// What the ops of a mixture of experts do with the tensors of a routing.
#pragma once
#include "tensors.h"

namespace pyext {

// A contiguous int32 tensor on the device of `like`.
inline Tensor routing_map(const char* name, const Tensor& t, const Tensor& like) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && same_device(t, like), name,
                  " must be int32, on the device of the other tensors");
  return torch::stable::contiguous(t);
}

// On the CPU every number of the map, which a caller may have made by hand, must be in [-1, limit): kernels take them
// for addresses. On a GPU, where to look at them is to wait for the device, the kernels look themselves.
inline void check_range(const char* name, const Tensor& map, int64_t limit) {
  if (!map.is_cpu()) return;
  const int32_t* data = static_cast<const int32_t*>(map.const_data_ptr());
  const int64_t count = map.numel();
  int32_t low = 0, high = -1;
  for (int64_t i = 0; i < count; ++i) {
    low = data[i] < low ? data[i] : low;
    high = data[i] > high ? data[i] : high;
  }
  STD_TORCH_CHECK(low >= -1 && high < limit, name, " must lie in [-1, ", limit, "), got ", low < -1 ? low : high);
}

}  // namespace pyext
