// The kernels for AVX2 + FMA + F16C; the compiler flags are in CMakeLists.txt.
#define PYEXT_KERNELS kernels_avx2
#define PYEXT_KERNELS_NAME "avx2"
#include "kernels.inc"
