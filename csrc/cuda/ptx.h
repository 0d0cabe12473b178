// What CUDA kernels include, and all they include besides problem structs: CUDA, or the CPU emulator of tests/simt that
// stands in for it under g++; the 16-bit types; and every PTX instruction in use, one wrapper each. Beside each
// instruction stands its emulated twin: PYEXT_PTX(instruction, twin). `asm` is written nowhere else.
//
// Kernels take dynamic shared memory only (PYEXT_SHARED) and start through ptx::launch, from launchers with C linkage.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define PYEXT_PTX(instruction, twin) instruction
#define PYEXT_DEVICE __device__ __forceinline__
// `name` points at the block's dynamic shared memory, aligned to 1024 bytes.
#define PYEXT_SHARED(type, name)                                  \
  extern __shared__ __align__(1024) unsigned char pyext_shared[]; \
  type* const name = reinterpret_cast<type*>(pyext_shared)
#else
#include "emulator.h"
#define PYEXT_PTX(instruction, twin) twin
#define PYEXT_DEVICE inline
#define PYEXT_SHARED(type, name) type* const name = static_cast<type*>(simt::shared_memory())
#endif

namespace pyext {

// The 16-bit formats as they lie in memory; arithmetic is fp32.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

namespace ptx {

// --- Launch ---

// kernel<<<grid, block, shared_bytes, stream>>>(arguments...), and what became of the launch. More than 48 KiB of
// shared memory is asked for here.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments... arguments) {
#ifdef __CUDACC__
  if (shared_bytes > 48 << 10) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
#else
  static_cast<void>(stream);
  return simt::launch(kernel, grid, block, shared_bytes, arguments...);
#endif
}

// --- Conversions ---

PYEXT_DEVICE float to_float(float x) { return x; }
PYEXT_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
PYEXT_DEVICE float to_float(f16 x) {
  float y;
  PYEXT_PTX(asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits)), y = simt::from_f16(x.bits));
  return y;
}

// Rounds to nearest even.
template <class T>
PYEXT_DEVICE T from_float(float x);
template <>
PYEXT_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
PYEXT_DEVICE bf16 from_float<bf16>(float x) {
  bf16 y;
  PYEXT_PTX(asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)), y.bits = simt::to_bf16(x));
  return y;
}
template <>
PYEXT_DEVICE f16 from_float<f16>(float x) {
  f16 y;
  PYEXT_PTX(asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)), y.bits = simt::to_f16(x));
  return y;
}

// Two numbers in one register, `low` in the lower half, as memory and matrix fragments have them.
template <class T>
PYEXT_DEVICE uint32_t pack(float low, float high);
template <>
PYEXT_DEVICE uint32_t pack<bf16>(float low, float high) {
  uint32_t y;
  PYEXT_PTX(asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)),
            y = simt::to_bf16(low) | static_cast<uint32_t>(simt::to_bf16(high)) << 16);
  return y;
}
template <>
PYEXT_DEVICE uint32_t pack<f16>(float low, float high) {
  uint32_t y;
  PYEXT_PTX(asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)),
            y = simt::to_f16(low) | static_cast<uint32_t>(simt::to_f16(high)) << 16);
  return y;
}

// --- Arithmetic ---

// 2^x to 2 ulp; results below the smallest normal number are 0.
PYEXT_DEVICE float exp2_approx(float x) {
  float y;
  PYEXT_PTX(asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)), y = simt::flush(exp2f(x)));
  return y;
}

// 1 / x to 1 ulp; subnormal numbers, as argument or result, are 0.
PYEXT_DEVICE float reciprocal_approx(float x) {
  float y;
  PYEXT_PTX(asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)), y = simt::flush(1.0f / simt::flush(x)));
  return y;
}

// --- Global memory ---

// 16 bytes as one access; `T` is of 16 bytes or divides them, and the address is a multiple of 16.
template <class T>
struct alignas(16) Vector {
  static constexpr int size = 16 / sizeof(T);
  T values[size];
};

// Of data that no thread writes during the kernel. Read once: does not displace others from L1.
template <class T>
PYEXT_DEVICE Vector<T> load_vector(const T* address) {
  uint4 r;
  PYEXT_PTX(asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(r.x), "=r"(r.y),
                         "=r"(r.z), "=r"(r.w) : "l"(address)),
            r = *reinterpret_cast<const uint4*>(address));
  return *reinterpret_cast<Vector<T>*>(&r);
}
template <class T>
PYEXT_DEVICE void store_vector(T* address, const Vector<T>& value) {
  const uint4 r = *reinterpret_cast<const uint4*>(&value);
  PYEXT_PTX(asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(r.x), "r"(r.y), "r"(r.z),
                         "r"(r.w) : "memory"),
            *reinterpret_cast<uint4*>(address) = r);
}

}  // namespace ptx
}  // namespace pyext
