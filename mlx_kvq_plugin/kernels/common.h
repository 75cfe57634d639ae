// Functions that kernels of attention share. KVQ_PAIRS, KVQ_HALF_LAYOUT and the mask's constants are defined before.
#define KVQ_LOG2E 1.4426950408889634f
#define KVQ_LOWEST -1.0e30f
#define KVQ_WEIGHT_PEAK 1024.0f
#define KVQ_QUERY_UNITS 16256.0f
#define KVQ_WEIGHT_UNITS 16383.0f
#define KVQ_SMALLEST_SIZE 8.6736174e-19f  // 2^-60: of a scale of values, whose inverse weights are multiplied by

KVQ_FUNC float kvq_warp_max(float x) {
  KVQ_UNROLL
  for (int mask = 16; mask > 0; mask >>= 1) x = kvq_max(x, kvq_shuffle_xor(x, mask));
  return x;
}
KVQ_FUNC float kvq_warp_sum(float x) {
  KVQ_UNROLL
  for (int mask = 16; mask > 0; mask >>= 1) x += kvq_shuffle_xor(x, mask);
  return x;
}
// Over the eight lanes that hold the same columns.
KVQ_FUNC float kvq_row_max(float x) {
  KVQ_UNROLL
  for (int i = 0; i < 3; i++) x = kvq_max(x, kvq_shuffle_xor(x, KVQ_ROW_BIT(i)));
  return x;
}
KVQ_FUNC float kvq_row_sum(float x) {
  KVQ_UNROLL
  for (int i = 0; i < 3; i++) x += kvq_shuffle_xor(x, KVQ_ROW_BIT(i));
  return x;
}

#if KVQ_SOFTCAP_ON
// A score, in exponents of two, after the soft cap.
KVQ_FUNC float kvq_capped(float score) {
  return KVQ_SOFTCAP * KVQ_LOG2E * kvq_tanh(score * (1.0f / (KVQ_SOFTCAP * KVQ_LOG2E)));
}
#endif

// u (u^2 + k) of both halves.
KVQ_FUNC kvq_uint kvq_cubic(kvq_uint u, kvq_uint k) { return kvq_hmul2(kvq_hfma2(u, u, k), u); }

// Orthonormal Hadamard transform of 32 N numbers, of which a lane holds number 32 i + lane as x[i].
template <int N>
KVQ_FUNC void kvq_hadamard(KVQ_PRIVATE float* x, int lane) {
  KVQ_UNROLL
  for (int step = 1; step < N; step *= 2) {
    KVQ_UNROLL
    for (int i = 0; i < N; i++) {
      if ((i & step) == 0) {
        const float a = x[i], b = x[i + step];
        x[i] = a + b;
        x[i + step] = a - b;
      }
    }
  }
  KVQ_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) {
    KVQ_UNROLL
    for (int i = 0; i < N; i++) {
      const float other = kvq_shuffle_xor(x[i], mask);
      x[i] = (lane & mask) ? other - x[i] : x[i] + other;
    }
  }
  const float size = kvq_rsqrt(32.0f * N);
  KVQ_UNROLL
  for (int i = 0; i < N; i++) x[i] *= size;
}

// Channels of rotary pair p, and the place of channel c in a frame's scales: pairs first, then channels that do not turn.
KVQ_FUNC int kvq_first_channel(int p) { return KVQ_HALF_LAYOUT ? p : 2 * p; }
KVQ_FUNC int kvq_second_channel(int p) { return KVQ_HALF_LAYOUT ? p + KVQ_PAIRS : 2 * p + 1; }
KVQ_FUNC int kvq_scale_index(int c) {
  if (c >= 2 * KVQ_PAIRS) return c - KVQ_PAIRS;
  return KVQ_HALF_LAYOUT ? (c < KVQ_PAIRS ? c : c - KVQ_PAIRS) : c / 2;
}

#if KVQ_MASK
// A score of query row n of a KV head and one column of a mask (batches, heads, queries, columns); 1s do not vary.
template <typename M>
KVQ_FUNC float kvq_masked(float score, M mask, int batch, int head, int n, int column, int columns) {
  const kvq_long b = KVQ_MASK_BATCHES > 1 ? batch : 0;
  const kvq_long h = KVQ_MASK_HEADS > 1 ? head * (KVQ_ROWS / KVQ_QUERIES) + n / KVQ_QUERIES : 0;
  const kvq_long l = KVQ_MASK_QUERIES > 1 ? n % KVQ_QUERIES : 0;
  const kvq_long at = ((b * KVQ_MASK_HEADS + h) * KVQ_MASK_QUERIES + l) * columns + column;
#if KVQ_MASK == 1
  return mask[at] ? score : KVQ_LOWEST;
#else
  return kvq_max(score + mask[at] * KVQ_LOG2E, KVQ_LOWEST);
#endif
}
#endif
