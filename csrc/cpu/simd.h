// The vector layer: float and double vectors of the widest kind the translation unit is compiled for.
// Everything has internal linkage, so that code built for one instruction set can never be linked into another.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../strided.h"

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))  // between its parameters and its body
#define UNROLL _Pragma("GCC unroll 16")

namespace pyext {
namespace {

constexpr double kLn2 = 0.69314718055994530942;

template <class T>
INLINE T min_of(T a, T b) {
  return a < b ? a : b;
}
template <class T>
INLINE T max_of(T a, T b) {
  return a > b ? a : b;
}
INLINE constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
INLINE constexpr int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

template <class T>
struct Vector;

#if defined(__AVX512F__)
template <>
struct Vector<float> {
  using type = __m512;
  static constexpr int width = 16;
};
template <>
struct Vector<double> {
  using type = __m512d;
  static constexpr int width = 8;
};
using F = __m512;
using D = __m512d;

INLINE F vload(const float* p) { return _mm512_loadu_ps(p); }
INLINE D vload(const double* p) { return _mm512_loadu_pd(p); }
INLINE void vstore(float* p, F v) { _mm512_storeu_ps(p, v); }
INLINE void vstore(double* p, D v) { _mm512_storeu_pd(p, v); }
// Past the caches; p is aligned to what is written.
INLINE void vstream(float* p, F v) { _mm512_stream_ps(p, v); }
INLINE void vstream(double* p, D v) { _mm512_stream_pd(p, v); }
INLINE F vset(float x) { return _mm512_set1_ps(x); }
INLINE D vset(double x) { return _mm512_set1_pd(x); }
INLINE F vfma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
INLINE D vfma(D a, D b, D c) { return _mm512_fmadd_pd(a, b, c); }
INLINE F vfms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
INLINE D vfms(D a, D b, D c) { return _mm512_fmsub_pd(a, b, c); }
INLINE F vmul(F a, F b) { return _mm512_mul_ps(a, b); }
INLINE D vmul(D a, D b) { return _mm512_mul_pd(a, b); }
INLINE F vadd(F a, F b) { return _mm512_add_ps(a, b); }
INLINE D vadd(D a, D b) { return _mm512_add_pd(a, b); }
INLINE F vsub(F a, F b) { return _mm512_sub_ps(a, b); }
INLINE D vsub(D a, D b) { return _mm512_sub_pd(a, b); }
INLINE F vdiv(F a, F b) { return _mm512_div_ps(a, b); }
INLINE D vdiv(D a, D b) { return _mm512_div_pd(a, b); }
// 1 / x to about one ulp, in a quarter of a division's time; x is NaN or in [1, 2^100].
INLINE F vreciprocal(F x) {
  const F near = _mm512_rcp14_ps(x);
  return vfma(near, _mm512_fnmadd_ps(x, near, _mm512_set1_ps(1)), near);
}
INLINE D vreciprocal(D x) { return vdiv(_mm512_set1_pd(1), x); }
INLINE F vmax(F a, F b) { return _mm512_max_ps(a, b); }
INLINE D vmax(D a, D b) { return _mm512_max_pd(a, b); }
INLINE F vmin(F a, F b) { return _mm512_min_ps(a, b); }
INLINE D vmin(D a, D b) { return _mm512_min_pd(a, b); }
// Neighbours exchanged: lanes 1, 0, 3, 2, ...
INLINE F vswap(F v) { return _mm512_permute_ps(v, 0xB1); }
INLINE D vswap(D v) { return _mm512_permute_pd(v, 0x55); }
// a b - c in even lanes, a b + c in odd ones.
INLINE F vfmaddsub(F a, F b, F c) { return _mm512_fmaddsub_ps(a, b, c); }
INLINE D vfmaddsub(D a, D b, D c) { return _mm512_fmaddsub_pd(a, b, c); }
// Half as many values as there are lanes, each of them twice.
INLINE F vload_twice(const float* p) {
  const __m512i lane = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
  return _mm512_permutexvar_ps(lane, _mm512_castps256_ps512(_mm256_loadu_ps(p)));
}
INLINE D vload_twice(const double* p) {
  return _mm512_permutexvar_pd(_mm512_set_epi64(3, 3, 2, 2, 1, 1, 0, 0), _mm512_castpd256_pd512(_mm256_loadu_pd(p)));
}
INLINE float reduce_max(F v) { return _mm512_reduce_max_ps(v); }
INLINE double reduce_max(D v) { return _mm512_reduce_max_pd(v); }
INLINE float reduce_add(F v) { return _mm512_reduce_add_ps(v); }
INLINE double reduce_add(D v) { return _mm512_reduce_add_pd(v); }
// The sums of four vectors side by side.
INLINE __m128 reduce_add4(F a, F b, F c, F d) {
  const F ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b),
          cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  const F lanes = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xEE);
  const __m256 half = _mm512_castps512_ps256(lanes) + _mm512_extractf32x8_ps(lanes, 1);
  return _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1);
}
INLINE __m256d reduce_add4(D a, D b, D c, D d) {
  return _mm256_setr_pd(reduce_add(a), reduce_add(b), reduce_add(c), reduce_add(d));
}

