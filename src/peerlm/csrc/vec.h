// Vectors of LANES floats by the compilers' vector extensions: one source for every SIMD target.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define PEERLM_INLINE static inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef double vd __attribute__((vector_size(4 * LANES)));                // LANES / 2 doubles
typedef float vf_half __attribute__((vector_size(2 * LANES)));            // LANES / 2 floats
typedef uint16_t vu16 __attribute__((vector_size(2 * LANES)));
typedef int8_t vi8 __attribute__((vector_size(LANES)));
typedef uint8_t vu8 __attribute__((vector_size(LANES)));

struct bf16 {
  uint16_t bits;
};

struct fp8 {  // e4m3fn; its one NaN is read as 480, for rows that are none have scales that are none
  uint8_t bits;
};

PEERLM_INLINE vf splat(float value) { return value - vf{}; }  // + 0 would cost an instruction, for it changes -0

// Two numbers of -8 .. 7 with 8 added. Groups of 32 have a scale: their byte i has number i in its low half and number
// 16 + i in its high half.
struct int4 {
  uint8_t bits;
};
constexpr int64_t INT4_GROUP = 32, INT4_BYTES = 16;

template <class Vector>
PEERLM_INLINE Vector load_as(const void* from) {
  Vector out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

PEERLM_INLINE vf load(const float* from) { return load_as<vf>(from); }
#if defined(__AVX512F__)
PEERLM_INLINE vf load(const bf16* from) {
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(from)), 16);
}
PEERLM_INLINE vf load(const int8_t* from) {
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_as<__m128i>(from)));
}
// As half precision, whose exponents are 8 higher: sign, four of five bits of exponent, fraction.
PEERLM_INLINE vf load(const fp8* from) {
  const __m256i half = _mm256_slli_epi16(_mm256_cvtepi8_epi16(load_as<__m128i>(from)), 7);
  return 256.0f * (vf)_mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16((int16_t)0xBF80)));
}
#elif defined(__AVX2__)
PEERLM_INLINE vf load(const bf16* from) {
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_as<__m128i>(from)), 16);
}
PEERLM_INLINE vf load(const int8_t* from) {
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(load_as<int64_t>(from))));
}
PEERLM_INLINE vf load(const fp8* from) {
  const __m128i half = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_cvtsi64_si128(load_as<int64_t>(from))), 7);
  return 256.0f * (vf)_mm256_cvtph_ps(_mm_and_si128(half, _mm_set1_epi16((int16_t)0xBF80)));
}
#else
PEERLM_INLINE vf load(const bf16* from) { return (vf)(__builtin_convertvector(load_as<vu16>(from), vu) << 16); }
PEERLM_INLINE vf load(const int8_t* from) { return __builtin_convertvector(load_as<vi8>(from), vf); }
PEERLM_INLINE vf load(const fp8* from) {
  const vu bits = __builtin_convertvector(load_as<vu8>(from), vu), magnitude = bits & 0x7F;
  const vf normal = (vf)((magnitude << 20) + (120u << 23)), subnormal = __builtin_convertvector((vi)magnitude, vf) * 0x1p-9f;
  return (vf)((vu)(magnitude >= 8 ? normal : subnormal) | (bits & 0x80) << 24);
}
#endif

// Numbers piece * LANES and following of a group of INT4_GROUP.
PEERLM_INLINE vf load_piece(const int4* group, int piece) {
  constexpr int HALF = 16 / LANES;
  const int4* from = group + piece % HALF * LANES;
#if defined(__AVX512F__)
  const vu bytes = (vu)_mm512_cvtepu8_epi32(load_as<__m128i>(from));
#elif defined(__AVX2__)
  const vu bytes = (vu)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(load_as<int64_t>(from)));
#else
  const vu bytes = __builtin_convertvector(load_as<vu8>(from), vu);
#endif
  return __builtin_convertvector((vi)(piece < HALF ? bytes & 15u : bytes >> 4) - 8, vf);
}

// LANES / 2 floats as doubles.
PEERLM_INLINE vd widen(const float* from) {
#if defined(__AVX512F__)
  return (vd)_mm512_cvtps_pd(load_as<__m256>(from));  // GCC's own conversion is in two halves
#else
  return __builtin_convertvector(load_as<vf_half>(from), vd);
#endif
}

PEERLM_INLINE void store(float* to, vf value) { std::memcpy(to, &value, sizeof value); }

