// What CUDA kernels include, and all they include besides problem structs: CUDA, or the CPU emulator of tests/simt that
// stands in for it under g++; the 16-bit types; and every PTX instruction in use, one wrapper each. Beside each
// instruction stands its emulated twin: PYEXT_PTX(instruction, twin). `asm` is written nowhere else.
//
// Kernels take dynamic shared memory only (PYEXT_SHARED) and start through ptx::launch, from launchers with C linkage.
#pragma once
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda.h>
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
#define PYEXT_DEVICE inline __attribute__((always_inline))
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

// Of the current device. Kernels that stay take this many blocks.
inline int multiprocessors() {
  int count = 2;
#ifdef __CUDACC__
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 1;
  if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 1;
#endif
  return count;
}

// Keeps the compiler from working out ahead of here, and holding in registers, what follows from x.
PYEXT_DEVICE void hide_value(int& x) { PYEXT_PTX(asm volatile("" : "+r"(x)), static_cast<void>(x)); }
template <class T>
PYEXT_DEVICE void hide_value(T*& x) {
  PYEXT_PTX(asm volatile("" : "+l"(x)), static_cast<void>(x));
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

// A counter in global memory that one thread of the grid sets, and that never falls. What others of its block did
// before a barrier in front of store_release comes before what others of the waiting thread's block do after a barrier
// behind wait_above, which waits until the counter is above `value`: of blocks that are running or will run without
// this one.
PYEXT_DEVICE void store_release(int* counter, int value) {
  PYEXT_PTX(asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(counter), "r"(value) : "memory"),
            simt::store_release(counter, value));
}
PYEXT_DEVICE void wait_above(const int* counter, int value) {
  int now;
  do {
    PYEXT_PTX(asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory"),
              now = simt::acquire_above(counter, value));
  } while (now <= value);
}

// --- Barriers and lanes ---

// Barrier `id` (0 is __syncthreads) of `threads` threads, whole warps; arrive does not wait for the others.
PYEXT_DEVICE void bar_sync(int id, int threads) {
  PYEXT_PTX(asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"), simt::barrier(id, threads, true));
}
PYEXT_DEVICE void bar_arrive(int id, int threads) {
  PYEXT_PTX(asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"), simt::barrier(id, threads, false));
}

// True in one lane of the converged warp, always the same one.
PYEXT_DEVICE bool elect_one() {
  uint32_t chosen;
  PYEXT_PTX(asm volatile("{\n"
                         ".reg .pred p;\n"
                         "elect.sync _|p, 0xFFFFFFFF;\n"
                         "selp.u32 %0, 1, 0, p;\n"
                         "}" : "=r"(chosen)),
            chosen = simt::elect(~0u));
  return chosen != 0;
}

// Registers per thread from here on; all warps of a warpgroup execute it. sm_90a and later.
template <int count>
PYEXT_DEVICE void setmaxnreg_dec() {
  PYEXT_PTX(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)), simt::set_registers(count));
}
template <int count>
PYEXT_DEVICE void setmaxnreg_inc() {
  PYEXT_PTX(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)), simt::set_registers(count));
}

// --- Shared memory: cp.async, ldmatrix ---

PYEXT_DEVICE uint32_t shared_address(const void* pointer) {
  uint32_t address;
  PYEXT_PTX(address = static_cast<uint32_t>(__cvta_generic_to_shared(pointer)),
            address = simt::shared_address(pointer));
  return address;
}

// 16 bytes from global to shared memory, zeros if not `valid` (then `global` is not read). Groups are waited for in the
// order of their commits: at most `remaining` of the calling thread's are under way after cp_async_wait. Others see the
// data after a barrier.
PYEXT_DEVICE void cp_async(void* shared, const void* global, bool valid) {
  const int bytes = valid ? 16 : 0;
  PYEXT_PTX(asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                         "r"(bytes) : "memory"),
            simt::copy_async(shared, global, 16, bytes));
}
PYEXT_DEVICE void cp_async_commit() {
  PYEXT_PTX(asm volatile("cp.async.commit_group;" :: : "memory"), simt::copy_async_commit());
}
template <int remaining>
PYEXT_DEVICE void cp_async_wait() {
  PYEXT_PTX(asm volatile("cp.async.wait_group %0;" ::"n"(remaining) : "memory"), simt::copy_async_wait(remaining));
}