// A set of lanes; lanes(lo, hi) holds those with lo <= lane < hi, for any lo and hi.
using Lanes = __mmask16;
template <class T>
INLINE Lanes lanes(int64_t lo, int64_t hi) {
  constexpr int64_t w = Vector<T>::width;
  unsigned below_hi = (1u << max_of<int64_t>(0, min_of(hi, w))) - 1;
  unsigned below_lo = (1u << max_of<int64_t>(0, min_of(lo, w))) - 1;
  return Lanes(below_hi & ~below_lo);
}
INLINE F select(Lanes m, F yes, F no) { return _mm512_mask_blend_ps(m, no, yes); }
INLINE D select(Lanes m, D yes, D no) { return _mm512_mask_blend_pd(__mmask8(m), no, yes); }
INLINE Lanes nonzero_bytes(const uint8_t* p, float) {
  return _mm_test_epi8_mask(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8(-1));
}
INLINE Lanes nonzero_bytes(const uint8_t* p, double) {
  return _mm_test_epi8_mask(_mm_loadl_epi64((const __m128i*)p), _mm_set1_epi8(-1));
}
// Lane l is in the set if bit l is set.
template <class T>
INLINE Lanes lanes_of(uint32_t bits) {
  return Lanes(bits);
}
// Bit l is set if lane l is in the set.
template <class T>
INLINE uint32_t bits_of_lanes(Lanes m) {
  return m;
}
// Lanes whose number has this bit (a power of two) set.
template <class T>
INLINE Lanes lanes_with_bit(int bit) {
  return bit == 8 ? 0xFF00 : bit == 4 ? 0xF0F0 : bit == 2 ? 0xCCCC : 0xAAAA;
}
// Lanes where p equals x.
INLINE Lanes equal(const int32_t* p, int32_t x, float) {
  return _mm512_cmpeq_epi32_mask(_mm512_loadu_si512(p), _mm512_set1_epi32(x));
}
INLINE Lanes equal(const int32_t* p, int32_t x, double) {
  return _mm512_cmpeq_epi32_mask(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p)), _mm512_set1_epi32(x));
}
// Lane l is p[at[l]]; the numbers at[0], at[1], ... rise by at most one.
INLINE F load_near(const float* p, const int32_t* at) {
  __m512i lane = _mm512_sub_epi32(_mm512_loadu_si512(at), _mm512_set1_epi32(at[0]));
  return _mm512_permutexvar_ps(lane, vload(p + at[0]));
}
INLINE D load_near(const double* p, const int32_t* at) {
  __m256i lane = _mm256_sub_epi32(_mm256_loadu_si256((const __m256i*)at), _mm256_set1_epi32(at[0]));
  return _mm512_permutexvar_pd(_mm512_cvtepi32_epi64(lane), vload(p + at[0]));
}
INLINE Lanes less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
INLINE Lanes less(D a, D b) { return _mm512_cmp_pd_mask(a, b, _CMP_LT_OQ); }
INLINE Lanes less_equal(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LE_OQ); }
INLINE Lanes less_equal(D a, D b) { return _mm512_cmp_pd_mask(a, b, _CMP_LE_OQ); }

