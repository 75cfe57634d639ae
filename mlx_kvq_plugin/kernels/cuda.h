// Prelude of CUDA: what the kernel bodies are written against. metal.h and cpu.h define the same names.
//
// Lanes come in warps of 32. The products are those of `mma.m16n8k16`: a lane holds two neighbouring columns of row
// KVQ_ROW and of row KVQ_ROW + 8, in pairs of columns 2 KVQ_COL and 2 KVQ_COL + 8. Pairs of half precision numbers are
// `uint`s, the first number in the low half.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned char kvq_byte;
typedef unsigned int kvq_uint;
typedef __nv_bfloat16 kvq_bfloat;
typedef __half kvq_half;
typedef long long kvq_long;

// MLX writes the signature of a kernel; this lets it have bounds, without which registers limit the warps that run.
#ifdef KVQ_GROUPS_PER_CORE
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(KVQ_GROUP_THREADS, KVQ_GROUPS_PER_CORE)
#endif

#define KVQ_FUNC static __device__ __forceinline__
#define KVQ_DEVICE
#define KVQ_GROUP_MEMORY
#define KVQ_PRIVATE
#define KVQ_SHARED_ARRAY(type, name, count) __shared__ __align__(16) type name[count]

#define KVQ_THREAD ((int)threadIdx.x)
#define KVQ_LANE ((int)threadIdx.x & 31)
#define KVQ_WARP ((int)threadIdx.x >> 5)
#define KVQ_GROUP_X ((int)blockIdx.x)
#define KVQ_GROUP_Y ((int)blockIdx.y)
#define KVQ_GROUP_Z ((int)blockIdx.z)
#define KVQ_BARRIER() __syncthreads()
#define KVQ_WARP_BARRIER() __syncwarp()

#define KVQ_UNROLL _Pragma("unroll")
#define KVQ_NO_UNROLL _Pragma("unroll 1")
#define KVQ_UNROLL4 _Pragma("unroll 4")
#define KVQ_UNROLL8 _Pragma("unroll 8")
#define KVQ_INFINITY __int_as_float(0x7f800000)

