// What metal.h and the bodies on it use of the Metal Shading Language, for a C++ compiler, on the fibers of fibers.h.
//
// Address spaces become nothing. Half precision vectors are rounded after every operation, as on a GPU.
#pragma once
#include "fibers.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

// Gone, so that a text which uses one of these words as a name does not compile.
#define device
#define constant
#define threadgroup
#define thread
#define kernel
#define vertex
#define fragment

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef _Float16 half;
typedef half float16_t;

template <typename T, typename S>
static inline T as_type(S x) {
  static_assert(sizeof(T) == sizeof(S), "as_type keeps the size");
  T y;
  memcpy((void*)&y, (const void*)&x, sizeof y);
  return y;
}

struct alignas(8) uint2 {
  uint x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct uint3 {
  uint x, y, z;
  uint3(int a, int b, int c) : x((uint)a), y((uint)b), z((uint)c) {}
};
struct alignas(16) uint4 {
  uint x, y, z, w;
};
struct half2 {
  half x, y;
  half2() = default;
  half2(half a, half b) : x(a), y(b) {}
};
static inline half2 operator+(half2 a, half2 b) { return half2((half)((float)a.x + (float)b.x), (half)((float)a.y + (float)b.y)); }
static inline half2 operator-(half2 a, half2 b) { return half2((half)((float)a.x - (float)b.x), (half)((float)a.y - (float)b.y)); }
static inline half2 operator*(half2 a, half2 b) { return half2((half)((float)a.x * (float)b.x), (half)((float)a.y * (float)b.y)); }

struct bfloat16_t {
  uint16_t bits;
  bfloat16_t() = default;
  explicit bfloat16_t(float x) {
    const uint y = as_type<uint>(x);
    bits = x != x ? 0x7fc0 : (uint16_t)((y + 0x7fffu + (y >> 16 & 1u)) >> 16);
  }
  explicit operator float() const { return as_type<float>((uint)bits << 16); }
};

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

// Barriers that do not order what the kernels share would not do.
#define threadgroup_barrier(flags) \
  ((flags) == mem_flags::mem_threadgroup ? kvq_host_barrier(__LINE__) : kvq_host_fail("barriers must order shared memory"))
#define simdgroup_barrier(flags) \
  ((flags) == mem_flags::mem_threadgroup ? kvq_host_warp_barrier(__LINE__) : kvq_host_fail("barriers must order shared memory"))

namespace metal {

static inline float fabs(float x) { return ::fabsf(x); }
static inline float fmax(float x, float y) { return ::fmaxf(x, y); }
static inline float fmin(float x, float y) { return ::fminf(x, y); }
static inline int min(int x, int y) { return x < y ? x : y; }
static inline int max(int x, int y) { return x > y ? x : y; }
static inline float fma(float x, float y, float z) { return ::fmaf(x, y, z); }

// Rounded once: the sum in float64, made odd in float32 where inexact, so that the second rounding knows.
static inline half fma(half x, half y, half z) {
  const double sum = (double)(float)x * (float)y + (float)z;
  float near = (float)sum;
  if (::fabs(sum) < 1.0e30 && (double)near != sum) {
    const uint bits = as_type<uint>(near);
    near = as_type<float>((::fabs((double)near) > ::fabs(sum) ? bits - 1 : bits) | 1u);
  }
  return (half)near;
}
static inline half2 min(half2 x, half2 y) { return half2(y.x < x.x ? y.x : x.x, y.y < x.y ? y.y : x.y); }
static inline half2 fma(half2 x, half2 y, half2 z) { return half2(fma(x.x, y.x, z.x), fma(x.y, y.y, z.y)); }

namespace fast {
static inline float exp2(float x) {
  const float y = ::exp2f(x);
  return y < 0x1p-126f ? 0.0f : y;
}
static inline float log2(float x) { return ::log2f(x); }
}  // namespace fast
namespace precise {
static inline float rsqrt(float x) { return 1.0f / ::sqrtf(x); }
static inline float sqrt(float x) { return ::sqrtf(x); }
static inline float tanh(float x) { return ::tanhf(x); }
}  // namespace precise

static inline uint simd_shuffle(uint x, ushort lane, int line = __builtin_LINE()) { return kvq_host_shuffle(x, lane, line); }
static inline float simd_shuffle(float x, ushort lane, int line = __builtin_LINE()) {
  return as_type<float>(kvq_host_shuffle(as_type<uint>(x), lane, line));
}
template <typename T>
static inline T simd_shuffle_xor(T x, ushort mask, int line = __builtin_LINE()) {
  return simd_shuffle(x, (ushort)(kvq_host_thread() % 32 ^ mask), line);
}
static inline bool simd_any(bool x, int line = __builtin_LINE()) { return kvq_host_ballot(x, line) != 0; }
struct simd_vote {
  typedef ulong vote_t;
  vote_t votes;
  explicit operator vote_t() const { return votes; }
};
static inline simd_vote simd_ballot(bool x, int line = __builtin_LINE()) { return simd_vote{kvq_host_ballot(x, line)}; }

template <typename T>
struct simdgroup_matrix_8x8 {
  struct Elements {
    T data[2];
    T& operator[](int i) { return data[i]; }
    const T& operator[](int i) const { return data[i]; }
  } elements;
  Elements& thread_elements() { return elements; }
  const Elements& thread_elements() const { return elements; }
};
typedef simdgroup_matrix_8x8<half> simdgroup_half8x8;
typedef simdgroup_matrix_8x8<float> simdgroup_float8x8;

static inline void simdgroup_multiply_accumulate(simdgroup_float8x8& d, simdgroup_half8x8 a, simdgroup_half8x8 b,
                                                 simdgroup_float8x8 c, int line = __builtin_LINE()) {
  const float left[2] = {(float)a.elements[0], (float)a.elements[1]};
  const float right[2] = {(float)b.elements[0], (float)b.elements[1]};
  kvq_host_mma8(d.elements.data, left, right, c.elements.data, line);
}

}  // namespace metal
using namespace metal;