INLINE F load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
INLINE F load_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
using Halves = __m256i;  // as many numbers of 16 bits as F has lanes
INLINE void store_halves(uint16_t* p, Halves v) { _mm256_storeu_si256((__m256i*)p, v); }
INLINE void stream_halves(uint16_t* p, Halves v) { _mm256_stream_si256((__m256i*)p, v); }
INLINE Halves f16_of(F v) { return _mm512_cvtps_ph(v, 0); }
INLINE Halves bf16_of(F v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  // Round to nearest even on the bits; NaN keeps its top half with the quiet bit set.
  __m512i x = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(x, _mm512_add_epi32(_mm512_set1_epi32(0x7fff), odd));
  __m512i quiet = _mm512_or_si512(x, _mm512_set1_epi32(0x400000));
  rounded = _mm512_mask_blend_epi32(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), rounded, quiet);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
#endif
}

using U = __m512i;  // lanes of uint32
INLINE U uset(uint32_t x) { return _mm512_set1_epi32(int(x)); }
INLINE U uiota() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
INLINE U uadd(U a, U b) { return _mm512_add_epi32(a, b); }
INLINE U uxor(U a, U b) { return _mm512_xor_si512(a, b); }

// The lanes of a and then of b, taken apart: first those of even number, then those of odd number; and back.
INLINE void take_apart(F a, F b, F& even, F& odd) {
  const U at = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(a, at, b), odd = _mm512_permutex2var_ps(a, uadd(at, uset(1)), b);
}
INLINE void take_apart(D a, D b, D& even, D& odd) {
  const U at = _mm512_setr_epi64(0, 2, 4, 6, 8, 10, 12, 14), one = _mm512_set1_epi64(1);
  even = _mm512_permutex2var_pd(a, at, b), odd = _mm512_permutex2var_pd(a, _mm512_add_epi64(at, one), b);
}
INLINE void put_together(F even, F odd, F& a, F& b) {
  const U at = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  a = _mm512_permutex2var_ps(even, at, odd), b = _mm512_permutex2var_ps(even, uadd(at, uset(8)), odd);
}
INLINE void put_together(D even, D odd, D& a, D& b) {
  const U at = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), four = _mm512_set1_epi64(4);
  a = _mm512_permutex2var_pd(even, at, odd), b = _mm512_permutex2var_pd(even, _mm512_add_epi64(at, four), odd);
}
// Lanes of 32 bits as two numbers of 16 bits; and back.
INLINE U load_words(const char* p) { return _mm512_loadu_si512(p); }
INLINE void store_words(char* p, U v) { _mm512_storeu_si512(p, v); }
INLINE void stream_words(char* p, U v) { _mm512_stream_si512((__m512i*)p, v); }  // past the caches; p is aligned
INLINE F bf16_of_low(U v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
INLINE F bf16_of_high(U v) { return _mm512_castsi512_ps(_mm512_and_si512(v, uset(0xFFFF0000u))); }
INLINE F f16_of_low(U v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)); }
INLINE F f16_of_high(U v) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16))); }
INLINE U words_of(const uint16_t* low, const uint16_t* high) {
  const U a = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)low));
  const U b = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)high));
  return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}

