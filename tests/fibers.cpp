// The fibers that run kernel texts on the CPU, and a program around one kernel: arrays from standard input, outputs to
// standard output, reports to standard error. Linked with the address sanitizer, but not instrumented itself; or, with
// KVQ_RACES, with races.h in its place.
#include "fibers.h"

#ifdef KVQ_RACES
#include "races.h"
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#define __asan_poison_memory_region(...)
#else
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>

namespace {

enum Place { ready, ended, at_barrier, at_warp_barrier, at_shuffle, at_ballot, at_product };
const char* const place_names[] = {"running", "ended", "KVQ_BARRIER", "KVQ_WARP_BARRIER", "a shuffle", "a vote", "a product"};

const size_t stack_bytes = 512 << 10, page = 16 << 10;
const long margin = 1 << 20;  // bytes around every array that must not be touched
const int shared_limit = 48 << 10;  // of CUDA; metal_check.py knows that of Metal

struct Fiber {
  void* stack_pointer;
  char* stack;
  void* fake_stack;
  Place place;
  int line, round;
};

struct Exchange {  // what the lanes of a warp show each other; two of them, for the rounds of a warp in turn
  kvq_host_word words[32];
  float a[16][16], b[16][8];
  signed char byte_a[16][32], byte_b[32][8];
};

struct Array {
  char* data;
  long bytes;
  std::vector<int> shape;
  std::vector<int64_t> strides;
};

struct Shared {
  void* array;
  long bytes;
  const char* name;
};

std::vector<Fiber> fibers;
std::vector<Exchange> exchanges;
std::vector<Array> arrays;
std::vector<void*> pointers;
std::vector<const int*> shapes;
std::vector<const int64_t*> strides;
std::vector<Shared> shared;
long shared_bytes;
int inputs, current = -1, threads, group[3], order;
void* scheduler_stack_pointer;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
uint64_t random_state;
const char* const order_names[] = {"forward", "reverse", "shuffled"};

int random_below(int n) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return (int)((random_state >> 33) % n);
}

}  // namespace

void kvq_host_fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "kernel: ");
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  if (current >= 0)
    fprintf(stderr, " (thread %d of group %d, %d, %d; %s order)", current, group[0], group[1], group[2], order_names[order]);
  fprintf(stderr, "\n");
  fflush(stderr);
  _exit(3);
}

// Saves the registers that a function must keep and the stack pointer, and goes on with another stack.
extern "C" void kvq_switch(void** save, void* load) __asm__("kvq_switch");
#if defined(__x86_64__)
__asm__(
    ".text\n.globl kvq_switch\nkvq_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
const int saved_words = 8, return_word = 6;
#elif defined(__aarch64__)
__asm__(
    ".text\n.globl kvq_switch\n.p2align 2\nkvq_switch:\n"
    "sub sp, sp, #160\nstp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\nstp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\n"
    "stp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\nmov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\nldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\n"
    "ldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\nadd sp, sp, #160\nret\n");
const int saved_words = 20, return_word = 11;
#else
#error "fibers.cpp knows x86-64 and arm64"
#endif

namespace {

void to_scheduler(bool ends) {
  Fiber& fiber = fibers[current];
  __sanitizer_start_switch_fiber(ends ? nullptr : &fiber.fake_stack, scheduler_stack, scheduler_stack_bytes);
  kvq_switch(&fiber.stack_pointer, scheduler_stack_pointer);
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
}

void run_thread() {
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  kvq_host_kernel(pointers.data(), shapes.data(), strides.data());
  fibers[current].place = ended;
  to_scheduler(true);
}

void resume(int thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, stack_bytes);
  kvq_switch(&scheduler_stack_pointer, fiber.stack_pointer);
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
  current = -1;
}

void make_fiber(Fiber& fiber) {
  if (!fiber.stack) {
    char* memory = (char*)mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) kvq_host_fail("no memory for stacks");
    fiber.stack = memory + page;
  }
  void** top = (void**)(fiber.stack + stack_bytes) - 2 - saved_words;  // as if `run_thread` had been called
  memset(top, 0, (saved_words + 2) * sizeof(void*));
  top[return_word] = (void*)run_thread;
  fiber.stack_pointer = top;
  fiber.fake_stack = nullptr;
  fiber.place = ready;
  fiber.round = 0;
}

