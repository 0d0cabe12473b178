// One tiny kernel per wrapper of ptx.h. On a GPU the program checks the emulator: both run it on the same random inputs
// and conformance.py compares what they dump. -DCONFORMANCE_SM says for which GPU it is compiled: wgmma needs 90, TMA
// and mbarriers need at least that.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "conformance.h"

#ifndef CONFORMANCE_SM
#define CONFORMANCE_SM 90
#endif

namespace pyext {
namespace {

constexpr int threads = 128;

// --- Lanes, conversions, arithmetic ---

constexpr int lane_results = 16;
__global__ void lanes_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t x = in[threadIdx.x];
  uint32_t* results = out + threadIdx.x * lane_results;
  const int lane = threadIdx.x % 32;
  results[0] = __shfl_sync(~0u, x, static_cast<int>(x % 32));
  results[1] = __shfl_sync(~0u, x, lane + 3, 8);
  results[2] = __shfl_xor_sync(~0u, x, 5);
  results[3] = __shfl_xor_sync(~0u, x, 9, 8);
  results[4] = __shfl_up_sync(~0u, x, 3);
  results[5] = __shfl_up_sync(~0u, x, 3, 8);
  results[6] = __shfl_down_sync(~0u, x, 7);
  results[7] = __shfl_down_sync(~0u, x, 7, 16);
  results[8] = __ballot_sync(~0u, x & 1);
  results[9] = static_cast<uint32_t>(__any_sync(~0u, (x & 63) == 0));
  results[10] = static_cast<uint32_t>(__all_sync(~0u, (x & 63) != 0));
  results[11] = __match_any_sync(~0u, x & 7);
  results[12] = static_cast<uint32_t>(__popc(x) | __ffs(static_cast<int>(x)) << 8 | __clz(static_cast<int>(x)) << 16);
  results[13] = static_cast<uint32_t>(__popc(__ballot_sync(~0u, CONFORMANCE_SM >= 90 ? ptx::elect_one() : lane == 0)));
  results[14] = lane < 16 ? __ballot_sync(0xFFFFu, x & 2) : 0;
  results[15] = static_cast<uint32_t>(__popcll(static_cast<unsigned long long>(x) << 7));
}

constexpr int conversion_results = 6;
__global__ void conversions_kernel(const float* in, uint32_t* out) {
  const float x = in[threadIdx.x], y = in[threadIdx.x ^ 1];
  uint32_t* results = out + threadIdx.x * conversion_results;
  const bf16 b = ptx::from_float<bf16>(x);
  const f16 h = ptx::from_float<f16>(x);
  results[0] = b.bits;
  results[1] = h.bits;
  results[2] = __float_as_uint(ptx::to_float(b));
  results[3] = __float_as_uint(ptx::to_float(h));
  results[4] = ptx::pack<bf16>(x, y);
  results[5] = ptx::pack<f16>(x, y);
}
__global__ void approximations_kernel(const float* exponents, const float* numbers, float* out) {
  out[threadIdx.x] = ptx::exp2_approx(exponents[threadIdx.x]);
  out[threads + threadIdx.x] = ptx::reciprocal_approx(numbers[threadIdx.x]);
}

__global__ void vectors_kernel(const uint16_t* in, uint16_t* out) {
  auto vector = ptx::load_vector(in + threadIdx.x * 8);
  for (int i = 0; i < 4; ++i) {
    const uint16_t swapped = vector.values[i];
    vector.values[i] = vector.values[7 - i];
    vector.values[7 - i] = swapped;
  }
  ptx::store_vector(out + threadIdx.x * 8, vector);
}

__global__ void atomics_kernel(const uint32_t* in, uint32_t* out) {
  const uint32_t x = in[threadIdx.x] % 1000;
  atomicAdd(out, x);
  atomicMax(out + 1, x);
  atomicMin(out + 2, x);
  atomicAdd(reinterpret_cast<float*>(out + 3), static_cast<float>(x));
  if (threadIdx.x == 77) atomicExch(out + 4, x);
  if (threadIdx.x == 78) atomicCAS(out + 5, 0u, x);
}

// Warps hand on a sum, the last one first: each adds its own lanes' numbers in global memory after the one before.
__global__ void counters_kernel(const uint32_t* in, uint32_t* out) {
  const int lane = threadIdx.x % 32, before = 3 - static_cast<int>(threadIdx.x) / 32;
  int* const counter = reinterpret_cast<int*>(out + 32);
  if (before > 0 && lane == 5) ptx::wait_above(counter, before - 1);
  __syncwarp();
  out[lane] += in[threadIdx.x] * static_cast<uint32_t>(2 * before + 1);
  __syncwarp();
  if (lane == 7) ptx::store_release(counter, before + 1);
}

// --- Barriers, cp.async, ldmatrix, mma ---

// Warps hand a number on in a circle; the last two warps only arrive where the first two wait.
__global__ void barriers_kernel(const uint32_t* in, uint32_t* out) {
  PYEXT_SHARED(uint32_t, shared);
  shared[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const uint32_t sum = shared[(threadIdx.x + 32) % threads] + 1;
  __syncthreads();
  shared[threadIdx.x] = sum;
  if (threadIdx.x >= 64) {
    ptx::bar_arrive(1, threads);
    out[threadIdx.x] = sum;
  } else {
    ptx::bar_sync(1, threads);
    out[threadIdx.x] = shared[threadIdx.x + 64];
  }
}

__global__ void cp_async_kernel(const uint32_t* in, uint32_t* out) {
  PYEXT_SHARED(uint32_t, shared);
  for (int group = 0; group < 2; ++group) {
    const int at = (group * threads + threadIdx.x) * 4;
    ptx::cp_async(shared + at, in + at, in[at] % 4 != 0);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = shared[threadIdx.x * 4 + i];
  ptx::cp_async_wait<0>();
  __syncthreads();
  const int other = (2 * threads - 1 - threadIdx.x) * 4;
  for (int i = 0; i < 4; ++i) out[other + i] = shared[other + i];
}

// A warp's 32 rows of 16 bytes are four matrices; each warp takes its rows in another order.
__global__ void ldmatrix_kernel(const uint32_t* in, uint32_t* out) {
  PYEXT_SHARED(uint32_t, shared);
  for (int i = 0; i < 4; ++i) shared[threadIdx.x * 4 + i] = in[threadIdx.x * 4 + i];
  __syncthreads();
  const uint32_t* row = shared + (threadIdx.x ^ 37) * 4;
  uint32_t plain[4], transposed[4];
  ptx::ldmatrix(plain, row);
  ptx::ldmatrix_transposed(transposed, row);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 8 + i] = plain[i];
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 8 + 4 + i] = transposed[i];
}

template <class T>
__global__ void mma_kernel(const uint32_t* in, float* out) {
  const uint32_t* own = in + threadIdx.x * 6;
  const uint32_t a[4] = {own[0], own[1], own[2], own[3]}, b[2] = {own[4], own[5]};
  float d[4] = {1, 2, 3, static_cast<float>(threadIdx.x)};
  ptx::mma<T>(d, a, b);
  for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = d[i];
}

template <class T>
void run_mma(Dump& dump, Random& random, const std::string& format) {
  for (const bool exact : {true, false}) {
    Buffer<uint32_t> in(random_pairs<T>(random, threads * 6, exact));
    Buffer<float> out(threads * 4);
    const std::string name = "mma_" + format + (exact ? "_integers" : "");
    launch(name, mma_kernel<T>, 0, in.data(), out.data());
    dump.line(name, exact ? "exact" : "sum", out.words());
  }
}

void run_everywhere(Dump& dump, Random& random) {
  const auto run = [&](const char* name, auto kernel, auto input, size_t count, size_t shared_bytes) {
    Buffer<typename decltype(input)::value_type> in(std::move(input));
    Buffer<uint32_t> out(count);
    launch(name, kernel, shared_bytes, in.data(), out.data());
    dump.line(name, "exact", out.words());
  };
  run("lanes", lanes_kernel, random_bits(random, threads), threads * lane_results, 0);
  run("conversions", conversions_kernel, random_numbers(random, threads), threads * conversion_results, 0);
  run("atomics", atomics_kernel, random_bits(random, threads), 6, 0);
  run("counters", counters_kernel, random_bits(random, threads), 33, 0);
  run("barriers", barriers_kernel, random_bits(random, threads), threads, threads * 4);
  run("cp_async", cp_async_kernel, random_bits(random, threads * 8), threads * 8, threads * 32);
  run("ldmatrix", ldmatrix_kernel, random_bits(random, threads * 4), threads * 8, threads * 16);
  {
    std::vector<uint16_t> values(threads * 8);
    for (uint16_t& value : values) value = static_cast<uint16_t>(random.bits());
    Buffer<uint16_t> in(std::move(values)), out(threads * 8);
    launch("vectors", vectors_kernel, 0, in.data(), out.data());
    dump.line("vectors", "exact", out.words());
  }
  {
    std::vector<float> exponents(threads);
    for (float& x : exponents) x = static_cast<float>(random.below(1 << 20)) * 0x1p-12f - 150;
    Buffer<float> in(std::move(exponents)), numbers(random_numbers(random, threads)), out(2 * threads);
    launch("approximations", approximations_kernel, 0, in.data(), numbers.data(), out.data());
    dump.line("approximations", "ulp", out.words());
  }
  run_mma<bf16>(dump, random, "bf16");
  run_mma<f16>(dump, random, "f16");
}

#if CONFORMANCE_SM >= 90
// --- mbarriers and TMA ---

// Four phases: all threads arrive, thread 0 brings bytes in the odd ones, and everybody says what came.
__global__ void mbarrier_kernel(const uint32_t* in, uint32_t* out) {
  PYEXT_SHARED(uint32_t, shared);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + 4 * threads);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, threads);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  for (int phase = 0; phase < 4; ++phase) {
    const bool brings = threadIdx.x == 0 && phase % 2;
    if (brings) {
      ptx::mbarrier_expect(barrier, threads * 4);
      ptx::bulk_load(shared + phase * threads, in + phase * threads, threads * 4, barrier);
    } else {
      ptx::mbarrier_arrive(barrier);
    }
    ptx::mbarrier_wait(barrier, phase & 1);
    out[phase * threads + threadIdx.x] = phase % 2 ? shared[phase * threads + threadIdx.x] : threadIdx.x;
  }
}