INLINE F vround(F x) { return _mm512_roundscale_ps(x, 8); }
INLINE F vscale(F p, F n) { return _mm512_scalef_ps(p, n); }  // p * 2^n, right down to zero
// 2^x to 7.5e-5, enough for a bf16 result.
INLINE F vexp2_coarse(F x) {
  F r = _mm512_reduce_ps(x, 0), n = vsub(x, r);
  F p = vfma(vset(5.517166907e-02f), r, vset(2.426111222e-01f));
  p = vfma(p, r, vset(6.932609855e-01f));
  p = vfma(p, r, vset(9.999280735e-01f));
  return vscale(p, n);
}

INLINE void umul_wide(U a, uint32_t b, U& hi, U& lo) {
  U even = _mm512_mul_epu32(a, uset(b)), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), uset(b));
  lo = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
  hi = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
}
INLINE void ustore(uint32_t* p, U v) { _mm512_storeu_si512(p, v); }

#else  // AVX2 + FMA + F16C

template <>
struct Vector<float> {
  using type = __m256;
  static constexpr int width = 8;
};
template <>
struct Vector<double> {
  using type = __m256d;
  static constexpr int width = 4;
};
using F = __m256;
using D = __m256d;

INLINE F vload(const float* p) { return _mm256_loadu_ps(p); }
INLINE D vload(const double* p) { return _mm256_loadu_pd(p); }
INLINE void vstore(float* p, F v) { _mm256_storeu_ps(p, v); }
INLINE void vstore(double* p, D v) { _mm256_storeu_pd(p, v); }
INLINE void vstream(float* p, F v) { _mm256_stream_ps(p, v); }
INLINE void vstream(double* p, D v) { _mm256_stream_pd(p, v); }
INLINE F vset(float x) { return _mm256_set1_ps(x); }
INLINE D vset(double x) { return _mm256_set1_pd(x); }
INLINE F vfma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
INLINE D vfma(D a, D b, D c) { return _mm256_fmadd_pd(a, b, c); }
INLINE F vfms(F a, F b, F c) { return _mm256_fmsub_ps(a, b, c); }
INLINE D vfms(D a, D b, D c) { return _mm256_fmsub_pd(a, b, c); }
INLINE F vmul(F a, F b) { return _mm256_mul_ps(a, b); }
INLINE D vmul(D a, D b) { return _mm256_mul_pd(a, b); }
INLINE F vadd(F a, F b) { return _mm256_add_ps(a, b); }
INLINE D vadd(D a, D b) { return _mm256_add_pd(a, b); }
INLINE F vsub(F a, F b) { return _mm256_sub_ps(a, b); }
INLINE D vsub(D a, D b) { return _mm256_sub_pd(a, b); }
INLINE F vdiv(F a, F b) { return _mm256_div_ps(a, b); }
INLINE D vdiv(D a, D b) { return _mm256_div_pd(a, b); }
INLINE F vreciprocal(F x) { return vdiv(_mm256_set1_ps(1), x); }  // the guess has 12 bits, too few for one step
INLINE D vreciprocal(D x) { return vdiv(_mm256_set1_pd(1), x); }
INLINE F vmax(F a, F b) { return _mm256_max_ps(a, b); }
INLINE D vmax(D a, D b) { return _mm256_max_pd(a, b); }
INLINE F vmin(F a, F b) { return _mm256_min_ps(a, b); }
INLINE D vmin(D a, D b) { return _mm256_min_pd(a, b); }
INLINE F vswap(F v) { return _mm256_permute_ps(v, 0xB1); }
INLINE D vswap(D v) { return _mm256_permute_pd(v, 0x5); }
INLINE F vfmaddsub(F a, F b, F c) { return _mm256_fmaddsub_ps(a, b, c); }
INLINE D vfmaddsub(D a, D b, D c) { return _mm256_fmaddsub_pd(a, b, c); }
INLINE F vload_twice(const float* p) {
  const __m256 half = _mm256_castps128_ps256(_mm_loadu_ps(p));
  return _mm256_permutevar8x32_ps(half, _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0));
}
INLINE D vload_twice(const double* p) { return _mm256_permute4x64_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p)), 0x50); }
INLINE float reduce_max(F v) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
INLINE float reduce_add(F v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
INLINE double reduce_max(D v) {
  __m128d x = _mm_max_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(x, _mm_unpackhi_pd(x, x)));
}
INLINE double reduce_add(D v) {
  __m128d x = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(x, _mm_unpackhi_pd(x, x)));
}
INLINE __m128 reduce_add4(F a, F b, F c, F d) {
  const F ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b),
          cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  const F lanes = _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xEE);
  return _mm256_castps256_ps128(lanes) + _mm256_extractf128_ps(lanes, 1);
}
INLINE __m256d reduce_add4(D a, D b, D c, D d) {
  return _mm256_setr_pd(reduce_add(a), reduce_add(b), reduce_add(c), reduce_add(d));
}