// Four 8 x 8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix l / 8. Register i gets, of
// matrix i, row l / 4, columns 2 (l % 4) and the next; transposed, column l / 4, rows 2 (l % 4) and the next.
PYEXT_DEVICE void ldmatrix(uint32_t (&registers)[4], const void* row) {
  PYEXT_PTX(
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(registers[0]),
                   "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3]) : "r"(shared_address(row)) : "memory"),
      simt::ldmatrix(registers, row, 4, false));
}
PYEXT_DEVICE void ldmatrix_transposed(uint32_t (&registers)[4], const void* row) {
  PYEXT_PTX(
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(registers[0]),
                   "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3]) : "r"(shared_address(row)) : "memory"),
      simt::ldmatrix(registers, row, 4, true));
}

// d += a b with a (16, 16) by rows and b (16, 8) by columns. With g = lane / 4 and t = 2 (lane % 4), a lane holds
//   d[i]: row g + 8 (i / 2), column t + i % 2;
//   a[i]: row g + 8 (i % 2), columns t + 8 (i / 2) and the next;  b[i]: rows t + 8 i and the next, column g.
template <class T>
PYEXT_DEVICE void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
#define PYEXT_MMA(T, format)                                                                                           \
  template <>                                                                                                          \
  PYEXT_DEVICE void mma<T>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {                            \
    PYEXT_PTX(asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." format "." format                                  \
                           ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),        \
                           "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), \
                           "r"(b[1])),                                                                                 \
              simt::mma(d, a, b, d, std::is_same<T, bf16>::value));                                                    \
  }
PYEXT_MMA(bf16, "bf16")
PYEXT_MMA(f16, "f16")
#undef PYEXT_MMA

// --- mbarriers (sm_90 and later) ---

// A phase is complete after `count` arrivals and all expected bytes. After its initialisation: fence_mbarrier_init,
// then
// __syncthreads.
PYEXT_DEVICE void mbarrier_init(uint64_t* barrier, int count) {
  PYEXT_PTX(
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory"),
      simt::mbarrier_init(barrier, count));
}
PYEXT_DEVICE void fence_mbarrier_init() {
  PYEXT_PTX(asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"), simt::fence_mbarrier_init());
}
PYEXT_DEVICE void mbarrier_arrive(uint64_t* barrier) {
  PYEXT_PTX(asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory"),
            simt::mbarrier_arrive(barrier, 0));
}
// Arrives, and expects this many bytes more of asynchronous copies in this phase.
PYEXT_DEVICE void mbarrier_expect(uint64_t* barrier, int bytes) {
  PYEXT_PTX(asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                         "r"(bytes) : "memory"),
            simt::mbarrier_arrive(barrier, bytes));
}
// Whether the phase of this parity (0, 1, 0, ...) is complete; waits for a while.
PYEXT_DEVICE bool mbarrier_try_wait(uint64_t* barrier, int parity) {
  uint32_t complete;
  PYEXT_PTX(asm volatile("{\n"
                         ".reg .pred p;\n"
                         "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                         "selp.u32 %0, 1, 0, p;\n"
                         "}" : "=r"(complete) : "r"(shared_address(barrier)),
                         "r"(parity) : "memory"),
            complete = simt::mbarrier_try_wait(barrier, static_cast<unsigned>(parity)));
  return complete != 0;
}
PYEXT_DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// --- TMA (sm_90 and later) ---

// Between ordinary writes of shared memory and the TMA or wgmma that reads them.
PYEXT_DEVICE void fence_proxy_async() {
  PYEXT_PTX(asm volatile("fence.proxy.async.shared::cta;" :: : "memory"), simt::fence_proxy_async());
}

// A tensor in global memory and the boxes that TMA moves of it. Passed to kernels as `const __grid_constant__`.
#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
using TensorMap = simt::TensorMap;
#endif

