// What a kernel sees of CUDA when g++ compiles it for the CPU: vector types, indices, synchronisation, shuffles,
// atomics and the launch. csrc/cuda/ptx.h includes this header where nvcc includes CUDA's; no CUDA installation is
// needed. README.md in this folder says what the emulator checks and what it cannot.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
// Inlined even without optimisation, so that messages name the kernel's line.
#define SIMT_INLINE inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
// Static shared memory has no place here: kernels take theirs from PYEXT_SHARED (ptx.h), whose bounds are checked.
#define __shared__ static_assert(false, "kernels use PYEXT_SHARED: dynamic shared memory only");

// --- Types. Aligned as CUDA aligns them, so that a misaligned 16-byte access is seen. ---

#define SIMT_VECTOR_2(name, type)         \
  struct alignas(2 * sizeof(type)) name { \
    type x, y;                            \
  };                                      \
  inline name make_##name(type x, type y) { return {x, y}; }
#define SIMT_VECTOR_4(name, type)         \
  struct alignas(4 * sizeof(type)) name { \
    type x, y, z, w;                      \
  };                                      \
  inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
SIMT_VECTOR_2(int2, int)
SIMT_VECTOR_2(uint2, unsigned)
SIMT_VECTOR_2(float2, float)
SIMT_VECTOR_2(double2, double)
SIMT_VECTOR_4(int4, int)
SIMT_VECTOR_4(uint4, unsigned)
SIMT_VECTOR_4(float4, float)
#undef SIMT_VECTOR_2
#undef SIMT_VECTOR_4

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

// --- The machine, from inside a kernel. Everything is passed by value: the checked build reports each memory access of
// this file's code, and the machine's own must not be among them. ---

namespace simt {

uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
int lane();
void* shared_memory();

// Runs on every thread of every block; false if a check failed. `parameters` is what the kernel may read of the host.
bool run(dim3 grid, dim3 block, size_t shared_bytes, const char* name, bool instrumented, void (*body)(const void*),
         const void* parameters, size_t parameter_bytes);
// Stops the kernel with this message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void yield();
// bar.sync and bar.arrive; count < 0: all threads of the block that have not returned.
void barrier(int id, int count, bool wait);
void sync_warp(unsigned mask);
uint64_t shuffle(unsigned mask, uint64_t value, int source_lane);
unsigned ballot(unsigned mask, bool predicate);
unsigned match_any(unsigned mask, uint64_t value);
bool elect(unsigned mask);

enum class Access { read, write, atomic };
// Reports an access that a wrapper makes on behalf of the running thread; caller: where, for the message.
void check_access(const void* address, size_t bytes, Access kind, const void* caller);

// Counters that blocks wait for: memory.cpp. Blocks run one after the other, so what is not set by now never will be.
void store_release(int* counter, int value);
int acquire_above(const int* counter, int value);

// --- Asynchronous copies, mbarriers, TMA: asynchronous.cpp ---

uint32_t shared_address(const void* pointer);  // as instructions take it

void copy_async(void* shared, const void* global, int bytes, int valid);
void copy_async_commit();
void copy_async_wait(int groups);

void mbarrier_init(uint64_t* barrier, int count);
void mbarrier_arrive(uint64_t* barrier, int expected_bytes);
bool mbarrier_try_wait(uint64_t* barrier, unsigned parity);
void fence_mbarrier_init();
void fence_proxy_async();

struct TensorMap {
  char* base;
  int rank, element_bytes, swizzle_bytes;
  int64_t size[5], stride[5];  // elements; bytes, that of the first dimension included
  int box[5];
};
cudaError_t encode_tensor_map(TensorMap* map, const void* base, int rank, int element_bytes, const int64_t* size,
                              const int64_t* stride_bytes, const int* box, int swizzle_bytes);
void tma_load(void* shared, const TensorMap* map, uint64_t* barrier, const int* corner, int rank);
void tma_store(const TensorMap* map, const void* shared, const int* corner, int rank);
void tma_store_commit();
void tma_store_wait(int groups);
void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier);

// --- Matrix units: matrix.cpp ---

void ldmatrix(uint32_t* registers, const void* row, int count, bool transpose);
void mma(float* d, const uint32_t* a, const uint32_t* b, const float* c, bool is_bf16);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups);
// a_registers or a; d holds n / 2 numbers.
void wgmma(float* d, int n, const uint32_t* a_registers, uint64_t a, uint64_t b, bool accumulate, bool transpose_a,
           bool transpose_b, bool is_bf16);
void set_registers(int count);