using Lanes = __m256i;  // all ones or all zeros, in lanes as wide as the data's
template <class T>
INLINE Lanes lanes(int64_t lo, int64_t hi) {
  constexpr int64_t w = Vector<T>::width;
  lo = max_of<int64_t>(-1, min_of(lo, w)), hi = max_of<int64_t>(-1, min_of(hi, w));
  if constexpr (sizeof(T) == 4) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(int(lo)), lane),
                               _mm256_cmpgt_epi32(_mm256_set1_epi32(int(hi)), lane));
  } else {
    __m256i lane = _mm256_setr_epi64x(0, 1, 2, 3);
    return _mm256_andnot_si256(_mm256_cmpgt_epi64(_mm256_set1_epi64x(lo), lane),
                               _mm256_cmpgt_epi64(_mm256_set1_epi64x(hi), lane));
  }
}
INLINE F select(Lanes m, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(m)); }
INLINE D select(Lanes m, D yes, D no) { return _mm256_blendv_pd(no, yes, _mm256_castsi256_pd(m)); }
INLINE Lanes nonzero_bytes(const uint8_t* p, float) {
  return _mm256_cmpgt_epi32(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_setzero_si256());
}
INLINE Lanes nonzero_bytes(const uint8_t* p, double) {
  int32_t four;
  memcpy(&four, p, 4);
  return _mm256_cmpgt_epi64(_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four)), _mm256_setzero_si256());
}
template <class T>
INLINE Lanes lanes_of(uint32_t bits) {
  __m256i bit =
      sizeof(T) == 4 ? _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128) : _mm256_setr_epi32(1, 1, 2, 2, 4, 4, 8, 8);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), bit), bit);
}
template <class T>
INLINE uint32_t bits_of_lanes(Lanes m) {
  return uint32_t(sizeof(T) == 4 ? _mm256_movemask_ps(_mm256_castsi256_ps(m))
                                 : _mm256_movemask_pd(_mm256_castsi256_pd(m)));
}
template <class T>
INLINE Lanes lanes_with_bit(int bit) {
  __m256i lane = sizeof(T) == 4 ? _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7) : _mm256_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3);
  return _mm256_cmpgt_epi32(_mm256_and_si256(lane, _mm256_set1_epi32(bit)), _mm256_setzero_si256());
}
INLINE Lanes equal(const int32_t* p, int32_t x, float) {
  return _mm256_cmpeq_epi32(_mm256_loadu_si256((const __m256i*)p), _mm256_set1_epi32(x));
}
INLINE Lanes equal(const int32_t* p, int32_t x, double) {
  return _mm256_cvtepi32_epi64(_mm_cmpeq_epi32(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi32(x)));
}
INLINE F load_near(const float* p, const int32_t* at) {
  __m256i lane = _mm256_sub_epi32(_mm256_loadu_si256((const __m256i*)at), _mm256_set1_epi32(at[0]));
  return _mm256_permutevar8x32_ps(vload(p + at[0]), lane);
}
INLINE D load_near(const double* p, const int32_t* at) {
  // A double is two floats: lanes 2n and 2n + 1.
  __m256i lane = _mm256_cvtepi32_epi64(_mm_sub_epi32(_mm_loadu_si128((const __m128i*)at), _mm_set1_epi32(at[0])));
  lane = _mm256_slli_epi64(lane, 1);
  lane = _mm256_or_si256(lane, _mm256_slli_epi64(_mm256_add_epi64(lane, _mm256_set1_epi64x(1)), 32));
  return _mm256_castps_pd(_mm256_permutevar8x32_ps(_mm256_castpd_ps(vload(p + at[0])), lane));
}
INLINE Lanes less(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
INLINE Lanes less(D a, D b) { return _mm256_castpd_si256(_mm256_cmp_pd(a, b, _CMP_LT_OQ)); }
INLINE Lanes less_equal(F a, F b) { return _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_LE_OQ)); }
INLINE Lanes less_equal(D a, D b) { return _mm256_castpd_si256(_mm256_cmp_pd(a, b, _CMP_LE_OQ)); }

