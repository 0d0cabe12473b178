// The kernels for AVX-512 (F, BW, DQ, VL); the compiler flags are in CMakeLists.txt.
#define PYEXT_KERNELS kernels_avx512
#define PYEXT_KERNELS_NAME "avx512"
#include "kernels.inc"