template <class T>
SIMT_INLINE T shuffle_value(unsigned mask, T value, int source_lane) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source_lane);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Read-modify-write, whole as seen by the other threads: nothing else runs in between.
template <class T, class Update>
__attribute__((noinline, no_sanitize("thread"))) T read_modify_write(T* address, Update update) {
  check_access(address, sizeof(T), Access::atomic, __builtin_return_address(0));
  const T before = *address;
  *address = update(before);
  yield();
  return before;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Arguments... arguments) {
  const auto call = [=] { kernel(arguments...); };
  using Call = decltype(call);
#ifdef __SANITIZE_THREAD__
  const bool instrumented = true;
#else
  const bool instrumented = false;
#endif
  const bool passed = run(
      grid, block, shared_bytes, __PRETTY_FUNCTION__, instrumented,
      [](const void* closure) { (*static_cast<Call*>(closure))(); }, &call, sizeof call);
  return passed ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace simt

// --- 16-bit formats, rounded to nearest even ---

namespace simt {

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
// Subnormal numbers are 0 to instructions with .ftz.
inline float flush(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0, x) : x; }

inline uint16_t to_bf16(float x) {
  if (x != x) return 0x7FFF;
  const uint32_t bits = bits_of(x);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }

inline uint16_t to_f16(float x) {
  if (x != x) return 0x7FFF;
  const uint16_t sign = static_cast<uint16_t>(bits_of(x) >> 16 & 0x8000);
  const float size = fabsf(x);
  if (size >= 65520) return sign | 0x7C00;
  // Adding a power of two whose last bit is the half's last bit rounds there.
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | (bits_of(size + 0.5f) - bits_of(0.5f)));
  const uint32_t bits = bits_of(size) - (112u << 23);
  return static_cast<uint16_t>(sign | (bits + 0xFFF + (bits >> 13 & 1)) >> 13);
}
inline float from_f16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 1023;
  if (exponent == 31) return float_of(sign | 0x7F800000 | mantissa << 13);
  if (exponent == 0) return copysignf(static_cast<float>(mantissa) * 0x1p-24f, float_of(sign | 0x3F800000));
  return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
}

}  // namespace simt

// --- CUDA's own names ---

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())
constexpr int warpSize = 32;

using std::max;
using std::min;

SIMT_INLINE void __syncthreads() { simt::barrier(0, -1, true); }
SIMT_INLINE void __syncwarp(unsigned mask = ~0u) { simt::sync_warp(mask); }

// The lanes exchange within segments of `width` lanes; a source outside of its segment means the own value.
template <class T>
SIMT_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::shuffle_value(mask, value, (simt::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
SIMT_INLINE T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int own = simt::lane(), source = own ^ lanes;
  return simt::shuffle_value(mask, value, source < (own | (width - 1)) + 1 ? source : own);
}
template <class T>
SIMT_INLINE T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = simt::lane(), source = own - static_cast<int>(delta);
  return simt::shuffle_value(mask, value, source >= (own & ~(width - 1)) ? source : own);
}
template <class T>
SIMT_INLINE T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const int own = simt::lane(), source = own + static_cast<int>(delta);
  return simt::shuffle_value(mask, value, source <= (own | (width - 1)) ? source : own);
}
SIMT_INLINE unsigned __ballot_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0); }
SIMT_INLINE int __any_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0) != 0; }
SIMT_INLINE int __all_sync(unsigned mask, int predicate) { return simt::ballot(mask, predicate != 0) == mask; }
template <class T>
SIMT_INLINE unsigned __match_any_sync(unsigned mask, T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return simt::match_any(mask, bits);
}

template <class T>
SIMT_INLINE T atomicAdd(T* address, T value) {
  return simt::read_modify_write(address, [=](T before) { return static_cast<T>(before + value); });
}
template <class T>
SIMT_INLINE T atomicMax(T* address, T value) {
  return simt::read_modify_write(address, [=](T before) { return before > value ? before : value; });
}
template <class T>
SIMT_INLINE T atomicMin(T* address, T value) {
  return simt::read_modify_write(address, [=](T before) { return before < value ? before : value; });
}
template <class T>
SIMT_INLINE T atomicExch(T* address, T value) {
  return simt::read_modify_write(address, [=](T) { return value; });
}
template <class T>
SIMT_INLINE T atomicCAS(T* address, T compare, T value) {
  return simt::read_modify_write(address, [=](T before) { return before == compare ? value : before; });
}

template <class T>
SIMT_INLINE T __ldg(const T* address) {
  return *address;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { simt::yield(); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __float_as_uint(float x) { return simt::bits_of(x); }
inline float __uint_as_float(unsigned bits) { return simt::float_of(bits); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