KVQ_FUNC float kvq_exp2(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
KVQ_FUNC float kvq_log2(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
KVQ_FUNC float kvq_inverse(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
KVQ_FUNC float kvq_rsqrt(float x) { return rsqrtf(x); }
KVQ_FUNC float kvq_sqrt(float x) { return sqrtf(x); }
KVQ_FUNC float kvq_tanh(float x) { return tanhf(x); }
KVQ_FUNC float kvq_abs(float x) { return fabsf(x); }
KVQ_FUNC float kvq_max(float x, float y) { return fmaxf(x, y); }
KVQ_FUNC float kvq_least(float x, float y) { return fminf(x, y); }
KVQ_FUNC int kvq_min(int x, int y) { return min(x, y); }
KVQ_FUNC float kvq_fma(float x, float y, float z) { return fmaf(x, y, z); }

KVQ_FUNC float kvq_shuffle_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
KVQ_FUNC float kvq_shuffle(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
// x, in a way that compilers cannot see through, so that it stays in a register: groups have one dimension.
KVQ_FUNC kvq_uint kvq_opaque(kvq_uint x) { return x + threadIdx.y; }
// ~x and x ^ mask: compilers would move the one behind every exclusive or, and make two of the other before a shift.
KVQ_FUNC kvq_uint kvq_not(kvq_uint x) { kvq_uint y; asm("not.b32 %0, %1;" : "=r"(y) : "r"(x)); return y; }
KVQ_FUNC kvq_uint kvq_flip(kvq_uint x, kvq_uint mask) {
  kvq_uint y;
  asm("xor.b32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(mask));
  return y;
}
KVQ_FUNC kvq_uint kvq_shuffle_xor_uint(kvq_uint x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
KVQ_FUNC kvq_uint kvq_shuffle_uint(kvq_uint x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }
KVQ_FUNC bool kvq_any(bool x) { return __any_sync(0xffffffffu, x) != 0; }
KVQ_FUNC kvq_uint kvq_ballot(bool x) { return __ballot_sync(0xffffffffu, x); }

KVQ_FUNC kvq_uint kvq_as_uint(__half2 x) { return *reinterpret_cast<kvq_uint*>(&x); }
KVQ_FUNC __half2 kvq_as_half2(kvq_uint x) { return *reinterpret_cast<__half2*>(&x); }
KVQ_FUNC kvq_uint kvq_pack_half2(float low, float high) { return kvq_as_uint(__floats2half2_rn(low, high)); }
KVQ_FUNC float kvq_low_half(kvq_uint x) { return __low2float(kvq_as_half2(x)); }
KVQ_FUNC float kvq_high_half(kvq_uint x) { return __high2float(kvq_as_half2(x)); }
KVQ_FUNC kvq_uint kvq_hadd2(kvq_uint x, kvq_uint y) { return kvq_as_uint(__hadd2(kvq_as_half2(x), kvq_as_half2(y))); }
KVQ_FUNC kvq_uint kvq_hsub2(kvq_uint x, kvq_uint y) { return kvq_as_uint(__hsub2(kvq_as_half2(x), kvq_as_half2(y))); }
KVQ_FUNC kvq_uint kvq_hmin2(kvq_uint x, kvq_uint y) { return kvq_as_uint(__hmin2(kvq_as_half2(x), kvq_as_half2(y))); }
KVQ_FUNC kvq_uint kvq_hmul2(kvq_uint x, kvq_uint y) { return kvq_as_uint(__hmul2(kvq_as_half2(x), kvq_as_half2(y))); }
KVQ_FUNC kvq_uint kvq_hfma2(kvq_uint x, kvq_uint y, kvq_uint z) {
  return kvq_as_uint(__hfma2(kvq_as_half2(x), kvq_as_half2(y), kvq_as_half2(z)));
}

// The low, and the high, halves of two words: (x.low, y.low), (x.high, y.high).
KVQ_FUNC kvq_uint kvq_low_halves(kvq_uint x, kvq_uint y) { return __byte_perm(x, y, 0x5410); }
KVQ_FUNC kvq_uint kvq_high_halves(kvq_uint x, kvq_uint y) { return __byte_perm(x, y, 0x7632); }
// The high word of `high:low` shifted up by 1 to 31 bits.
KVQ_FUNC kvq_uint kvq_funnel(kvq_uint high, kvq_uint low, int bits) { return __funnelshift_l(low, high, bits); }
// (x & mask) | (y & ~mask)
KVQ_FUNC kvq_uint kvq_select(kvq_uint mask, kvq_uint x, kvq_uint y) {
  kvq_uint z;
  asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(z) : "r"(mask), "r"(x), "r"(y));  // one instruction, which compilers split
  return z;
}

// Four bytes of (high, low), chosen by the nibbles of a selector; where the highest bit of a nibble is set, eight copies
// of the chosen byte's sign.
KVQ_FUNC kvq_uint kvq_permute(kvq_uint low, kvq_uint high, kvq_uint selector) {
  kvq_uint z;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(z) : "r"(low), "r"(high), "r"(selector));
  return z;
}
KVQ_FUNC kvq_uint kvq_float_bits(float x) { return __float_as_uint(x); }
KVQ_FUNC float kvq_bits_float(kvq_uint x) { return __uint_as_float(x); }
KVQ_FUNC int kvq_round(float x) { return __float2int_rn(x); }

KVQ_FUNC float kvq_load_bfloat(const kvq_bfloat* p, kvq_long i) { return __bfloat162float(p[i]); }
KVQ_FUNC kvq_bfloat kvq_to_bfloat(float x) { return __float2bfloat16(x); }
KVQ_FUNC float kvq_to_float(float x) { return x; }
KVQ_FUNC float kvq_to_float(__half x) { return __half2float(x); }
KVQ_FUNC float kvq_to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
KVQ_FUNC void kvq_store(float* p, kvq_long i, float x) { p[i] = x; }
KVQ_FUNC void kvq_store(__half* p, kvq_long i, float x) { p[i] = __float2half(x); }
KVQ_FUNC void kvq_store(__nv_bfloat16* p, kvq_long i, float x) { p[i] = __float2bfloat16(x); }

// Loads of 1, 2, 4, 8 and 16 aligned bytes into words; narrow ones fill the low bytes. They stay in the order of the
// text: compilers would put a load that is meant to come early next to what needs it.
KVQ_FUNC kvq_uint kvq_load1(const kvq_byte* p) { return *p; }
KVQ_FUNC kvq_uint kvq_load2(const kvq_byte* p) { unsigned short x; asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"(p)); return x; }
KVQ_FUNC kvq_uint kvq_load4(const kvq_byte* p) { kvq_uint x; asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(x) : "l"(p)); return x; }
KVQ_FUNC void kvq_load_floats(const float* p, float& x, float& y) {
  const float2 pair = *reinterpret_cast<const float2*>(p);
  x = pair.x, y = pair.y;
}
KVQ_FUNC void kvq_load8(const kvq_byte* p, KVQ_PRIVATE kvq_uint* w) {
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "l"(p));
}
KVQ_FUNC void kvq_load16(const kvq_byte* p, KVQ_PRIVATE kvq_uint* w) {
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "l"(p));
}

// N floats, 2 or a multiple of 4, that a group has stored, aligned to all of them or to 16 bytes.
template <int N>
KVQ_FUNC void kvq_load_stored(const float* p, KVQ_PRIVATE float* x) {
  if (N == 2) {
    const float2 pair = __ldcg(reinterpret_cast<const float2*>(p));
    x[0] = pair.x, x[1] = pair.y;
  } else {
    KVQ_UNROLL
    for (int i = 0; i + 4 <= N; i += 4) {
      const float4 four = __ldcg(reinterpret_cast<const float4*>(p + i));
      x[i] = four.x, x[i + 1] = four.y, x[i + 2] = four.z, x[i + 3] = four.w;
    }
  }
}
// What a thread has stored in arrays of the device is there for groups that arrive later; and what others have stored, for
// loads that come later.
#define KVQ_FENCE() __threadfence()
// How many groups have arrived before. The counter is an input, which nothing else reads.
KVQ_FUNC kvq_uint kvq_arrive(const kvq_uint* counter) { return atomicAdd(const_cast<kvq_uint*>(counter), 1u); }

#define KVQ_ROW(lane) ((lane) >> 2)
#define KVQ_COL(lane) ((lane) & 3)
#define KVQ_ROW_BIT(i) (4 << (i))  // the three bits of a lane that make its row

// c += a b, 16 x 8 += 16 x 16 by 16 x 8, half precision products summed in float32.
//   c: (row, 2 col), (row, 2 col + 1), (row + 8, 2 col), (row + 8, 2 col + 1)
//   a: pairs at (row, 2 col), (row + 8, 2 col), (row, 2 col + 8), (row + 8, 2 col + 8)
//   b: as `kvq_to_b` gives it
KVQ_FUNC void kvq_mma(float* c, kvq_uint a0, kvq_uint a1, kvq_uint a2, kvq_uint a3, kvq_uint b0, kvq_uint b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// One of the two 8 x 8 parts of b from its transpose, of which a lane holds row KVQ_ROW, columns 2 KVQ_COL and + 1.
KVQ_FUNC kvq_uint kvq_to_b(kvq_uint transposed) { return transposed; }
// The same from the part itself, of which a lane holds row KVQ_ROW, columns 2 KVQ_COL and + 1.
KVQ_FUNC kvq_uint kvq_rows_to_b(kvq_uint rows) {
  kvq_uint b;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(b) : "r"(rows));
  return b;
}

// c += a b, 16 x 8 += 16 x 32 by 32 x 8, of signed bytes, four neighbouring ones in a register, the first lowest.
//   c: as of `kvq_mma`, integers
//   a: columns 4 col to 4 col + 3 of row and of row + 8, then columns 4 col + 16 to 4 col + 19 of both
//   b: rows 4 col to 4 col + 3 of column KVQ_ROW, then rows 4 col + 16 to 4 col + 19
KVQ_FUNC void kvq_mma_bytes(int* c, kvq_uint a0, kvq_uint a1, kvq_uint a2, kvq_uint a3, kvq_uint b0, kvq_uint b1) {
  asm(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
