// Prelude of Metal: the names of cuda.h in the Metal Shading Language 3.0, on what MLX puts before every kernel.
//
// Functions cannot ask which thread runs them, so `build.PROLOGUES` begins every body with variables for the macros
// below: KVQ_THREAD to KVQ_GROUP_Z, `kvq_to_b` and `kvq_rows_to_b` may stand in bodies only. Products are made of the
// 8 x 8 matrices of a SIMD group, of which a lane holds two neighbouring columns of a row; which, MLX's own kernels know.
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include <metal_stdlib>

typedef uchar kvq_byte;
typedef uint kvq_uint;
typedef bfloat16_t kvq_bfloat;
typedef half kvq_half;
typedef long kvq_long;

#define KVQ_FUNC inline __attribute__((always_inline))
#define KVQ_DEVICE device
#define KVQ_GROUP_MEMORY threadgroup
#define KVQ_PRIVATE thread
#define KVQ_SHARED_ARRAY(type, name, count) alignas(16) threadgroup type name[count]

#define KVQ_THREAD kvq_thread
#define KVQ_LANE kvq_lane
#define KVQ_WARP kvq_warp
#define KVQ_GROUP_X kvq_group_x
#define KVQ_GROUP_Y kvq_group_y
#define KVQ_GROUP_Z kvq_group_z
// Shared memory only: no thread reads what another one wrote to an array of the device.
#define KVQ_BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define KVQ_WARP_BARRIER() simdgroup_barrier(mem_flags::mem_threadgroup)

#define KVQ_UNROLL _Pragma("clang loop unroll(full)")
#define KVQ_NO_UNROLL _Pragma("clang loop unroll(disable)")
#define KVQ_UNROLL4 _Pragma("clang loop unroll_count(4)")
#define KVQ_UNROLL8 _Pragma("clang loop unroll_count(8)")
#define KVQ_INFINITY INFINITY

KVQ_FUNC float kvq_exp2(float x) { return metal::fast::exp2(x); }
KVQ_FUNC float kvq_log2(float x) { return metal::fast::log2(x); }
KVQ_FUNC float kvq_rsqrt(float x) { return metal::precise::rsqrt(x); }
KVQ_FUNC float kvq_sqrt(float x) { return metal::precise::sqrt(x); }
KVQ_FUNC float kvq_tanh(float x) { return metal::precise::tanh(x); }
KVQ_FUNC float kvq_abs(float x) { return metal::fabs(x); }
KVQ_FUNC float kvq_max(float x, float y) { return metal::fmax(x, y); }
KVQ_FUNC float kvq_least(float x, float y) { return metal::fmin(x, y); }
KVQ_FUNC int kvq_min(int x, int y) { return metal::min(x, y); }
KVQ_FUNC float kvq_fma(float x, float y, float z) { return metal::fma(x, y, z); }

KVQ_FUNC float kvq_shuffle_xor(float x, int mask) { return metal::simd_shuffle_xor(x, (ushort)mask); }
KVQ_FUNC float kvq_shuffle(float x, int lane) { return metal::simd_shuffle(x, (ushort)lane); }
KVQ_FUNC kvq_uint kvq_shuffle_xor_uint(kvq_uint x, int mask) { return metal::simd_shuffle_xor(x, (ushort)mask); }
KVQ_FUNC kvq_uint kvq_shuffle_uint(kvq_uint x, int lane) { return metal::simd_shuffle(x, (ushort)lane); }
KVQ_FUNC bool kvq_any(bool x) { return metal::simd_any(x); }
KVQ_FUNC kvq_uint kvq_ballot(bool x) { return (kvq_uint)(metal::simd_vote::vote_t)metal::simd_ballot(x); }

KVQ_FUNC kvq_uint kvq_pack_half2(float low, float high) { return as_type<kvq_uint>(half2((half)low, (half)high)); }
KVQ_FUNC float kvq_low_half(kvq_uint x) { return (float)as_type<half2>(x).x; }
KVQ_FUNC float kvq_high_half(kvq_uint x) { return (float)as_type<half2>(x).y; }
KVQ_FUNC kvq_uint kvq_hadd2(kvq_uint x, kvq_uint y) { return as_type<kvq_uint>(as_type<half2>(x) + as_type<half2>(y)); }
KVQ_FUNC kvq_uint kvq_hsub2(kvq_uint x, kvq_uint y) { return as_type<kvq_uint>(as_type<half2>(x) - as_type<half2>(y)); }
KVQ_FUNC kvq_uint kvq_hmin2(kvq_uint x, kvq_uint y) { return as_type<kvq_uint>(min(as_type<half2>(x), as_type<half2>(y))); }
KVQ_FUNC kvq_uint kvq_hmul2(kvq_uint x, kvq_uint y) { return as_type<kvq_uint>(as_type<half2>(x) * as_type<half2>(y)); }
KVQ_FUNC kvq_uint kvq_hfma2(kvq_uint x, kvq_uint y, kvq_uint z) {
  return as_type<kvq_uint>(metal::fma(as_type<half2>(x), as_type<half2>(y), as_type<half2>(z)));
}

