// What kernels use of the Metal Shading Language, declared for clang: address spaces are real, nothing is defined.
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread

typedef signed char int8_t;
typedef short int16_t;
typedef int int32_t;
typedef long int64_t;
typedef unsigned char uint8_t, uchar;
typedef unsigned short uint16_t, ushort;
typedef unsigned int uint32_t, uint;
typedef unsigned long uint64_t, ulong, size_t;
typedef _Float16 half, float16_t;
typedef __bf16 bfloat16_t;
typedef half half2 __attribute__((ext_vector_type(2)));
typedef float float2 __attribute__((ext_vector_type(2)));
typedef float float4 __attribute__((ext_vector_type(4)));
typedef uint uint2 __attribute__((ext_vector_type(2)));
typedef uint uint3 __attribute__((ext_vector_type(3)));
typedef uint uint4 __attribute__((ext_vector_type(4)));

#define INFINITY __builtin_inff()

// Metal makes vectors as C++ calls constructors.
half2 kvq_clang_half2(half x, half y);
#define half2(...) kvq_clang_half2(__VA_ARGS__)

template <typename T, typename S>
T as_type(S x) {
  static_assert(sizeof(T) == sizeof(S), "as_type must keep the size");
  return __builtin_bit_cast(T, x);
}

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
mem_flags operator|(mem_flags, mem_flags);

namespace metal {

float fabs(float);
float fmax(float, float);
float fmin(float, float);
int min(int, int);
int max(int, int);
float fma(float, float, float);
half2 fma(half2, half2, half2);
half2 min(half2, half2);
namespace fast {
float exp2(float);
float log2(float);
float tanh(float);
}  // namespace fast
namespace precise {
float rsqrt(float);
float sqrt(float);
float tanh(float);
}  // namespace precise

void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);
template <typename T>
T simd_shuffle(T x, ushort lane);
template <typename T>
T simd_shuffle_xor(T x, ushort mask);
bool simd_any(bool);
struct simd_vote {
  typedef ulong vote_t;
  explicit operator vote_t() const;
};
simd_vote simd_ballot(bool);

template <typename T>
struct simdgroup_8x8 {
  typedef T pair __attribute__((ext_vector_type(2)));
  pair elements;
  pair& thread_elements();
};
typedef simdgroup_8x8<half> simdgroup_half8x8;
typedef simdgroup_8x8<float> simdgroup_float8x8;
void simdgroup_multiply_accumulate(simdgroup_float8x8& d, simdgroup_half8x8 a, simdgroup_half8x8 b, simdgroup_float8x8 c);

}  // namespace metal
using namespace metal;

// There are no such numbers on these GPUs.
#define double kvq_no_double