// 128-byte swizzle and the like: the box's rows of 16-byte chunks are permuted, as wgmma and conflict-free reads want.
template <class T, int rank>
cudaError_t encode_tensor_map(TensorMap* map, const void* base, const int64_t (&size)[rank],
                              const int64_t (&stride_bytes)[rank - 1], const int (&box)[rank], int swizzle_bytes) {
#ifdef __CUDACC__
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static Encode encode = nullptr;
  if (!encode) {
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(
        "cuTensorMapEncodeTiled", reinterpret_cast<void**>(&encode), 12000, cudaEnableDefault, &found);
    if (error != cudaSuccess) return error;
    if (!encode) return cudaErrorNotSupported;
  }
  cuuint64_t sizes[rank], strides[rank];
  cuuint32_t boxes[rank], steps[rank];
  for (int d = 0; d < rank; ++d) {
    sizes[d] = static_cast<cuuint64_t>(size[d]);
    strides[d] = d + 1 < rank ? static_cast<cuuint64_t>(stride_bytes[d]) : 0;
    boxes[d] = static_cast<cuuint32_t>(box[d]);
    steps[d] = 1;
  }
  const auto type = std::is_same<T, bf16>::value  ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                    : std::is_same<T, f16>::value ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                  : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const auto swizzle = swizzle_bytes == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : swizzle_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                       : swizzle_bytes == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                             : CU_TENSOR_MAP_SWIZZLE_NONE;
  const CUresult result =
      encode(map, type, rank, const_cast<void*>(base), sizes, strides, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
#else
  return simt::encode_tensor_map(map, base, rank, sizeof(T), size, stride_bytes, box, swizzle_bytes);
#endif
}

// Boxes of 2 to 5 dimensions at `corner`, fastest dimension first; one thread issues them.
// tma_load: zeros where the box leaves the tensor; its bytes, all of them, count at `barrier`.
// tma_store: without what lies outside of the tensor. The calling thread's stores are waited for in groups, like
// cp_async: before it returns, and before shared memory is written again.
#define PYEXT_TMA(rank, load_corner, store_corner, ...)                                                           \
  PYEXT_DEVICE void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, const int (&corner)[rank]) {  \
    PYEXT_PTX(asm volatile("cp.async.bulk.tensor." #rank "d.shared::cluster.global.mbarrier::complete_tx::bytes " \
                           "[%0], [%1, {" load_corner "}], [%2];" ::"r"(shared_address(shared)),                  \
                           "l"(map), "r"(shared_address(barrier)), __VA_ARGS__ : "memory"),                       \
              simt::tma_load(shared, map, barrier, corner, rank));                                                \
  }                                                                                                               \
  PYEXT_DEVICE void tma_store(const TensorMap* map, const void* shared, const int (&corner)[rank]) {              \
    PYEXT_PTX(asm volatile("cp.async.bulk.tensor." #rank "d.global.shared::cta.bulk_group "                       \
                           "[%0, {" store_corner "}], [%1];" ::"l"(map),                                          \
                           "r"(shared_address(shared)), __VA_ARGS__ : "memory"),                                  \
              simt::tma_store(map, shared, corner, rank));                                                        \
  }
#define PYEXT_CORNER(i) "r"(corner[i])
PYEXT_TMA(2, "%3, %4", "%2, %3", PYEXT_CORNER(0), PYEXT_CORNER(1))
PYEXT_TMA(3, "%3, %4, %5", "%2, %3, %4", PYEXT_CORNER(0), PYEXT_CORNER(1), PYEXT_CORNER(2))
PYEXT_TMA(4, "%3, %4, %5, %6", "%2, %3, %4, %5", PYEXT_CORNER(0), PYEXT_CORNER(1), PYEXT_CORNER(2), PYEXT_CORNER(3))
PYEXT_TMA(5, "%3, %4, %5, %6, %7", "%2, %3, %4, %5, %6", PYEXT_CORNER(0), PYEXT_CORNER(1), PYEXT_CORNER(2),
          PYEXT_CORNER(3), PYEXT_CORNER(4))
#undef PYEXT_CORNER
#undef PYEXT_TMA
PYEXT_DEVICE void tma_store_commit() {
  PYEXT_PTX(asm volatile("cp.async.bulk.commit_group;" :: : "memory"), simt::tma_store_commit());
}
template <int remaining>
PYEXT_DEVICE void tma_store_wait() {
  PYEXT_PTX(asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(remaining) : "memory"),
            simt::tma_store_wait(remaining));
}

// `bytes` contiguous bytes; all addresses and the size are multiples of 16.
PYEXT_DEVICE void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  PYEXT_PTX(
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                       shared_address(shared)),
                   "l"(global), "r"(bytes), "r"(shared_address(barrier)) : "memory"),
      simt::bulk_load(shared, global, bytes, barrier));
}

}  // namespace ptx
}  // namespace pyext

#include "wgmma.h"