INLINE F load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
INLINE F load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
using Halves = __m128i;
INLINE void store_halves(uint16_t* p, Halves v) { _mm_storeu_si128((__m128i*)p, v); }
INLINE void stream_halves(uint16_t* p, Halves v) { _mm_stream_si128((__m128i*)p, v); }
INLINE Halves f16_of(F v) { return _mm256_cvtps_ph(v, 0); }
INLINE Halves bf16_of(F v) {
  __m256i x = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(x, _mm256_add_epi32(_mm256_set1_epi32(0x7fff), odd));
  __m256i quiet = _mm256_or_si256(x, _mm256_set1_epi32(0x400000));
  rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
  rounded = _mm256_srli_epi32(rounded, 16);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xD8));
}

using U = __m256i;
INLINE U uset(uint32_t x) { return _mm256_set1_epi32(int(x)); }
INLINE U uiota() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
INLINE U uadd(U a, U b) { return _mm256_add_epi32(a, b); }
INLINE U uxor(U a, U b) { return _mm256_xor_si256(a, b); }

INLINE void take_apart(F a, F b, F& even, F& odd) {
  const D x = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0x88)), y = _mm256_castps_pd(_mm256_shuffle_ps(a, b, 0xDD));
  even = _mm256_castpd_ps(_mm256_permute4x64_pd(x, 0xD8)), odd = _mm256_castpd_ps(_mm256_permute4x64_pd(y, 0xD8));
}
INLINE void take_apart(D a, D b, D& even, D& odd) {
  even = _mm256_permute4x64_pd(_mm256_unpacklo_pd(a, b), 0xD8);
  odd = _mm256_permute4x64_pd(_mm256_unpackhi_pd(a, b), 0xD8);
}
INLINE void put_together(F even, F odd, F& a, F& b) {
  const F low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  a = _mm256_permute2f128_ps(low, high, 0x20), b = _mm256_permute2f128_ps(low, high, 0x31);
}
INLINE void put_together(D even, D odd, D& a, D& b) {
  const D low = _mm256_unpacklo_pd(even, odd), high = _mm256_unpackhi_pd(even, odd);
  a = _mm256_permute2f128_pd(low, high, 0x20), b = _mm256_permute2f128_pd(low, high, 0x31);
}
INLINE U load_words(const char* p) { return _mm256_loadu_si256((const __m256i*)p); }
INLINE void store_words(char* p, U v) { _mm256_storeu_si256((__m256i*)p, v); }
INLINE void stream_words(char* p, U v) { _mm256_stream_si256((__m256i*)p, v); }
INLINE F bf16_of_low(U v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
INLINE F bf16_of_high(U v) { return _mm256_castsi256_ps(_mm256_and_si256(v, uset(0xFFFF0000u))); }
INLINE F f16_of_words(U v) {  // below 2^16
  return _mm256_cvtph_ps(_mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(v, v), 0xD8)));
}
INLINE F f16_of_low(U v) { return f16_of_words(_mm256_and_si256(v, uset(0xFFFF))); }
INLINE F f16_of_high(U v) { return f16_of_words(_mm256_srli_epi32(v, 16)); }
INLINE U words_of(const uint16_t* low, const uint16_t* high) {
  const U a = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)low));
  const U b = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)high));
  return _mm256_or_si256(a, _mm256_slli_epi32(b, 16));
}

