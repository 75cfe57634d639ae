// Finds threads that touch the same memory with nothing between them. The compiler reports every access of a kernel
// text (-fsanitize=thread), this decides: two threads of a group are ordered by a KVQ_BARRIER, lanes of a warp by a
// KVQ_WARP_BARRIER too, by shuffles, votes and products not. Barriers order shared memory alone, as on Metal: what one
// thread writes to an output another may only read if its group has arrived at a counter at which the group of the other
// has arrived, too, with a fence and a barrier before it, and a barrier and a fence after it.
#pragma once

#include <stdint.h>

#include <map>
#include <set>
#include <vector>

namespace races {

struct Access {
  int thread = -1, other = -1;  // the last one, and the last that was another
  int group_turn = -1, warp_turn = -1;
  bool others = false;        // threads of the same warp since its last barrier
  bool other_warps = false;   // since the last barrier of the group
};

struct Cell {  // of one byte
  Access read, write;
  int group = -1;
};

struct Region {
  const char* begin;
  const char* end;
  const char* name;
  bool shared;
  std::vector<Cell> cells;
};

inline std::vector<Region> regions;
inline int group_number, group_turn, warp_turn[32];

// A shared array is the same memory in every group, which the turn of a new group tells from an earlier one.
inline void watch(const void* begin, long bytes, const char* name, bool shared) {
  for (const Region& region : regions)
    if (region.begin == begin) return;
  regions.push_back({(const char*)begin, (const char*)begin + bytes, name, shared, std::vector<Cell>(bytes)});
}
inline void group_barrier() { group_turn++; }
inline void warp_barrier(int warp) { warp_turn[warp]++; }

// Groups that have arrived at each counter, and what that makes visible to the running group.
inline std::map<const void*, std::set<int>> arrived;
inline std::set<int> seen;
inline int arrival_turn, fence_turn[1024];  // of the group, in its count of barriers
inline bool unfenced[1024];                 // whether a thread has written to an output since its last fence

inline void fence(int thread) {
  unfenced[thread] = false;
  fence_turn[thread] = group_turn;
}
inline void arrive(const void* counter, int thread, int threads) {
  for (int i = 0; i < threads; i++) {
    if (unfenced[i]) kvq_host_fail("a fence must follow what thread %d has written to outputs before its group arrives", i);
    if (i != thread && fence_turn[i] == group_turn)
      kvq_host_fail("a barrier must stand between the fence of thread %d and the arrival of its group", i);
  }
  arrived[counter].insert(group_number);
  seen.insert(arrived[counter].begin(), arrived[counter].end());
  arrival_turn = group_turn;
}
// Whether a thread may read what a group has written.
inline bool visible(int group, int thread) {
  return seen.count(group) && fence_turn[thread] > arrival_turn;
}

// Another thread than `thread` of those that an entry stands for and that no barrier has ordered; -1 if there is none.
inline int unordered(const Access& before, int thread) {
  if (before.thread < 0 || before.group_turn != group_turn) return -1;
  const int warp = thread / 32;
  const int other = before.thread != thread ? before.thread : before.other;
  if (before.other_warps || before.thread / 32 != warp) return other;
  if (before.warp_turn != warp_turn[warp]) return -1;
  return before.others || before.thread != thread ? other : -1;
}
inline void note(Access& access, int thread) {
  const int warp = thread / 32;
  const bool same_group_turn = access.thread >= 0 && access.group_turn == group_turn;
  const bool same_warp_turn = same_group_turn && access.thread / 32 == warp && access.warp_turn == warp_turn[warp];
  access.other_warps = same_group_turn && (access.other_warps || access.thread / 32 != warp);
  access.others = same_warp_turn && (access.others || access.thread != thread);
  if (access.thread != thread) access.other = access.thread;
  access.thread = thread, access.group_turn = group_turn, access.warp_turn = warp_turn[warp];
}

inline void begin_group() {
  group_number++, group_turn++;
  seen.clear();
  arrival_turn = -1;
  for (int i = 0; i < 1024; i++) unfenced[i] = false, fence_turn[i] = -1;
}
inline void begin_run() {
  regions.clear();
  arrived.clear();
}

inline void touch(const void* address, int bytes, bool writes, int thread) {
  const char* at = (const char*)address;
  for (Region& region : regions) {
    if (at < region.begin || at >= region.end) continue;
    for (long i = at - region.begin; i < at - region.begin + bytes && i < region.end - region.begin; i++) {
      Cell& cell = region.cells[i];
      if (region.shared) {
        int other = unordered(cell.write, thread);
        if (other < 0 && writes) other = unordered(cell.read, thread);
        if (other >= 0)
          kvq_host_fail("a barrier must stand between accesses of threads %d and %d to byte %ld of shared array '%s', of "
                        "which one is a write", other, thread, i, region.name);
      } else if (cell.write.thread >= 0 && (cell.group != group_number || cell.write.thread != thread) &&
                 (writes || !visible(cell.group, thread))) {
        kvq_host_fail("byte %ld of output array '%s' must be touched by one thread only, got thread %d of %s group and "
                      "thread %d", i, region.name, cell.write.thread, cell.group == group_number ? "this" : "an earlier",
                      thread);
      }
      if (!region.shared && writes && arrival_turn == group_turn)
        kvq_host_fail("a barrier must stand between what thread %d writes to outputs and the arrival of its group", thread);
      if (!region.shared && writes) unfenced[thread] = true;
      note(writes ? cell.write : cell.read, thread);
      if (writes) cell.group = group_number;
    }
    return;
  }
}

}  // namespace races

// What the compiler calls.
#define KVQ_ACCESS(bytes)                                                                                             \
  void __tsan_read##bytes(void* p) { races::touch(p, bytes, false, kvq_host_thread()); }                               \
  void __tsan_write##bytes(void* p) { races::touch(p, bytes, true, kvq_host_thread()); }                               \
  void __tsan_unaligned_read##bytes(void* p) { races::touch(p, bytes, false, kvq_host_thread()); }                     \
  void __tsan_unaligned_write##bytes(void* p) { races::touch(p, bytes, true, kvq_host_thread()); }                     \
  void __tsan_volatile_read##bytes(void* p) { races::touch(p, bytes, false, kvq_host_thread()); }                      \
  void __tsan_volatile_write##bytes(void* p) { races::touch(p, bytes, true, kvq_host_thread()); }
extern "C" {
KVQ_ACCESS(1)
KVQ_ACCESS(2)
KVQ_ACCESS(4)
KVQ_ACCESS(8)
KVQ_ACCESS(16)
void __tsan_read_range(void* p, long bytes) { races::touch(p, (int)bytes, false, kvq_host_thread()); }
void __tsan_write_range(void* p, long bytes) { races::touch(p, (int)bytes, true, kvq_host_thread()); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
