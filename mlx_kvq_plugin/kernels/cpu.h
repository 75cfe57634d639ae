// Prelude of the CPU, for tests: the names of cuda.h for a C++ compiler, on the fibers of tests/fibers.h.
//
// Numbers are rounded where a GPU rounds them. KVQ_METAL_LAYOUT distributes matrices over lanes as Metal does, so that
// a body which holds only with CUDA's distribution gives wrong results.
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef unsigned char kvq_byte;
typedef unsigned int kvq_uint;
typedef long long kvq_long;
typedef _Float16 kvq_half;
struct kvq_bfloat {
  unsigned short bits;
};

#define KVQ_FUNC static inline
#define KVQ_DEVICE
#define KVQ_GROUP_MEMORY
#define KVQ_PRIVATE
#define KVQ_SHARED_ARRAY(type, name, count) alignas(16) static type name[count]; kvq_host_shared(name, sizeof(name), #name)

#define KVQ_THREAD kvq_host_thread()
#define KVQ_LANE (kvq_host_thread() & 31)
#define KVQ_WARP (kvq_host_thread() >> 5)
#define KVQ_GROUP_X kvq_host_group(0)
#define KVQ_GROUP_Y kvq_host_group(1)
#define KVQ_GROUP_Z kvq_host_group(2)
#define KVQ_BARRIER() kvq_host_barrier(__LINE__)
#define KVQ_WARP_BARRIER() kvq_host_warp_barrier(__LINE__)

#define KVQ_UNROLL
#define KVQ_NO_UNROLL
#define KVQ_UNROLL4
#define KVQ_UNROLL8
#define KVQ_INFINITY __builtin_inff()

KVQ_FUNC kvq_uint kvq_float_bits(float x) { kvq_uint y; memcpy(&y, &x, 4); return y; }
KVQ_FUNC float kvq_bits_float(kvq_uint x) { float y; memcpy(&y, &x, 4); return y; }
KVQ_FUNC kvq_uint kvq_half_bits(kvq_half x) { uint16_t y; memcpy(&y, &x, 2); return y; }
KVQ_FUNC kvq_half kvq_bits_half(kvq_uint x) { const uint16_t low = (uint16_t)x; kvq_half y; memcpy(&y, &low, 2); return y; }
KVQ_FUNC float kvq_flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.0f, x) : x; }

KVQ_FUNC float kvq_exp2(float x) { return kvq_flushed(exp2f(x)); }
KVQ_FUNC float kvq_log2(float x) { return log2f(x); }
KVQ_FUNC float kvq_inverse(float x) { return 1.0f / x; }
KVQ_FUNC float kvq_rsqrt(float x) { return 1.0f / sqrtf(x); }
KVQ_FUNC float kvq_sqrt(float x) { return sqrtf(x); }
KVQ_FUNC float kvq_tanh(float x) { return tanhf(x); }
KVQ_FUNC float kvq_abs(float x) { return fabsf(x); }
KVQ_FUNC float kvq_max(float x, float y) { return fmaxf(x, y); }
KVQ_FUNC float kvq_least(float x, float y) { return fminf(x, y); }
KVQ_FUNC int kvq_min(int x, int y) { return x < y ? x : y; }
KVQ_FUNC float kvq_fma(float x, float y, float z) { return fmaf(x, y, z); }

// The last argument is the line of the call.
KVQ_FUNC float kvq_shuffle(float x, int lane, int line = __builtin_LINE()) {
  return kvq_bits_float(kvq_host_shuffle(kvq_float_bits(x), lane, line));
}
KVQ_FUNC float kvq_shuffle_xor(float x, int mask, int line = __builtin_LINE()) { return kvq_shuffle(x, KVQ_LANE ^ mask, line); }
KVQ_FUNC kvq_uint kvq_shuffle_uint(kvq_uint x, int lane, int line = __builtin_LINE()) { return kvq_host_shuffle(x, lane, line); }
KVQ_FUNC kvq_uint kvq_shuffle_xor_uint(kvq_uint x, int mask, int line = __builtin_LINE()) {
  return kvq_host_shuffle(x, KVQ_LANE ^ mask, line);
}
KVQ_FUNC bool kvq_any(bool x, int line = __builtin_LINE()) { return kvq_host_ballot(x, line) != 0; }
KVQ_FUNC kvq_uint kvq_ballot(bool x, int line = __builtin_LINE()) { return kvq_host_ballot(x, line); }