INLINE F vround(F x) { return _mm256_round_ps(x, 8); }
INLINE F vscale(F p, F n) {  // p * 2^n, flushed to zero below 2^-126; NaN passes through
  F tiny = _mm256_cmp_ps(n, vset(-126.f), _CMP_LT_OQ);
  __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(_mm256_max_ps(vset(-126.f), n)), 23);
  return _mm256_andnot_ps(tiny, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), exponent)));
}

INLINE void umul_wide(U a, uint32_t b, U& hi, U& lo) {
  U even = _mm256_mul_epu32(a, uset(b)), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), uset(b));
  lo = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
  hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}
INLINE void ustore(uint32_t* p, U v) { _mm256_storeu_si256((__m256i*)p, v); }
#endif

constexpr int64_t kWordsBytes = sizeof(U);

// Any function of one number, lane by lane.
template <class Function>
INLINE D by_lane(D x, const Function& function) {
  double lane[Vector<double>::width];
  vstore(lane, x);
  for (double& value : lane) value = function(value);
  return vload(lane);
}

// e^x to fp32 rounding: x log2(e) is reduced by one fused operation, then 2^r by a minimax polynomial (2e-9), exactly 1
// at 0.
INLINE F vexp(F x) {
  const F log2e = vset(1.44269504f);
  x = vmax(vset(-200.f), x);  // e^-inf without inf - inf; NaN passes through
  F n = vround(vmul(x, log2e)), r = vfms(x, log2e, n);
  F p = vfma(vset(1.546144470e-4f), r, vset(1.340042818e-3f));
  p = vfma(p, r, vset(9.618056652e-3f));
  p = vfma(p, r, vset(5.550327227e-2f));
  p = vfma(p, r, vset(2.402265092e-1f));
  p = vfma(p, r, vset(6.931472067e-1f));
  p = vfma(p, r, vset(1.f));
  return vscale(p, n);
}
INLINE D vexp(D x) {
  return by_lane(x, [](double y) { return __builtin_exp(y); });
}

// tanh: odd polynomial near 0 (no cancellation), 1 - 2 / (e^2x + 1) elsewhere.
INLINE F vtanh(F x) {
  F z = vmul(x, x);
  F p = vfma(vset(-5.70498872745e-3f), z, vset(2.06390887954e-2f));
  p = vfma(p, z, vset(-5.37397155531e-2f));
  p = vfma(p, z, vset(1.33314422036e-1f));
  p = vfma(p, z, vset(-3.33332819422e-1f));
  F small = vfma(vmul(p, z), x, x);
  F clamped = vmin(vmax(x, vset(-10.f)), vset(10.f));
  F large = vsub(vset(1.f), vdiv(vset(2.f), vadd(vexp(vadd(clamped, clamped)), vset(1.f))));
  return select(less(z, vset(0.390625f)), small, large);
}
INLINE D vtanh(D x) {
  return by_lane(x, [](double y) { return __builtin_tanh(y); });
}

constexpr INLINE int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
INLINE const char* row_address(const Input& t, DType dtype, int64_t batch, int64_t head, int64_t row) {
  return (const char*)t.data + (batch * t.batch + head * t.head + row * t.row) * element_size(dtype);
}
INLINE char* row_address(const Output& t, DType dtype, int64_t batch, int64_t head, int64_t row) {
  return (char*)t.data + (batch * t.batch + head * t.head + row * t.row) * element_size(dtype);
}