// Waits at a place; what the lanes then read lies in the exchange of the same round.
Exchange& exchange_of_round() { return exchanges[current / 32 * 2 + fibers[current].round % 2]; }
void wait_at(Place place, int line) {
  Fiber& fiber = fibers[current];
  fiber.place = place, fiber.line = line;
  fiber.round++;
  to_scheduler(false);
}

void report_divergence(int one, int other) {
  current = one;
  kvq_host_fail("all threads must arrive at the same call, but thread %d is at %s (line %d), thread %d at %s (line %d)", one,
                place_names[fibers[one].place], fibers[one].line, other, place_names[fibers[other].place], fibers[other].line);
}

// All lanes of a warp to their next place. True if they may go on from there by themselves.
bool run_warp(int warp) {
  const int first = 32 * warp, lanes = threads - first < 32 ? threads - first : 32;
  int lane_order[32];
  for (int i = 0; i < lanes; i++) {
    const int j = order == 2 ? random_below(i + 1) : i;
    lane_order[i] = lane_order[j];
    lane_order[j] = order == 1 ? lanes - 1 - i : i;
  }
  for (int i = 0; i < lanes; i++) resume(first + lane_order[i]);
  const Fiber& lead = fibers[first];
  for (int i = 1; i < lanes; i++)
    if (fibers[first + i].place != lead.place || (lead.place != ended && fibers[first + i].line != lead.line))
      report_divergence(first, first + i);
  if (lead.place == ended || lead.place == at_barrier) return false;
#ifdef KVQ_RACES
  if (lead.place == at_warp_barrier) races::warp_barrier(warp);
#endif
  for (int i = 0; i < lanes; i++) fibers[first + i].place = ready;
  return true;
}

void run_group() {
  shared.clear();
  shared_bytes = 0;
#ifdef KVQ_RACES
  races::begin_group();
#endif
  for (int i = 0; i < threads; i++) make_fiber(fibers[i]);
  const int warps = (threads + 31) / 32;
  std::vector<int> runnable(warps);
  while (true) {
    for (int i = 0; i < warps; i++) runnable[i] = order == 1 ? warps - 1 - i : i;
    while (!runnable.empty()) {
      const int at = order == 2 ? random_below((int)runnable.size()) : 0;
      if (!run_warp(runnable[at])) runnable.erase(runnable.begin() + at);
    }
    runnable.resize(warps);
    for (int i = 1; i < threads; i++)
      if (fibers[i].place != fibers[0].place || (fibers[0].place != ended && fibers[i].line != fibers[0].line))
        report_divergence(0, i);
    if (fibers[0].place == ended) return;
    for (int i = 0; i < threads; i++) fibers[i].place = ready;
#ifdef KVQ_RACES
    races::group_barrier();
#endif
  }
}

float half_to_float(unsigned bits) {
  _Float16 x;
  const unsigned short low = (unsigned short)bits;
  memcpy(&x, &low, 2);
  return (float)x;
}

#ifndef KVQ_RACES
// Names the array beside which the sanitizer found an access.
void explain() {
  const char* at = (const char*)__asan_get_report_address();
  for (size_t i = 0; i < arrays.size(); i++) {
    const Array& array = arrays[i];
    if (at < array.data - margin || at >= array.data + array.bytes + margin) continue;
    fprintf(stderr, "kernel: a %s of %d bytes at byte %ld of %s array '%s', which has %ld bytes",
            __asan_get_report_access_type() ? "write" : "read", (int)__asan_get_report_access_size(), (long)(at - array.data),
            (int)i < inputs ? "input" : "output", kvq_host_names[i], array.bytes);
    fprintf(stderr, " (thread %d of group %d, %d, %d; %s order)\n", current, group[0], group[1], group[2], order_names[order]);
  }
  for (const Shared& s : shared) {
    const char* data = (const char*)s.array;
    if (at < data - 64 || at >= data + s.bytes + 64) continue;
    fprintf(stderr, "kernel: a %s at byte %ld of shared array '%s', which has %ld bytes (thread %d)\n",
            __asan_get_report_access_type() ? "write" : "read", (long)(at - data), s.name, s.bytes, current);
  }
}
#endif

void read_bytes(void* to, long bytes) {
  if (bytes > 0 && fread(to, 1, bytes, stdin) != (size_t)bytes) kvq_host_fail("input must hold %ld more bytes", bytes);
}

