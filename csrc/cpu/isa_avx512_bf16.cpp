// The kernels for AVX-512 with BF16 dot products; the compiler flags are in CMakeLists.txt.
#define PYEXT_KERNELS kernels_avx512_bf16
#define PYEXT_KERNELS_NAME "avx512_bf16"
#include "kernels.inc"
