// What kernel texts call when they run on the CPU: one fiber per thread of a group, one group after the other.
//
// Functions that exchange something wait until all lanes of the warp (or all threads of the group) have arrived. If
// they arrive at different functions, or some have ended, the run stops with a report. `line` is where a function was
// called, for the report and because two calls in two branches are not the same call.
#pragma once

#include <stdint.h>

typedef unsigned int kvq_host_word;

// Prints a report that names the running thread and ends the process.
[[noreturn]] void kvq_host_fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

int kvq_host_thread();         // in its group
int kvq_host_group(int axis);  // 0, 1, 2: x, y, z

void kvq_host_barrier(int line);
void kvq_host_warp_barrier(int line);
kvq_host_word kvq_host_shuffle(kvq_host_word x, int lane, int line);
kvq_host_word kvq_host_ballot(bool x, int line);

// What the running thread has stored and loads later, for other groups and from them; and how many groups have come to a
// counter before. After both and the barriers around them a group may load what those groups have stored.
void kvq_host_fence();
kvq_host_word kvq_host_arrive(const kvq_host_word* counter);

// c += a b as preludes define `kvq_mma`, 16 x 8 += 16 x 16 by 16 x 8; with `metal`, lanes hold what those of Metal hold.
void kvq_host_mma(float* c, const kvq_host_word* a, const kvq_host_word* b, bool metal, int line);
// c += a b as preludes define `kvq_mma_bytes`, 16 x 8 += 16 x 32 by 32 x 8.
void kvq_host_mma_bytes(int* c, const kvq_host_word* a, const kvq_host_word* b, int line);
// d = a b + c for 8 x 8 matrices of which a lane holds two neighbouring elements, as Metal's simdgroup matrices do.
void kvq_host_mma8(float* d, const float* a, const float* b, const float* c, int line);

// Fills a shared array with bytes 0xFF at its first use by a group and counts its size.
void kvq_host_shared(void* array, long bytes, const char* name);

// `p`, or a report if it is not a multiple of `bytes`.
template <typename P>
static inline P kvq_host_aligned(P p, int bytes) {
  if ((unsigned long)p % bytes != 0) kvq_host_fail("a load of %d bytes must be aligned, got an address %d bytes after "
                                                   "an aligned one", bytes, (int)((unsigned long)p % bytes));
  return p;
}

// Row and pair of columns of an 8 x 8 matrix that a lane of Metal holds, and the inverse.
static inline int kvq_host_metal_row(int lane) { return (lane / 4 & 4) + lane / 2 % 4; }
static inline int kvq_host_metal_col(int lane) { return (lane / 4 & 2) + lane % 2; }
static inline int kvq_host_metal_lane(int row, int col) {
  return (row & 4) << 2 | (row & 3) << 1 | (col & 2) << 2 | (col & 1);
}

// Of the generated text: what the arrays are called, how many are read, and the kernel of one thread.
extern const char* const kvq_host_names[];
void kvq_host_kernel(void* const* arrays, const int* const* shapes, const int64_t* const* strides);