int64_t read_integer() {
  int64_t x;
  read_bytes(&x, sizeof x);
  return x;
}

// Exactly as many bytes as an array has, between margins that the sanitizer watches.
char* allocate(long bytes) {
  char* memory = (char*)malloc(bytes + 2 * margin + 16);
  if (!memory) kvq_host_fail("no memory for an array of %ld bytes", bytes);
  char* data = (char*)(((uintptr_t)memory + margin + 15) / 16 * 16);
  __asan_poison_memory_region(memory, data - memory);
  __asan_poison_memory_region(data + bytes, memory + bytes + 2 * margin + 16 - (data + bytes));
  return data;
}

}  // namespace

int kvq_host_thread() { return current; }
int kvq_host_group(int axis) { return group[axis]; }
void kvq_host_barrier(int line) { wait_at(at_barrier, line); }
void kvq_host_warp_barrier(int line) { wait_at(at_warp_barrier, line); }

void kvq_host_fence() {
#ifdef KVQ_RACES
  races::fence(current);
#endif
}

kvq_host_word kvq_host_arrive(const kvq_host_word* counter) {
#ifdef KVQ_RACES
  races::arrive(counter, current, threads);
#endif
  return (*const_cast<kvq_host_word*>(counter))++;
}

kvq_host_word kvq_host_shuffle(kvq_host_word x, int lane, int line) {
  const int lanes = threads - current / 32 * 32;
  if (lane < 0 || lane >= 32 || lane >= lanes) kvq_host_fail("a shuffle must read lane 0 to %d, got %d", lanes < 32 ? lanes - 1 : 31, lane);
  Exchange& e = exchange_of_round();
  e.words[current % 32] = x;
  wait_at(at_shuffle, line);
  return e.words[lane];
}

kvq_host_word kvq_host_ballot(bool x, int line) {
  Exchange& e = exchange_of_round();
  e.words[current % 32] = x;
  wait_at(at_ballot, line);
  kvq_host_word all = 0;
  for (int i = 0; i < 32 && current / 32 * 32 + i < threads; i++) all |= e.words[i] << i;
  return all;
}

void kvq_host_mma(float* c, const kvq_host_word* a, const kvq_host_word* b, bool metal, int line) {
  if (threads % 32 != 0) kvq_host_fail("a product needs groups of whole warps, got %d threads", threads);
  const int lane = current % 32;
  const int row = metal ? kvq_host_metal_row(lane) : lane >> 2, col = 2 * (metal ? kvq_host_metal_col(lane) : lane & 3);
  Exchange& e = exchange_of_round();
  for (int i = 0; i < 2; i++) {
    const unsigned shift = 16 * i;
    for (int part = 0; part < 4; part++) e.a[row + part % 2 * 8][col + part / 2 * 8 + i] = half_to_float(a[part] >> shift);
    for (int part = 0; part < 2; part++) {
      const float x = half_to_float(b[part] >> shift);
      if (metal) e.b[8 * part + row][col + i] = x;
      else e.b[8 * part + col + i][row] = x;
    }
  }
  wait_at(at_product, line);
  for (int i = 0; i < 4; i++) {
    float sum = c[i];
    for (int k = 0; k < 16; k++) sum += e.a[row + i / 2 * 8][k] * e.b[k][col + i % 2];
    c[i] = sum;
  }
}

void kvq_host_mma_bytes(int* c, const kvq_host_word* a, const kvq_host_word* b, int line) {
  if (threads % 32 != 0) kvq_host_fail("a product needs groups of whole warps, got %d threads", threads);
  const int row = current % 32 >> 2, col = current % 4;
  Exchange& e = exchange_of_round();
  for (int i = 0; i < 4; i++) {
    for (int part = 0; part < 4; part++)
      e.byte_a[row + part % 2 * 8][4 * col + part / 2 * 16 + i] = (signed char)(a[part] >> 8 * i);
    for (int part = 0; part < 2; part++) e.byte_b[4 * col + 16 * part + i][row] = (signed char)(b[part] >> 8 * i);
  }
  wait_at(at_product, line);
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 32; k++) c[i] += e.byte_a[row + i / 2 * 8][k] * e.byte_b[k][2 * col + i % 2];
}