KVQ_FUNC kvq_uint kvq_pack_half2(float low, float high) { return kvq_half_bits((kvq_half)low) | kvq_half_bits((kvq_half)high) << 16; }
KVQ_FUNC float kvq_low_half(kvq_uint x) { return (float)kvq_bits_half(x); }
KVQ_FUNC float kvq_high_half(kvq_uint x) { return (float)kvq_bits_half(x >> 16); }
// Sums and products of half precision numbers, rounded to float32 first, round as if that had not been done.
KVQ_FUNC kvq_uint kvq_hadd2(kvq_uint x, kvq_uint y) {
  return kvq_pack_half2(kvq_low_half(x) + kvq_low_half(y), kvq_high_half(x) + kvq_high_half(y));
}
KVQ_FUNC kvq_uint kvq_hsub2(kvq_uint x, kvq_uint y) {
  return kvq_pack_half2(kvq_low_half(x) - kvq_low_half(y), kvq_high_half(x) - kvq_high_half(y));
}
KVQ_FUNC kvq_uint kvq_hmin2(kvq_uint x, kvq_uint y) {
  return kvq_pack_half2(kvq_least(kvq_low_half(x), kvq_low_half(y)), kvq_least(kvq_high_half(x), kvq_high_half(y)));
}
KVQ_FUNC kvq_uint kvq_hmul2(kvq_uint x, kvq_uint y) {
  return kvq_pack_half2(kvq_low_half(x) * kvq_low_half(y), kvq_high_half(x) * kvq_high_half(y));
}
// x y + z, rounded once. To float64 it is rounded only where that is far from a tie of half precision. That sum is made
// odd in float32 if inexact there, so that the second rounding sees on which side of a tie it lies.
KVQ_FUNC float kvq_half_fma(float x, float y, float z) {
  const double sum = (double)x * y + z;
  const float near = (float)sum;
  if (!(fabs(sum) < 1.0e30) || (double)near == sum) return near;
  const kvq_uint bits = kvq_float_bits(near);
  const bool away = fabs((double)near) > fabs(sum);
  return kvq_bits_float((away ? bits - 1 : bits) | 1u);
}
KVQ_FUNC kvq_uint kvq_hfma2(kvq_uint x, kvq_uint y, kvq_uint z) {
  return kvq_pack_half2(kvq_half_fma(kvq_low_half(x), kvq_low_half(y), kvq_low_half(z)),
                        kvq_half_fma(kvq_high_half(x), kvq_high_half(y), kvq_high_half(z)));
}

KVQ_FUNC kvq_uint kvq_low_halves(kvq_uint x, kvq_uint y) { return (x & 0xffffu) | y << 16; }
KVQ_FUNC kvq_uint kvq_high_halves(kvq_uint x, kvq_uint y) { return x >> 16 | (y & 0xffff0000u); }
KVQ_FUNC kvq_uint kvq_opaque(kvq_uint x) { return x; }
KVQ_FUNC kvq_uint kvq_flip(kvq_uint x, kvq_uint mask) { return x ^ mask; }
KVQ_FUNC kvq_uint kvq_not(kvq_uint x) { return ~x; }
// The high word of `high:low` shifted up by 1 to 31 bits.
KVQ_FUNC kvq_uint kvq_funnel(kvq_uint high, kvq_uint low, int bits) { return high << bits | low >> (32 - bits); }
KVQ_FUNC kvq_uint kvq_select(kvq_uint mask, kvq_uint x, kvq_uint y) { return (x & mask) | (y & ~mask); }

KVQ_FUNC kvq_uint kvq_permute(kvq_uint low, kvq_uint high, kvq_uint selector) {
  const uint64_t both = (uint64_t)high << 32 | low;
  kvq_uint z = 0;
  for (int i = 0; i < 4; i++) {
    const kvq_uint nibble = selector >> (4 * i) & 15, byte = (kvq_uint)(both >> (8 * (nibble & 7))) & 0xffu;
    z |= (nibble & 8 ? (byte & 0x80 ? 0xffu : 0u) : byte) << (8 * i);
  }
  return z;
}
KVQ_FUNC int kvq_round(float x) { return (int)nearbyintf(x); }

