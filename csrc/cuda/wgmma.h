// wgmma (sm_90a): a warpgroup multiplies a 64 x 16 tile of A by a 16 x N tile of B, N = 8, 16, ... 256. Part of ptx.h,
// which includes it; here because every width is an instruction with registers of its own.
//
// Thread t of the warpgroup holds N / 2 numbers of the product: d[i] is row 16 (t / 32) + t % 32 / 4 + 8 (i % 4 / 2),
// column 8 (i / 4) + 2 (t % 4) + i % 2. A comes from shared memory, or from registers in the layout of ptx::mma.
#pragma once
#include "ptx.h"

namespace pyext {
namespace ptx {

// An operand in shared memory whose rows of 128 bytes are swizzled as TMA does, in tiles aligned to 1024 bytes.
// K-major (64 numbers of k to a row): stride = bytes from 8 rows to the next 8 rows; leading is not used.
// Transposed (64 rows of the operand side by side): stride = bytes from 8 of k to the next 8, leading = bytes from 64
// rows to the next 64.
PYEXT_DEVICE uint64_t matrix_descriptor(const void* tile, uint32_t stride, uint32_t leading = 16) {
  return static_cast<uint64_t>(shared_address(tile) >> 4 & 0x3FFF) | static_cast<uint64_t>(leading >> 4) << 16 |
         static_cast<uint64_t>(stride >> 4) << 32 | UINT64_C(1) << 62;
}

// Before the first wgmma, and before the next one after registers of A or d were touched.
PYEXT_DEVICE void wgmma_fence() {
  PYEXT_PTX(asm volatile("wgmma.fence.sync.aligned;" :: : "memory"), simt::wgmma_fence());
}
PYEXT_DEVICE void wgmma_commit() {
  PYEXT_PTX(asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"), simt::wgmma_commit());
}
// Until at most `remaining` committed groups are under way; before it, their d must not be touched.
template <int remaining>
PYEXT_DEVICE void wgmma_wait() {
  PYEXT_PTX(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(remaining) : "memory"), simt::wgmma_wait(remaining));
}

// Keeps the compiler from moving what reads d above the wait before this, or what writes it below.
template <int count>
PYEXT_DEVICE void wgmma_pin(float (&d)[count]) {
#pragma unroll
  for (int i = 0; i < count; ++i) PYEXT_PTX(asm volatile("" : "+f"(d[i])::"memory"), static_cast<void>(d));
}

// The same of a left operand in registers: what makes it stays above the fence after this.
template <int count>
PYEXT_DEVICE void wgmma_pin(uint32_t (&a)[count][4]) {
#pragma unroll
  for (int i = 0; i < 4 * count; ++i)
    PYEXT_PTX(asm volatile("" : "+r"(a[i / 4][i % 4])::"memory"), static_cast<void>(a));
}

#ifdef __CUDACC__
#define PYEXT_R4 "%0, %1, %2, %3"
#define PYEXT_D4 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define PYEXT_R8 PYEXT_R4 ", %4, %5, %6, %7"
#define PYEXT_D8 PYEXT_D4, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define PYEXT_R12 PYEXT_R8 ", %8, %9, %10, %11"
#define PYEXT_D12 PYEXT_D8, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define PYEXT_R16 PYEXT_R12 ", %12, %13, %14, %15"
#define PYEXT_D16 PYEXT_D12, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define PYEXT_R20 PYEXT_R16 ", %16, %17, %18, %19"
#define PYEXT_D20 PYEXT_D16, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define PYEXT_R24 PYEXT_R20 ", %20, %21, %22, %23"
#define PYEXT_D24 PYEXT_D20, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define PYEXT_R28 PYEXT_R24 ", %24, %25, %26, %27"
#define PYEXT_D28 PYEXT_D24, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define PYEXT_R32 PYEXT_R28 ", %28, %29, %30, %31"
#define PYEXT_D32 PYEXT_D28, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define PYEXT_R36 PYEXT_R32 ", %32, %33, %34, %35"
#define PYEXT_D36 PYEXT_D32, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define PYEXT_R40 PYEXT_R36 ", %36, %37, %38, %39"
#define PYEXT_D40 PYEXT_D36, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define PYEXT_R44 PYEXT_R40 ", %40, %41, %42, %43"
#define PYEXT_D44 PYEXT_D40, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define PYEXT_R48 PYEXT_R44 ", %44, %45, %46, %47"
#define PYEXT_D48 PYEXT_D44, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define PYEXT_R52 PYEXT_R48 ", %48, %49, %50, %51"
#define PYEXT_D52 PYEXT_D48, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define PYEXT_R56 PYEXT_R52 ", %52, %53, %54, %55"
#define PYEXT_D56 PYEXT_D52, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define PYEXT_R60 PYEXT_R56 ", %56, %57, %58, %59"
#define PYEXT_D60 PYEXT_D56, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define PYEXT_R64 PYEXT_R60 ", %60, %61, %62, %63"
#define PYEXT_D64 PYEXT_D60, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define PYEXT_R68 PYEXT_R64 ", %64, %65, %66, %67"
#define PYEXT_D68 PYEXT_D64, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define PYEXT_R72 PYEXT_R68 ", %68, %69, %70, %71"
#define PYEXT_D72 PYEXT_D68, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define PYEXT_R76 PYEXT_R72 ", %72, %73, %74, %75"
#define PYEXT_D76 PYEXT_D72, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define PYEXT_R80 PYEXT_R76 ", %76, %77, %78, %79"
#define PYEXT_D80 PYEXT_D76, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define PYEXT_R84 PYEXT_R80 ", %80, %81, %82, %83"
#define PYEXT_D84 PYEXT_D80, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define PYEXT_R88 PYEXT_R84 ", %84, %85, %86, %87"
#define PYEXT_D88 PYEXT_D84, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define PYEXT_R92 PYEXT_R88 ", %88, %89, %90, %91"
#define PYEXT_D92 PYEXT_D88, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define PYEXT_R96 PYEXT_R92 ", %92, %93, %94, %95"
#define PYEXT_D96 PYEXT_D92, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define PYEXT_R100 PYEXT_R96 ", %96, %97, %98, %99"
#define PYEXT_D100 PYEXT_D96, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define PYEXT_R104 PYEXT_R100 ", %100, %101, %102, %103"
#define PYEXT_D104 PYEXT_D100, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define PYEXT_R108 PYEXT_R104 ", %104, %105, %106, %107"
#define PYEXT_D108 PYEXT_D104, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define PYEXT_R112 PYEXT_R108 ", %108, %109, %110, %111"
#define PYEXT_D112 PYEXT_D108, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define PYEXT_R116 PYEXT_R112 ", %112, %113, %114, %115"
#define PYEXT_D116 PYEXT_D112, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define PYEXT_R120 PYEXT_R116 ", %116, %117, %118, %119"
#define PYEXT_D120 PYEXT_D116, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define PYEXT_R124 PYEXT_R120 ", %120, %121, %122, %123"
#define PYEXT_D124 PYEXT_D120, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define PYEXT_R128 PYEXT_R124 ", %124, %125, %126, %127"
#define PYEXT_D128 PYEXT_D124, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

// The numbers are those of the operands after the accumulator's.
#define PYEXT_WGMMA_TEXT(N, format, a, b, accumulate, rest)                                           \
  "{\n"                                                                                               \
  ".reg .pred p;\n"                                                                                   \
  "setp.ne.b32 p, " accumulate                                                                        \
  ", 0;\n"                                                                                            \
  "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." format "." format " " a ", " b ", p, 1, 1, " rest \
  ";\n"                                                                                               \
  "}"
#define PYEXT_WGMMA(N, R, o0, o1, o2, o3, o4, o5, o6)                                                                 \
  template <class T, bool transpose_a = false, bool transpose_b = false>                                              \
  PYEXT_DEVICE void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {                                   \
    const int add = accumulate;                                                                                       \
    if constexpr (std::is_same<T, bf16>::value) {                                                                     \
      asm volatile(PYEXT_WGMMA_TEXT(N, "bf16", "{" PYEXT_R##R "}, %" #o0, "%" #o1, "%" #o2, "%" #o3 ", %" #o4)        \
                   : PYEXT_D##R                                                                                       \
                   : "l"(a), "l"(b), "r"(add), "n"(transpose_a), "n"(transpose_b));                                   \
    } else {                                                                                                          \
      asm volatile(PYEXT_WGMMA_TEXT(N, "f16", "{" PYEXT_R##R "}, %" #o0, "%" #o1, "%" #o2, "%" #o3 ", %" #o4)         \
                   : PYEXT_D##R                                                                                       \
                   : "l"(a), "l"(b), "r"(add), "n"(transpose_a), "n"(transpose_b));                                   \
    }                                                                                                                 \
  }                                                                                                                   \
  template <class T, bool transpose_b = false>                                                                        \
  PYEXT_DEVICE void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {                       \
    const int add = accumulate;                                                                                       \
    if constexpr (std::is_same<T, bf16>::value) {                                                                     \
      asm volatile(PYEXT_WGMMA_TEXT(N, "bf16", "{" PYEXT_R##R "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}", "%" #o4, \
                                    "%" #o5, "%" #o6)                                                                 \
                   : PYEXT_D##R                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(transpose_b));                 \
    } else {                                                                                                          \
      asm volatile(PYEXT_WGMMA_TEXT(N, "f16", "{" PYEXT_R##R "}, {%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}", "%" #o4,  \
                                    "%" #o5, "%" #o6)                                                                 \
                   : PYEXT_D##R                                                                                       \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(transpose_b));                 \
    }                                                                                                                 \
  }
PYEXT_WGMMA(8, 4, 4, 5, 6, 7, 8, 9, 10)
PYEXT_WGMMA(16, 8, 8, 9, 10, 11, 12, 13, 14)
PYEXT_WGMMA(24, 12, 12, 13, 14, 15, 16, 17, 18)
PYEXT_WGMMA(32, 16, 16, 17, 18, 19, 20, 21, 22)
PYEXT_WGMMA(40, 20, 20, 21, 22, 23, 24, 25, 26)
PYEXT_WGMMA(48, 24, 24, 25, 26, 27, 28, 29, 30)
PYEXT_WGMMA(56, 28, 28, 29, 30, 31, 32, 33, 34)
PYEXT_WGMMA(64, 32, 32, 33, 34, 35, 36, 37, 38)
PYEXT_WGMMA(72, 36, 36, 37, 38, 39, 40, 41, 42)
PYEXT_WGMMA(80, 40, 40, 41, 42, 43, 44, 45, 46)
PYEXT_WGMMA(88, 44, 44, 45, 46, 47, 48, 49, 50)
PYEXT_WGMMA(96, 48, 48, 49, 50, 51, 52, 53, 54)
PYEXT_WGMMA(104, 52, 52, 53, 54, 55, 56, 57, 58)
PYEXT_WGMMA(112, 56, 56, 57, 58, 59, 60, 61, 62)
PYEXT_WGMMA(120, 60, 60, 61, 62, 63, 64, 65, 66)
PYEXT_WGMMA(128, 64, 64, 65, 66, 67, 68, 69, 70)
PYEXT_WGMMA(136, 68, 68, 69, 70, 71, 72, 73, 74)
PYEXT_WGMMA(144, 72, 72, 73, 74, 75, 76, 77, 78)
PYEXT_WGMMA(152, 76, 76, 77, 78, 79, 80, 81, 82)
PYEXT_WGMMA(160, 80, 80, 81, 82, 83, 84, 85, 86)
PYEXT_WGMMA(168, 84, 84, 85, 86, 87, 88, 89, 90)
PYEXT_WGMMA(176, 88, 88, 89, 90, 91, 92, 93, 94)
PYEXT_WGMMA(184, 92, 92, 93, 94, 95, 96, 97, 98)
PYEXT_WGMMA(192, 96, 96, 97, 98, 99, 100, 101, 102)
PYEXT_WGMMA(200, 100, 100, 101, 102, 103, 104, 105, 106)
PYEXT_WGMMA(208, 104, 104, 105, 106, 107, 108, 109, 110)
PYEXT_WGMMA(216, 108, 108, 109, 110, 111, 112, 113, 114)
PYEXT_WGMMA(224, 112, 112, 113, 114, 115, 116, 117, 118)
PYEXT_WGMMA(232, 116, 116, 117, 118, 119, 120, 121, 122)
PYEXT_WGMMA(240, 120, 120, 121, 122, 123, 124, 125, 126)
PYEXT_WGMMA(248, 124, 124, 125, 126, 127, 128, 129, 130)
PYEXT_WGMMA(256, 128, 128, 129, 130, 131, 132, 133, 134)
#undef PYEXT_WGMMA
#undef PYEXT_WGMMA_TEXT
#else
template <class T, bool transpose_a = false, bool transpose_b = false, int R>
PYEXT_DEVICE void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  simt::wgmma(d, 2 * R, nullptr, a, b, accumulate, transpose_a, transpose_b, std::is_same<T, bf16>::value);
}
template <class T, bool transpose_b = false, int R>
PYEXT_DEVICE void wgmma(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  simt::wgmma(d, 2 * R, a, 0, b, accumulate, false, transpose_b, std::is_same<T, bf16>::value);
}
#endif

}  // namespace ptx
}  // namespace pyext