PEERLM_INLINE float to_float(float value) { return value; }
PEERLM_INLINE float to_float(int8_t value) { return value; }
PEERLM_INLINE float to_float(fp8 value) {
  const uint32_t magnitude = value.bits & 0x7Fu, normal = (magnitude << 20) + (120u << 23);
  float out;
  std::memcpy(&out, &normal, 4);
  if (magnitude < 8) out = (float)magnitude * 0x1p-9f;
  return value.bits & 0x80 ? -out : out;
}
PEERLM_INLINE float to_float(bf16 value) {
  const uint32_t bits = (uint32_t)value.bits << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// The nearest bfloat16, ties to even; NaN stays NaN.
PEERLM_INLINE bf16 to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  if (value != value) return {(uint16_t)((bits >> 16) | 0x40)};
  return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

// The first `count` < LANES elements, the others 0.
template <class Row>
PEERLM_INLINE vf load_first(const Row* from, int64_t count) {
  float out[LANES] = {};
  for (int64_t i = 0; i < count; ++i) out[i] = to_float(from[i]);
  return load(out);
}

PEERLM_INLINE void store_first(float* to, vf value, int64_t count) { std::memcpy(to, &value, 4 * count); }

PEERLM_INLINE float sum(vf v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float lanes[LANES];
  store(lanes, v);
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
#endif
}

PEERLM_INLINE double sum(vd v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_pd((__m512d)v);
#else
  double lanes[LANES / 2];
  std::memcpy(lanes, &v, sizeof v);
  for (int step = LANES / 4; step; step /= 2)
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  return lanes[0];
#endif
}

#if defined(__clang__)
PEERLM_INLINE vf sums(vf* rows) {
  vf out = {};
  for (int i = 0; i < LANES; ++i) out[i] = sum(rows[i]);
  return out;
}
#else
// Two vectors whose halves of blocks of 2 * HALF lanes are summed become one. Half of the lanes stay where they are: that
// is a blend, which has more units than a permutation.
template <int HALF>
PEERLM_INLINE vf halves(vf a, vf b) {
  vi here = {}, there = {};
  for (int i = 0; i < LANES; ++i) {
    const bool first = i % (2 * HALF) < HALF;
    here[i] = first ? i : LANES + i;
    there[i] = first ? i + HALF : LANES + i - HALF;
  }
  return __builtin_shuffle(a, b, here) + __builtin_shuffle(a, b, there);
}

// Element i is the sum of vector i of LANES.
PEERLM_INLINE vf sums(vf* rows) {
#pragma GCC unroll 8
  for (int i = 0; i < LANES / 2; ++i) rows[i] = halves<LANES / 2>(rows[i], rows[i + LANES / 2]);
#pragma GCC unroll 8
  for (int i = 0; i < LANES / 4; ++i) rows[i] = halves<LANES / 4>(rows[i], rows[i + LANES / 4]);
  if (LANES >= 8) {
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 8; ++i) rows[i] = halves<(LANES >= 8 ? LANES / 8 : 1)>(rows[i], rows[i + LANES / 8]);
  }
  if (LANES >= 16) rows[0] = halves<1>(rows[0], rows[1]);
  return rows[0];
}
#endif

PEERLM_INLINE vf max(vf a, vf b) { return a > b ? a : b; }

PEERLM_INLINE vf sqrt(vf v) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_sqrt_ps((__mmask16)-1, (__m512)v);
#elif defined(__AVX2__)
  return (vf)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < LANES; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// Bit i is set where a[i] >= b[i].
PEERLM_INLINE uint32_t at_least(vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ);
#elif defined(__AVX2__)
  return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GE_OQ));
#else
  const vi mask = a >= b;
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= (uint32_t)(mask[i] & 1) << i;
  return bits;
#endif
}

// e^x to a relative 1e-7, for x in -87 .. 88; clamped above, 0 below, NaN stays NaN.
PEERLM_INLINE vf exp(vf x) {
  const vi vanishes = x < -87.0f;
  x = x > 88.0f ? splat(88.0f) : x;
  x = vanishes ? splat(-87.0f) : x;
  const vf shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number in the low bits
  const vf n = shifted - 12582912.0f;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  // least squares on |r| <= ln 2 / 2
  vf p = 1.395060015e-3f * r + 8.368953725e-3f;
  p = p * r + 4.166620417e-2f;
  p = p * r + 1.666651830e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const vf value = p * (vf)(((vi)shifted << 23) + (127 << 23));
  return vanishes ? splat(0.0f) : value;
}

// An activation and its derivative at once.
struct Activated {
  vf value, slope;
};

PEERLM_INLINE Activated gelu(vf z) {
  // Phi(-t) = exp(-t^2 / 2) * (polynomial in 1 / (1 + 0.3 t)) for t >= 0, relative error 6e-8 up to t = 14.
  const vf t = z < 0.0f ? -z : z;
  const vf bell = exp(t * t * -0.5f);
  const vf u = 1.0f / (1.0f + 0.3f * t);
  vf p = 0.038378410f * u - 0.169166669f;
  p = p * u + 0.228661165f;
  p = p * u - 0.0765076354f;
  p = p * u + 0.142536268f;
  p = p * u + 0.0946832374f;
  p = p * u + 0.121920407f;
  p = p * u + 0.119487680f;
  p = p * u + 7.16930076e-6f;
  const vf tail = bell * p;
  const vf phi = z < 0.0f ? tail : 1.0f - tail;
  return {z * phi, phi + z * bell * 0.398942280f};
}

// Hendrycks and Gimpel's approximation, z sigmoid(2 sqrt(2 / pi) (z + 0.044715 z^3)), as GPT-2 and Gemma have it.
PEERLM_INLINE Activated gelu_tanh(vf z) {
  const vf square = z * z;
  const vf odds = exp(z * (square * -0.0713548163f - 1.59576912f));
  const vf sigmoid = 1.0f / (1.0f + odds);
  const vf rise = square * 0.214064449f + 1.59576912f;
  return {z * sigmoid, sigmoid * (1.0f + z * (odds * sigmoid) * rise)};  // 1 - sigmoid would cancel
}

PEERLM_INLINE Activated relu(vf z) {
  const vf zero = splat(0.0f);
  return {z < 0.0f ? zero : z, z > 0.0f ? splat(1.0f) : zero};
}

PEERLM_INLINE Activated silu(vf z) {
  const vf odds = exp(-z);
  const vf sigmoid = 1.0f / (1.0f + odds);
  return {z * sigmoid, sigmoid * (1.0f + z * (odds * sigmoid))};  // 1 - sigmoid would cancel
}

}  // namespace