// Loads one box, dumps shared memory as it lies, and stores the box again somewhere else.
constexpr int box_words = 4096;
template <int rank>
struct Corners {
  int load[rank], store[rank];
};
template <int rank>
__global__ void tma_kernel(const __grid_constant__ ptx::TensorMap from, const __grid_constant__ ptx::TensorMap to,
                           Corners<rank> corners, int bytes, uint32_t* out) {
  PYEXT_SHARED(uint32_t, shared);
  uint64_t* barrier = reinterpret_cast<uint64_t*>(shared + box_words);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_expect(barrier, bytes);
    ptx::tma_load(shared, &from, barrier, corners.load);
  }
  __syncthreads();
  ptx::mbarrier_wait(barrier, 0);
  for (int i = threadIdx.x; i < bytes / 4; i += threads) out[i] = shared[i];
  if (threadIdx.x == 0) {
    ptx::tma_store(&to, shared, corners.store);
    ptx::tma_store_commit();
    ptx::tma_store_wait<0>();
  }
}

template <int rank>
void run_tma(Dump& dump, Random& random, int swizzle) {
  const int row = swizzle ? swizzle / 2 : 24;  // 16-bit numbers in a row of the box
  const int64_t all_sizes[5] = {72, 11, 4, 3, 3};
  const int all_boxes[5] = {row, 9, 3, 2, 2};
  int64_t size[rank], stride[rank - 1];
  int box[rank], bytes = 2;
  Corners<rank> corners;
  int64_t elements = 1;
  for (int d = 0; d < rank; ++d) {
    size[d] = all_sizes[d];
    box[d] = all_boxes[d];
    bytes *= box[d];
    elements *= size[d];
    if (d + 1 < rank) stride[d] = elements * 2;
    // At the edges a part of the box is outside.
    corners.load[d] = random.below(static_cast<int>(size[d]) + 1) - box[d] / 2;
    corners.store[d] = random.below(static_cast<int>(size[d]) + 1) - box[d] / 2;
  }
  const std::string name = "tma_" + std::to_string(rank) + "d_swizzle" + std::to_string(swizzle);
  Buffer<uint32_t> source(random_bits(random, static_cast<size_t>(elements / 2)));
  Buffer<uint32_t> target(static_cast<size_t>(elements / 2));
  Buffer<uint32_t> out(static_cast<size_t>(bytes / 4));
  ptx::TensorMap from, to;
  require(ptx::encode_tensor_map<bf16>(&from, source.data(), size, stride, box, swizzle) == cudaSuccess &&
              ptx::encode_tensor_map<bf16>(&to, target.data(), size, stride, box, swizzle) == cudaSuccess,
          "tensor map refused");
  launch(name, tma_kernel<rank>, box_words * 4 + 16, from, to, corners, bytes, out.data());
  dump.line(name + "_load", "exact", out.words());
  dump.line(name + "_store", "exact", target.words());
}

