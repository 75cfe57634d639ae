// The encoder of trellis.py for CPUs: the same sums and comparisons, eight tokens at a time.
#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <memory>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_CPU __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_CPU
#endif

namespace {

constexpr int MEMORY = 8, STATES = 1 << MEMORY, HALF = STATES / 2, LANES = 8;
typedef float Row __attribute__((vector_size(4 * LANES)));  // a number of each token

// Costs of all states after `length` channels, from those before; rows of `cost` are states, of `distance` subsets.
FOR_EACH_CPU
void forward(const Row* distance, int length, int subsets, const uint8_t* subset, Row* cost) {
  for (int t = 0; t < length; t++, distance += subsets, cost += STATES) {
    for (int s = 0; s < STATES; s++) {
      const Row zero = cost[s >> 1] + distance[subset[s]], one = cost[(s >> 1) + HALF] + distance[subset[STATES + s]];
      cost[STATES + s] = one < zero ? one : zero;
    }
  }
}

// The states of token k before every channel and after the last, from costs of `forward`.
void back(const Row* distance, int length, int subsets, const uint8_t* subset, const Row* cost, int k, int state,
          int* states) {
  states[length] = state;
  for (int t = length - 1; t >= 0; t--) {
    const Row *before = cost + t * STATES, *d = distance + t * subsets;
    const int a = state >> 1;
    const float x = before[a][k] + d[subset[state]][k], y = before[a + HALF][k] + d[subset[STATES + state]][k];
    states[t] = state = y < x ? a + HALF : a;
  }
}

int least(const Row* cost, int k) {
  int best = 0;
  for (int s = 1; s < STATES; s++)
    if (cost[s][k] < cost[best][k]) best = s;
  return best;
}

}  // namespace

// `x`: `count` tokens of `dim` channels in time. `levels`: by stored bits, then coded bits, of which there are `subsets`.
// `subset`: coded bits of all windows. Results: trellis bits and indices of levels, a byte each.
extern "C" void kvq_trellis_encode(const float* x, int64_t count, int dim, const float* levels, int stored, int subsets,
                                   const uint8_t* subset, int around, uint8_t* bits, uint8_t* index) {
  const int longest = std::max(dim, 2 * around);
  std::unique_ptr<Row[]> distance(new Row[(dim + 2 * around) * subsets]), cost(new Row[(longest + 1) * STATES]);
  std::unique_ptr<int[]> states(new int[longest + 1]);
  Row* ends = distance.get() + dim * subsets;
  for (int64_t first = 0; first < count; first += LANES) {
    const int lanes = (int)std::min<int64_t>(LANES, count - first);
    for (int t = 0; t < dim; t++) {
      for (int s = 0; s < subsets; s++) {
        for (int k = 0; k < LANES; k++) {
          const float z = x[(first + std::min(k, lanes - 1)) * dim + t];
          float nearest = FLT_MAX;
          for (int u = 0; u < stored; u++) {
            const float e = z - levels[u * subsets + s];
            nearest = std::min(nearest, e * e);
          }
          distance[t * subsets + s][k] = nearest;
        }
      }
    }
    std::memcpy(ends, distance.get() + (dim - around) * subsets, sizeof(Row) * around * subsets);
    std::memcpy(ends + around * subsets, distance.get(), sizeof(Row) * around * subsets);
    for (int s = 0; s < STATES; s++) cost[s] = Row{};
    forward(ends, 2 * around, subsets, subset, cost.get());
    int start[LANES];
    for (int k = 0; k < LANES; k++) {
      back(ends, 2 * around, subsets, subset, cost.get(), k, least(cost.get() + 2 * around * STATES, k), states.get());
      start[k] = states[around];
    }
    for (int s = 0; s < STATES; s++)
      for (int k = 0; k < LANES; k++) cost[s][k] = s == start[k] ? 0.0f : __builtin_inff();
    forward(distance.get(), dim, subsets, subset, cost.get());
    for (int k = 0; k < lanes; k++) {
      back(distance.get(), dim, subsets, subset, cost.get(), k, start[k], states.get());
      const float* token = x + (first + k) * dim;
      uint8_t *own_bits = bits + (first + k) * dim, *own_index = index + (first + k) * dim;
      for (int t = 0; t < dim; t++) {
        const int coded = subset[(states[t] >> (MEMORY - 1)) << MEMORY | states[t + 1]];
        int nearest = 0;
        float least_error = FLT_MAX;
        for (int u = 0; u < stored; u++) {
          const float e = token[t] - levels[u * subsets + coded];
          if (e * e < least_error) nearest = u, least_error = e * e;
        }
        own_bits[t] = states[t + 1] & 1;
        own_index[t] = nearest * subsets + coded;
      }
    }
  }
}
