// The function table that every instruction-set build exports, and the choice between the tables at run time.
//
// The kernels are written once (cpu/*.inc) and compiled once per instruction set (cpu/isa_<name>.cpp). Each of these
// translation units exports one KernelTable and nothing else: a shared inline function compiled with AVX-512 could be
// the copy that the linker keeps for everybody, and an older machine would die of it. For the same reason this header
// holds declarations only.
#pragma once

namespace pyext {

struct AttentionProblem;  // csrc/attention.h
struct GluProblem;        // csrc/glu.h
struct DispatchProblem;   // csrc/moe_dispatch.h
struct CombineProblem;    // csrc/moe_dispatch.h
struct ExpertsProblem;    // csrc/moe_experts.h
struct RouteProblem;      // csrc/moe_route.h
struct RotaryProblem;     // csrc/rotary.h
struct Parallel;          // csrc/parallel.h

// The arithmetic whose peak rate KernelTable::peak_flops measures.
enum PeakType : int { kPeakFp32 = 0, kPeakBf16 = 1, kPeakFp64 = 2 };

struct KernelTable {
  const char* name;  // "avx2", "avx512", "avx512_bf16"
  void (*attention_forward)(const AttentionProblem&, const Parallel&);
  void (*attention_backward)(const AttentionProblem&, const Parallel&);
  void (*glu_forward)(const GluProblem&, const Parallel&);
  void (*glu_backward)(const GluProblem&, const Parallel&);
  void (*moe_dispatch_forward)(const DispatchProblem&, const Parallel&);
  void (*moe_combine_forward)(const CombineProblem&, const Parallel&);
  void (*moe_combine_backward)(const CombineProblem&, const Parallel&);
  void (*moe_experts_forward)(const ExpertsProblem&, const Parallel&);
  void (*moe_experts_backward)(const ExpertsProblem&, const Parallel&);
  void (*moe_route_forward)(const RouteProblem&, const Parallel&);
  void (*moe_route_backward)(const RouteProblem&, const Parallel&);
  void (*rotary_forward)(const RotaryProblem&, const Parallel&);
  void (*rotary_backward)(const RotaryProblem&, const Parallel&);
  // Floating-point operations per second of the calling thread in a loop of independent multiply-adds that touches
  // registers only (cpu/peak.inc), measured over about `seconds`.
  double (*peak_flops)(int peak_type, double seconds);
};

// Each is defined in cpu/isa_<name>.cpp, if the build compiled that file.
extern const KernelTable kernels_avx2;
extern const KernelTable kernels_avx512;
extern const KernelTable kernels_avx512_bf16;

// The tables in this build, slowest first, ended by nullptr. Empty where the build has no kernels (not x86-64).
const KernelTable* const* compiled_kernels();

// Whether this processor and operating system can run the table of that name.
bool cpu_can_run(const char* name);

// The table in use: the best usable one, until set_active_kernels names another. nullptr if there is none.
const KernelTable* active_kernels();

// Makes the table of that name the active one; "none" stands for no table. Returns false, and changes nothing, if the
// build does not have it or the processor cannot run it. Meant for tests, not to be called while kernels run.
bool set_active_kernels(const char* name);

// Names of the instruction-set extensions found, out of those that matter to the kernels; ended by nullptr.
const char* const* cpu_features();

}  // namespace pyext