KVQ_FUNC kvq_uint kvq_low_halves(kvq_uint x, kvq_uint y) { return (x & 0xffffu) | (y << 16); }
KVQ_FUNC kvq_uint kvq_high_halves(kvq_uint x, kvq_uint y) { return (x >> 16) | (y & 0xffff0000u); }
KVQ_FUNC kvq_uint kvq_opaque(kvq_uint x) { return x; }
KVQ_FUNC kvq_uint kvq_flip(kvq_uint x, kvq_uint mask) { return x ^ mask; }
KVQ_FUNC kvq_uint kvq_not(kvq_uint x) { return ~x; }
KVQ_FUNC kvq_uint kvq_funnel(kvq_uint high, kvq_uint low, int bits) { return (high << bits) | (low >> (32 - bits)); }
KVQ_FUNC kvq_uint kvq_select(kvq_uint mask, kvq_uint x, kvq_uint y) { return (x & mask) | (y & ~mask); }

KVQ_FUNC float kvq_load_bfloat(const device kvq_bfloat* p, kvq_long i) { return (float)p[i]; }
KVQ_FUNC kvq_bfloat kvq_to_bfloat(float x) { return (kvq_bfloat)x; }
KVQ_FUNC float kvq_to_float(float x) { return x; }
KVQ_FUNC float kvq_to_float(kvq_half x) { return (float)x; }
KVQ_FUNC float kvq_to_float(kvq_bfloat x) { return (float)x; }
KVQ_FUNC void kvq_store(device float* p, kvq_long i, float x) { p[i] = x; }
KVQ_FUNC void kvq_store(device kvq_half* p, kvq_long i, float x) { p[i] = (kvq_half)x; }
KVQ_FUNC void kvq_store(device kvq_bfloat* p, kvq_long i, float x) { p[i] = (kvq_bfloat)x; }

KVQ_FUNC kvq_uint kvq_load1(const device kvq_byte* p) { return *p; }
KVQ_FUNC kvq_uint kvq_load2(const device kvq_byte* p) { return *(const device ushort*)p; }
KVQ_FUNC kvq_uint kvq_load4(const device kvq_byte* p) { return *(const device kvq_uint*)p; }
KVQ_FUNC void kvq_load_floats(const device float* p, thread float& x, thread float& y) {
  const float2 both = *(const device float2*)p;
  x = both.x, y = both.y;
}
KVQ_FUNC void kvq_load8(const device kvq_byte* p, KVQ_PRIVATE kvq_uint* w) {
  const uint2 x = *(const device uint2*)p;
  w[0] = x.x, w[1] = x.y;
}
KVQ_FUNC void kvq_load16(const device kvq_byte* p, KVQ_PRIVATE kvq_uint* w) {
  const uint4 x = *(const device uint4*)p;
  w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
}

template <int N>
KVQ_FUNC void kvq_load_stored(KVQ_DEVICE const float* p, KVQ_PRIVATE float* x) {
  KVQ_UNROLL
  for (int i = 0; i < N; i++) x[i] = p[i];
}

#define KVQ_ROW(lane) ((((lane) >> 2) & 4) | (((lane) >> 1) & 3))
#define KVQ_COL(lane) ((((lane) >> 2) & 2) | ((lane) & 1))
#define KVQ_ROW_BIT(i) ((i) == 2 ? 16 : 2 << (i))
#define KVQ_LANE_OF(row, col) ((((row) & 4) << 2) | (((row) & 3) << 1) | (((col) & 2) << 2) | ((col) & 1))

KVQ_FUNC metal::simdgroup_half8x8 kvq_matrix(kvq_uint pair) {
  metal::simdgroup_half8x8 m;
  m.thread_elements()[0] = as_type<half2>(pair).x;
  m.thread_elements()[1] = as_type<half2>(pair).y;
  return m;
}
// c += a b for the 8 rows of c and a whose pairs of columns are `left` and `right`.
KVQ_FUNC void kvq_mma_rows(KVQ_PRIVATE float* c, kvq_uint left, kvq_uint right, kvq_uint b0, kvq_uint b1) {
  metal::simdgroup_float8x8 sum;
  sum.thread_elements()[0] = c[0];
  sum.thread_elements()[1] = c[1];
  metal::simdgroup_multiply_accumulate(sum, kvq_matrix(left), kvq_matrix(b0), sum);
  metal::simdgroup_multiply_accumulate(sum, kvq_matrix(right), kvq_matrix(b1), sum);
  c[0] = sum.thread_elements()[0];
  c[1] = sum.thread_elements()[1];
}
KVQ_FUNC void kvq_mma(KVQ_PRIVATE float* c, kvq_uint a0, kvq_uint a1, kvq_uint a2, kvq_uint a3, kvq_uint b0, kvq_uint b1) {
  kvq_mma_rows(c, a0, a2, b0, b1);
  kvq_mma_rows(c + 2, a1, a3, b0, b1);
}

// The transpose of an 8 x 8 matrix of which a lane holds row KVQ_ROW, columns 2 KVQ_COL and + 1.
KVQ_FUNC kvq_uint kvq_transposed(kvq_uint x, int lane) {
  const int row = KVQ_ROW(lane), col = KVQ_COL(lane);
  const kvq_uint a = kvq_shuffle_uint(x, KVQ_LANE_OF(2 * col, row / 2));
  const kvq_uint b = kvq_shuffle_uint(x, KVQ_LANE_OF(2 * col + 1, row / 2));
  return (row & 1) != 0 ? kvq_high_halves(a, b) : kvq_low_halves(a, b);
}
#define kvq_to_b(transposed) kvq_transposed(transposed, kvq_lane)
#define kvq_rows_to_b(rows) (rows)