KVQ_FUNC kvq_bfloat kvq_to_bfloat(float x) {
  const kvq_uint bits = kvq_float_bits(x);
  if (x != x) return kvq_bfloat{(unsigned short)0x7fff};
  return kvq_bfloat{(unsigned short)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
KVQ_FUNC float kvq_to_float(float x) { return x; }
KVQ_FUNC float kvq_to_float(kvq_half x) { return (float)x; }
KVQ_FUNC float kvq_to_float(kvq_bfloat x) { return kvq_bits_float((kvq_uint)x.bits << 16); }
KVQ_FUNC float kvq_load_bfloat(const kvq_bfloat* p, kvq_long i) { return kvq_to_float(p[i]); }
KVQ_FUNC void kvq_store(float* p, kvq_long i, float x) { p[i] = x; }
KVQ_FUNC void kvq_store(kvq_half* p, kvq_long i, float x) { p[i] = (kvq_half)x; }
KVQ_FUNC void kvq_store(kvq_bfloat* p, kvq_long i, float x) { p[i] = kvq_to_bfloat(x); }

KVQ_FUNC kvq_uint kvq_load1(const kvq_byte* p) { return *p; }
KVQ_FUNC kvq_uint kvq_load2(const kvq_byte* p) { uint16_t x; memcpy(&x, kvq_host_aligned(p, 2), 2); return x; }
KVQ_FUNC kvq_uint kvq_load4(const kvq_byte* p) { kvq_uint x; memcpy(&x, kvq_host_aligned(p, 4), 4); return x; }
KVQ_FUNC void kvq_load_floats(const float* p, float& x, float& y) {
  kvq_host_aligned((const kvq_byte*)p, 8);
  x = p[0], y = p[1];
}
KVQ_FUNC void kvq_load8(const kvq_byte* p, KVQ_PRIVATE kvq_uint* w) { memcpy(w, kvq_host_aligned(p, 8), 8); }
KVQ_FUNC void kvq_load16(const kvq_byte* p, KVQ_PRIVATE kvq_uint* w) { memcpy(w, kvq_host_aligned(p, 16), 16); }

template <int N>
KVQ_FUNC void kvq_load_stored(const float* p, KVQ_PRIVATE float* x) {
  kvq_host_aligned((const kvq_byte*)p, N == 2 ? 8 : 16);
  for (int i = 0; i < N; i++) x[i] = p[i];
}
#define KVQ_FENCE() kvq_host_fence()
KVQ_FUNC kvq_uint kvq_arrive(const kvq_uint* counter) { return kvq_host_arrive(counter); }

#ifdef KVQ_METAL_LAYOUT
#define KVQ_ROW(lane) kvq_host_metal_row(lane)
#define KVQ_COL(lane) kvq_host_metal_col(lane)
#define KVQ_ROW_BIT(i) ((i) == 2 ? 16 : 2 << (i))
#else
#define KVQ_ROW(lane) ((lane) >> 2)
#define KVQ_COL(lane) ((lane) & 3)
#define KVQ_ROW_BIT(i) (4 << (i))
#endif

// The transpose of an 8 x 8 matrix of which a lane holds row KVQ_ROW, columns 2 KVQ_COL and + 1.
KVQ_FUNC kvq_uint kvq_transposed(kvq_uint x, int line) {
  const int row = KVQ_ROW(KVQ_LANE), col = KVQ_COL(KVQ_LANE);
#ifdef KVQ_METAL_LAYOUT
  const int near = kvq_host_metal_lane(2 * col, row / 2), far = kvq_host_metal_lane(2 * col + 1, row / 2);
#else
  const int near = 8 * col + row / 2, far = near + 4;
#endif
  const kvq_uint a = kvq_host_shuffle(x, near, line), b = kvq_host_shuffle(x, far, line);
  return row % 2 ? kvq_high_halves(a, b) : kvq_low_halves(a, b);
}
KVQ_FUNC void kvq_mma(float* c, kvq_uint a0, kvq_uint a1, kvq_uint a2, kvq_uint a3, kvq_uint b0, kvq_uint b1,
                      int line = __builtin_LINE()) {
  const kvq_uint a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
#ifdef KVQ_METAL_LAYOUT
  kvq_host_mma(c, a, b, true, line);
#else
  kvq_host_mma(c, a, b, false, line);
#endif
}
KVQ_FUNC void kvq_mma_bytes(int* c, kvq_uint a0, kvq_uint a1, kvq_uint a2, kvq_uint a3, kvq_uint b0, kvq_uint b1,
                            int line = __builtin_LINE()) {
  const kvq_uint a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  kvq_host_mma_bytes(c, a, b, line);
}
// All lanes must come even where nothing moves, as they must where something does; a vote orders no memory.
KVQ_FUNC kvq_uint kvq_to_b(kvq_uint transposed, int line = __builtin_LINE()) {
#ifdef KVQ_METAL_LAYOUT
  return kvq_transposed(transposed, line);
#else
  kvq_host_ballot(false, line);
  return transposed;
#endif
}
KVQ_FUNC kvq_uint kvq_rows_to_b(kvq_uint rows, int line = __builtin_LINE()) {
#ifdef KVQ_METAL_LAYOUT
  kvq_host_ballot(false, line);
  return rows;
#else
  return kvq_transposed(rows, line);
#endif
}