void kvq_host_mma8(float* d, const float* a, const float* b, const float* c, int line) {
  if (threads % 32 != 0) kvq_host_fail("a product needs groups of whole warps, got %d threads", threads);
  const int row = kvq_host_metal_row(current % 32), col = 2 * kvq_host_metal_col(current % 32);
  Exchange& e = exchange_of_round();
  for (int i = 0; i < 2; i++) e.a[row][col + i] = a[i], e.b[row][col + i] = b[i];
  wait_at(at_product, line);
  for (int i = 0; i < 2; i++) {
    float sum = c[i];
    for (int k = 0; k < 8; k++) sum += e.a[row][k] * e.b[k][col + i];
    d[i] = sum;
  }
}

void kvq_host_shared(void* array, long bytes, const char* name) {
  for (const Shared& s : shared)
    if (s.array == array) return;
  shared.push_back({array, bytes, name});
  shared_bytes += (bytes + 15) / 16 * 16;
  if (shared_bytes > shared_limit)
    kvq_host_fail("shared arrays must have at most %d bytes, got %ld with '%s'", shared_limit, shared_bytes, name);
  memset(array, 0xFF, bytes);
#ifdef KVQ_RACES
  races::watch(array, bytes, name, true);
#endif
}

// Integers, all of 64 bits: inputs, outputs, threads of a group, groups along x, y, z; then orders, and each order and
// its seed; then of each array its bytes, dimensions, shape and strides; then the bytes of the inputs.
int main() {
#ifndef KVQ_RACES
  __asan_set_error_report_callback([](const char*) { explain(); });
#endif
  inputs = (int)read_integer();
  const int count = inputs + (int)read_integer();
  threads = (int)read_integer();
  if (threads < 1 || threads > 1024) kvq_host_fail("a group must have 1 to 1024 threads, got %d", threads);
  int64_t groups[3], all = 1;
  for (int64_t& n : groups) n = read_integer(), all *= n;
  std::vector<int64_t> orders(2 * read_integer());
  for (int64_t& n : orders) n = read_integer();
  arrays.resize(count);
  for (Array& array : arrays) {
    array.bytes = read_integer();
    array.shape.resize(read_integer());
    for (int& n : array.shape) n = (int)read_integer();
    array.strides.resize(array.shape.size());
    for (int64_t& n : array.strides) n = read_integer();
    array.data = allocate(array.bytes);
    pointers.push_back(array.data);
    shapes.push_back(array.shape.data());
    strides.push_back(array.strides.data());
  }
  std::vector<std::vector<char>> given(inputs), first(count);
  for (int i = 0; i < inputs; i++) {
    given[i].resize(arrays[i].bytes);
    read_bytes(given[i].data(), arrays[i].bytes);
  }
  fibers.resize(threads);
  exchanges.resize((threads + 31) / 32 * 2);

  for (size_t run = 0; run < orders.size(); run += 2) {
    order = (int)orders[run], random_state = (uint64_t)orders[run + 1];
    for (int i = 0; i < inputs; i++) memcpy(arrays[i].data, given[i].data(), arrays[i].bytes);  // counters are written
    for (int i = inputs; i < count; i++) memset(arrays[i].data, 0xFF, arrays[i].bytes);
#ifdef KVQ_RACES
    races::begin_run();
    for (int i = inputs; i < count; i++) races::watch(arrays[i].data, arrays[i].bytes, kvq_host_names[i], false);
#endif
    std::vector<int64_t> turn(all);
    for (int64_t i = 0; i < all; i++) {
      const int64_t j = order == 2 ? random_below((int)i + 1) : i;
      turn[i] = turn[j];
      turn[j] = order == 1 ? all - 1 - i : i;
    }
    for (int64_t i : turn) {
      group[0] = (int)(i % groups[0]), group[1] = (int)(i / groups[0] % groups[1]), group[2] = (int)(i / groups[0] / groups[1]);
      run_group();
    }
    for (int i = inputs; i < count; i++) {
      const Array& array = arrays[i];
      if (run == 0) first[i].assign(array.data, array.data + array.bytes);
      for (long j = 0; j < array.bytes; j++)
        if (first[i][j] != array.data[j])
          kvq_host_fail("outputs must not depend on the order of threads, but byte %ld of output array '%s' differs between "
                        "%s and %s order", j, kvq_host_names[i], order_names[orders[0]], order_names[order]);
    }
  }
  for (int i = inputs; i < count; i++) fwrite(arrays[i].data, 1, arrays[i].bytes, stdout);
  fflush(stdout);
  _exit(0);
}
