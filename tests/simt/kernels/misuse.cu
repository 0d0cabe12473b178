// Kernels that break one rule each: what the emulator must refuse, beyond the seeded defects. One block or two.
#include "ptx.h"

namespace pyext {
namespace {

constexpr int threads = 64;

__global__ void divergent_barrier(float*) {
  if (threadIdx.x < 32) __syncthreads();
  ptx::bar_sync(1, threads);
}
__global__ void wrong_barrier_count(float*) { ptx::bar_sync(1, threadIdx.x < 32 ? 64 : 96); }
__global__ void half_a_warp_shuffles(float*) {
  if (threadIdx.x % 2) __shfl_sync(~0u, 1, 0);
}
__global__ void mixed_collectives(float*) {
  if (threadIdx.x % 2) {
    __shfl_sync(~0u, 1, 0);
  } else {
    __ballot_sync(~0u, 1);
  }
}
__global__ void shuffle_from_outside_mask(float*) {
  if (threadIdx.x % 32 < 16) __shfl_sync(0xFFFFu, 1, 20);
}
// A shuffle does not order memory.
__global__ void shuffle_as_barrier(float* out) {
  PYEXT_SHARED(float, shared);
  shared[threadIdx.x] = 1;
  __shfl_xor_sync(~0u, 1, 1);
  out[threadIdx.x] = shared[threadIdx.x ^ 1];
}
__global__ void shared_overrun(float*) {
  PYEXT_SHARED(float, shared);
  shared[threadIdx.x * 16] = 0;
}
__global__ void blocks_write_the_same(float* out) { out[threadIdx.x] = static_cast<float>(blockIdx.x); }
__global__ void global_overrun(float* out) { out[blockIdx.x * (threads + 1) + threadIdx.x] = 0; }
__global__ void misaligned_vector(float* out) {
  if (blockIdx.x + threadIdx.x == 0) *reinterpret_cast<float4*>(out + 1) = make_float4(0, 0, 0, 0);
}
__global__ void uninitialised_global(float* out) {
  if (out[threadIdx.x] > 1) out[threadIdx.x] = 0;
}
__global__ void misaligned_copy(float* out) {
  PYEXT_SHARED(float, shared);
  ptx::cp_async(shared + 1, out, false);
}
__global__ void barrier_without_init(float*) {
  PYEXT_SHARED(uint64_t, shared);
  ptx::mbarrier_arrive(shared);
}
__global__ void too_many_arrivals(float*) {
  PYEXT_SHARED(uint64_t, shared);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(shared, threads - 1);
    ptx::mbarrier_expect(shared, 16);
  }
  __syncthreads();
  if (threadIdx.x) ptx::mbarrier_arrive(shared);
}
__global__ void own_write_before_bulk_load(float* out) {
  PYEXT_SHARED(float, shared);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 64);
  if (threadIdx.x) return;
  ptx::mbarrier_init(barrier, 1);
  ptx::fence_mbarrier_init();
  shared[0] = 0;
  ptx::mbarrier_expect(barrier, 16);
  ptx::bulk_load(shared, out, 16, barrier);
  ptx::mbarrier_wait(barrier, 0);
}
__global__ void nobody_waits_for_a_load(float* out) {
  PYEXT_SHARED(float, shared);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 64);
  if (threadIdx.x) return;
  ptx::mbarrier_init(barrier, 1);
  ptx::fence_mbarrier_init();
  ptx::mbarrier_expect(barrier, 16);
  ptx::bulk_load(shared, out, 16, barrier);
}
__global__ void endless_wait(float*) {
  PYEXT_SHARED(uint64_t, shared);
  if (threadIdx.x) return;
  ptx::mbarrier_init(shared, 1);
  ptx::mbarrier_wait(shared, 0);
}
// A warp is one half of a warpgroup short of a wgmma.
__global__ void lonely_warps(float* out) {
  float d[4] = {};
  const uint32_t a[4] = {};
  PYEXT_SHARED(bf16, shared);
  for (int i = threadIdx.x; i < 512; i += threads) shared[i] = ptx::from_float<bf16>(0);
  ptx::fence_proxy_async();
  __syncthreads();
  ptx::wgmma_fence();
  ptx::wgmma<bf16>(d, a, ptx::matrix_descriptor(shared, 1024), false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  out[threadIdx.x] = d[0];
}

struct Misuse {
  const char *name, *message;  // what the emulator says contains it
  void (*kernel)(float*);
};
#define PYEXT_MISUSE(kernel, message) {#kernel, message, kernel}
const Misuse misuses[] = {
    PYEXT_MISUSE(divergent_barrier, "deadlock"),
    PYEXT_MISUSE(wrong_barrier_count, "expects"),
    PYEXT_MISUSE(half_a_warp_shuffles, "deadlock"),
    PYEXT_MISUSE(mixed_collectives, "divergent warp collective"),
    PYEXT_MISUSE(shuffle_from_outside_mask, "not in mask"),
    PYEXT_MISUSE(shuffle_as_barrier, "not ordered after a write"),
    PYEXT_MISUSE(shared_overrun, "past the end"),
    PYEXT_MISUSE(blocks_write_the_same, "not ordered after a write"),
    PYEXT_MISUSE(global_overrun, "outside every buffer"),
    PYEXT_MISUSE(misaligned_vector, "misaligned"),
    PYEXT_MISUSE(uninitialised_global, "uninitialised"),
    PYEXT_MISUSE(misaligned_copy, "misaligned"),
    PYEXT_MISUSE(barrier_without_init, "no mbarrier"),
    PYEXT_MISUSE(too_many_arrivals, "more arrivals"),
    PYEXT_MISUSE(own_write_before_bulk_load, "without fence.proxy.async"),
    PYEXT_MISUSE(nobody_waits_for_a_load, "nobody waited"),
    PYEXT_MISUSE(endless_wait, "waits for an mbarrier"),
    PYEXT_MISUSE(lonely_warps, "the other warps"),
};

}  // namespace
}  // namespace pyext

extern "C" int simt_misuses() { return static_cast<int>(sizeof pyext::misuses / sizeof pyext::misuses[0]); }
extern "C" const char* simt_misuse_name(int i) { return pyext::misuses[i].name; }
extern "C" const char* simt_misuse_message(int i) { return pyext::misuses[i].message; }
// `out` has 128 numbers.
extern "C" int simt_misuse(int i, float* out, cudaStream_t stream) {
  using namespace pyext;
  return ptx::launch(misuses[i].kernel, dim3(2), dim3(threads), 1024, stream, out);
}
