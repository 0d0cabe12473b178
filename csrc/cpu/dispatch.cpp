// Chooses, once and at run time, which instruction-set build of the kernels serves this process.
#include <atomic>
#include <cstring>

#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pyext {
namespace {

struct Features {
  bool avx2 = false, fma = false, f16c = false, avx512 = false, avx512_bf16 = false;
};

Features detect() {
  Features found;
#if defined(__x86_64__)
  __builtin_cpu_init();  // what it reports also holds for the operating system, which must save the wide registers
  found.avx2 = __builtin_cpu_supports("avx2");
  found.fma = __builtin_cpu_supports("fma");
  found.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512cd") &&
                 __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                 __builtin_cpu_supports("avx512vl");
  found.avx512_bf16 = found.avx512 && __builtin_cpu_supports("avx512bf16");
  unsigned eax, ebx, ecx, edx;  // GCC knows the name "f16c" only since version 11
  found.f16c = found.avx2 && __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
#endif
  return found;
}

const Features& features() {
  static const Features found = detect();
  return found;
}

const KernelTable* best_usable() {
  const KernelTable* best = nullptr;
  for (const KernelTable* const* table = compiled_kernels(); *table; ++table) {
    if (cpu_can_run((*table)->name)) best = *table;
  }
  return best;
}

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table{best_usable()};
  return table;
}

}  // namespace

const KernelTable* const* compiled_kernels() {
  static const KernelTable* const tables[] = {
#ifdef PYEXT_HAVE_AVX2
      &kernels_avx2,
#endif
#ifdef PYEXT_HAVE_AVX512
      &kernels_avx512,
#endif
#ifdef PYEXT_HAVE_AVX512_BF16
      &kernels_avx512_bf16,
#endif
      nullptr};
  return tables;
}

bool cpu_can_run(const char* name) {
  const Features& has = features();
  const bool avx2 = has.avx2 && has.fma && has.f16c;
  if (std::strcmp(name, "avx2") == 0) return avx2;
  if (std::strcmp(name, "avx512") == 0) return avx2 && has.avx512;
  return std::strcmp(name, "avx512_bf16") == 0 && avx2 && has.avx512_bf16;
}

const KernelTable* active_kernels() { return active().load(std::memory_order_relaxed); }

bool set_active_kernels(const char* name) {
  if (std::strcmp(name, "none") == 0) {
    active() = nullptr;
    return true;
  }
  for (const KernelTable* const* table = compiled_kernels(); *table; ++table) {
    if (std::strcmp((*table)->name, name) == 0 && cpu_can_run(name)) {
      active() = *table;
      return true;
    }
  }
  return false;
}

const char* const* cpu_features() {
  struct Names {
    const char* list[6] = {};
    Names() {
      const Features& has = features();
      int n = 0;
      if (has.avx2) list[n++] = "avx2";
      if (has.fma) list[n++] = "fma";
      if (has.f16c) list[n++] = "f16c";
      if (has.avx512) list[n++] = "avx512";
      if (has.avx512_bf16) list[n++] = "avx512_bf16";
    }
  };
  static const Names names;
  return names.list;
}

}  // namespace pyext