void run_since_sm90(Dump& dump, Random& random) {
  Buffer<uint32_t> in(random_bits(random, 4 * threads)), out(4 * threads);
  launch("mbarrier", mbarrier_kernel, 4 * threads * 4 + 16, in.data(), out.data());
  dump.line("mbarrier", "exact", out.words());
  for (const int swizzle : {0, 32, 64, 128}) {
    run_tma<2>(dump, random, swizzle);
    run_tma<3>(dump, random, swizzle);
    run_tma<4>(dump, random, swizzle);
    run_tma<5>(dump, random, swizzle);
  }
}
#endif

#if CONFORMANCE_SM == 90
// --- wgmma ---

// d = a b twice over, of operands that fill shared memory at random: where an element lies is what is tested. Without
// `from_registers`, A is read from shared memory.
template <class T, int n, bool transpose_a, bool transpose_b, bool from_registers>
__global__ void wgmma_kernel(const uint32_t* in, int words, float* out) {
  PYEXT_SHARED(uint32_t, shared);
  for (int i = threadIdx.x; i < words; i += threads) shared[i] = in[i];
  ptx::fence_proxy_async();
  __syncthreads();
  // A: 64 rows of 128 bytes, or two atoms of eight k each; B after it.
  const uint64_t a = ptx::matrix_descriptor(shared, 1024);
  const uint64_t b = transpose_b ? ptx::matrix_descriptor(shared + 2048, (n + 63) / 64 * 1024, 1024)
                                 : ptx::matrix_descriptor(shared + 2048 + 8, 1024);
  uint32_t registers[4];
  for (int i = 0; i < 4; ++i) registers[i] = in[threadIdx.x * 4 + i];
  float d[n / 2];
  ptx::wgmma_fence();
  for (int i = 0; i < 2; ++i) {
    if constexpr (from_registers) {
      ptx::wgmma<T, transpose_b>(d, registers, b, i > 0);
    } else {
      ptx::wgmma<T, transpose_a, transpose_b>(d, a, b, i > 0);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_pin(d);
  for (int i = 0; i < n / 2; ++i) out[threadIdx.x * (n / 2) + i] = d[i];
}

template <class T, int n, bool transpose_a, bool transpose_b, bool from_registers>
void run_wgmma(Dump& dump, Random& random) {
  const std::string name = std::string("wgmma_") + (std::is_same<T, bf16>::value ? "bf16" : "f16") + "_n" +
                           std::to_string(n) + (transpose_a ? "_ta" : "") + (transpose_b ? "_tb" : "") +
                           (from_registers ? "_registers" : "");
  const int words = 2048 + (transpose_b ? 2 * ((n + 63) / 64) * 256 : n * 32);
  Buffer<uint32_t> in(random_pairs<T>(random, static_cast<size_t>(words)));
  Buffer<float> out(64 * n);
  launch(name, wgmma_kernel<T, n, transpose_a, transpose_b, from_registers>, static_cast<size_t>(words) * 4, in.data(),
         words, out.data());
  dump.line(name, "exact", out.words());
}

// Every width from shared memory and from registers, the formats and orders taken in turn.
template <int... i>
void run_widths(Dump& dump, Random& random, std::integer_sequence<int, i...>) {
  (run_wgmma<std::conditional_t<i % 2, bf16, f16>, 8 * (i + 1), i / 2 % 2, i / 4 % 2, false>(dump, random), ...);
  (run_wgmma<std::conditional_t<i % 2, f16, bf16>, 8 * (i + 1), false, i / 2 % 2, true>(dump, random), ...);
}
#endif

}  // namespace
}  // namespace pyext

extern "C" int simt_conformance(const char* path, uint64_t seed) {
  using namespace pyext;
  Dump dump(path);
  Random random(seed);
  run_everywhere(dump, random);
#if CONFORMANCE_SM >= 90
  run_since_sm90(dump, random);
#endif
#if CONFORMANCE_SM == 90
  run_widths(dump, random, std::make_integer_sequence<int, 32>());
#endif
  return 0;
}

#ifdef __CUDACC__
int main(int argc, char** argv) {
  pyext::require(argc == 3, "usage: conformance DUMP SEED");
  return simt_conformance(argv[1], std::strtoull(argv[2], nullptr, 10));
}
#endif