// One vector of `dtype` elements, converted to the accumulator type.
INLINE F vload_as(DType dtype, const char* p, float) {
  if (dtype == DType::f32) return vload((const float*)p);
  return dtype == DType::bf16 ? load_bf16((const uint16_t*)p) : load_f16((const uint16_t*)p);
}
INLINE void store_bf16(uint16_t* p, F v) { store_halves(p, bf16_of(v)); }
INLINE Halves halves_of(DType dtype, F v) { return dtype == DType::bf16 ? bf16_of(v) : f16_of(v); }
INLINE void vstore_as(DType dtype, char* p, F v) {
  if (dtype == DType::f32) return vstore((float*)p, v);
  store_halves((uint16_t*)p, halves_of(dtype, v));
}
INLINE void vstore_as(DType, char* p, D v) { vstore((double*)p, v); }
INLINE void vstream_as(DType dtype, char* p, F v) {
  if (dtype == DType::f32) return vstream((float*)p, v);
  stream_halves((uint16_t*)p, halves_of(dtype, v));
}
INLINE void vstream_as(DType, char* p, D v) { vstream((double*)p, v); }
INLINE D vload_as(DType dtype, const char* p, double) {
  constexpr int w = Vector<double>::width;
  if (dtype == DType::f64) return vload((const double*)p);
  // A narrower bias beside fp64 queries: rare, so lane by lane through the float conversions.
  char padded[64] = {};
  memcpy(padded, p, size_t(w * element_size(dtype)));
  float wide[Vector<float>::width];
  vstore(wide, vload_as(dtype, padded, 0.f));
  double lane[w];
  for (int i = 0; i < w; ++i) lane[i] = wide[i];
  return vload(lane);
}
// The first n < width elements, the rest zero: never touches memory past them.
template <class T>
INLINE typename Vector<T>::type vload_some(DType dtype, const char* p, int64_t n) {
  char padded[Vector<T>::width * 8] = {};
  memcpy(padded, p, size_t(n * element_size(dtype)));
  return vload_as(dtype, padded, T(0));
}
template <class T>
INLINE void vstore_some(DType dtype, char* p, int64_t n, typename Vector<T>::type v) {
  char padded[Vector<T>::width * 8];
  vstore_as(dtype, padded, v);
  memcpy(p, padded, size_t(n * element_size(dtype)));
}

// Pairs of neighbours, as many as a vector has lanes, converted: the first of each pair and the second.
INLINE void vload_pairs(DType dtype, const char* p, F& first, F& second) {
  if (dtype == DType::f32)
    return take_apart(vload((const float*)p), vload((const float*)p + Vector<float>::width), first, second);
  const U words = load_words(p);
  first = dtype == DType::bf16 ? bf16_of_low(words) : f16_of_low(words);
  second = dtype == DType::bf16 ? bf16_of_high(words) : f16_of_high(words);
}
INLINE void vload_pairs(DType, const char* p, D& first, D& second) {
  take_apart(vload((const double*)p), vload((const double*)p + Vector<double>::width), first, second);
}
INLINE void vstore_pairs(DType dtype, char* p, F first, F second) {
  if (dtype == DType::f32) {
    F a, b;
    put_together(first, second, a, b);
    vstore((float*)p, a), vstore((float*)p + Vector<float>::width, b);
  } else {
    uint16_t low[Vector<float>::width], high[Vector<float>::width];
    vstore_as(dtype, (char*)low, first), vstore_as(dtype, (char*)high, second);
    store_words(p, words_of(low, high));
  }
}
INLINE void vstore_pairs(DType, char* p, D first, D second) {
  D a, b;
  put_together(first, second, a, b);
  vstore((double*)p, a), vstore((double*)p + Vector<double>::width, b);
}

}  // namespace
}  // namespace pyext
