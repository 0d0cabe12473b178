// Runs the kernels of every instruction set on random odd shapes under AddressSanitizer and UBSan, without Python or
// torch:  sanitize [cases of each op] [seed].  `.ci/run` builds it by CMake with -DPYEXT_SANITIZE=ON.
//
// Besides what the sanitizers see: every buffer ends, or begins, at a page that may not be touched (compilers do not
// instrument masked vector loads and stores); gaps between rows hold NaN and must stay as they are, as must the inputs;
// results start as NaN and must all be written; one thread and several give the same bits; instruction sets agree.
#include <sanitizer/common_interface_defs.h>

#include <cstdlib>

#include "instance.h"

// Fresh memory, the kernels' scratch included, holds NaN.
extern "C" __attribute__((visibility("default"))) const char* __asan_default_options() {
  return "max_malloc_fill_size=268435456:malloc_fill_byte=255";
}

int main(int argc, char** argv) {
  using namespace pyext;
  __sanitizer_set_death_callback(
      [] { std::fprintf(stderr, "FAILED %s [%s]\n", context().text.c_str(), context().isa.c_str()); });
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200;
  Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  const std::pair<const char*, void (*)(Random&)> ops[] = {
      {"attention", attention_case},       {"glu", glu_case},
      {"moe_dispatch", moe_dispatch_case}, {"moe_experts", moe_experts_case},
      {"moe_route", moe_route_case},       {"rotary", rotary_case}};
  for (const auto& [name, run] : ops) {
    for (int i = 0; i < cases; ++i) {
      context().text = std::string(name) + " case " + std::to_string(i) + ": ";
      run(random);
    }
    std::printf("%d %s cases passed, forward and backward, on", cases, name);
    for (const KernelTable* const* table = compiled_kernels(); *table; ++table) {
      std::printf(" %s%s", (*table)->name, cpu_can_run((*table)->name) ? "" : " (not: this CPU cannot)");
    }
    std::printf("\n");
  }
  return 0;
}
