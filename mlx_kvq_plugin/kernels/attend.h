// Attention of a few query rows on packed keys and values, split over tokens: partial sums, each followed by the peak
// of its scores and the total of its weights.
//
// A group serves one KV head, up to KVQ_COLUMNS query rows and one split; each of its warps goes through tiles of 64
// tokens by itself. The body is three files: this one prepares queries, attend_halves.h or attend_bytes.h goes through
// the tiles, attend_end.h stores the sums. Keys are the rows of matrix products, decoded in registers; scores pass
// through a transposition of registers into the weights of the values, which are summed in the transform domain.
//
// Defined before: KVQ_DK, KVQ_DV, KVQ_ROWS (query rows of a KV head), KVQ_COLUMNS (KVQ_NT times 8, of bytes 4), KVQ_WARPS,
// KVQ_HEADS (KV heads), KVQ_SCALE, KVQ_SOFTCAP (0: none), KVQ_FRAME, KVQ_PAIRS, KVQ_HALF_LAYOUT, KVQ_MAGNITUDE,
// KVQ_MASK (0: none, 1: bool, 2: added float32), KVQ_MASK_BATCHES, KVQ_MASK_HEADS, KVQ_MASK_QUERIES, KVQ_QUERIES (L);
// KVQ_AHEAD (whether the codes of the next tile are loaded while this one's are used), KVQ_REGIONS;
// by the prologue: batch, the pointers of this sequence and head (from its first packed token on), packed, position,
// columns, sinks, splits, and the tables: key_signs, inner (cos, then sin, of places in a block), inner_turns (the same as
// operands), block_turns (cos and sin in turn, of blocks).
const int lane = KVQ_LANE, warp = KVQ_WARP, row = KVQ_ROW(lane), col = KVQ_COL(lane);
const int first_row = KVQ_GROUP_Y % KVQ_QUERY_TILES * KVQ_COLUMNS;

KVQ_SHARED_ARRAY(float, shared_rows, KVQ_REGIONS * KVQ_COLUMNS * KVQ_SHARED_DIM);
KVQ_SHARED_ARRAY(float, shared_factor, KVQ_COLUMNS);
KVQ_SHARED_ARRAY(float, shared_peak, KVQ_WARPS * KVQ_COLUMNS);
KVQ_SHARED_ARRAY(float, shared_total, KVQ_WARPS * KVQ_COLUMNS);
KVQ_SHARED_ARRAY(float, shared_size, KVQ_WARPS);
#if KVQ_FRAME
#if KVQ_SHARED_TURNS
KVQ_SHARED_ARRAY(kvq_uint, shared_turns, KVQ_PAIR_STEPS * 4 * 32 * 4);
#endif
KVQ_SHARED_ARRAY(float, shared_mean, KVQ_COLUMNS * KVQ_MEAN_STRIDE);
KVQ_SHARED_ARRAY(float, shared_mean_factor, KVQ_COLUMNS);
KVQ_SHARED_ARRAY(float, shared_constant, KVQ_COLUMNS);
#endif

#if KVQ_SHARED_TURNS
for (int i = KVQ_THREAD; i < KVQ_PAIR_STEPS * 4 * 32; i += 32 * KVQ_WARPS) {
  kvq_uint turn[4];
  kvq_load16(inner_turns + 16 * i, turn);
  KVQ_UNROLL
  for (int j = 0; j < 4; j++) shared_turns[4 * i + j] = turn[j];
}
#endif
// Queries in the transform domain, each divided by its largest entry, which half precision then cannot overflow.
for (int n = warp; n < KVQ_COLUMNS; n += KVQ_WARPS) {
  if (first_row + n >= KVQ_ROWS) {  // columns without a query
    for (int c = lane; c < KVQ_DK; c += 32) shared_rows[n * KVQ_SHARED_DIM + c] = 0.0f;
    if (lane == 0) shared_factor[n] = 0.0f;
#if KVQ_FRAME
    for (int c = lane; c < KVQ_MEAN_STRIDE; c += 32) shared_mean[n * KVQ_MEAN_STRIDE + c] = 0.0f;
    if (lane == 0) shared_mean_factor[n] = 0.0f, shared_constant[n] = 0.0f;
#endif
    continue;
  }
  const kvq_long at = ((kvq_long)(batch * KVQ_HEADS + head) * KVQ_ROWS + first_row + n) * KVQ_DK;
  float x[KVQ_DK / 32];
  KVQ_UNROLL
  for (int i = 0; i < KVQ_DK / 32; i++) {
    const int c = 32 * i + lane;
    x[i] = kvq_to_float(queries[at + c]) * key_signs[c];
#if KVQ_FRAME
    x[i] /= frame_scale[kvq_scale_index(c)];
#endif
  }
  kvq_hadamard<KVQ_DK / 32>(x, lane);
  float peak = 0.0f;
  KVQ_UNROLL
  for (int i = 0; i < KVQ_DK / 32; i++) peak = kvq_max(peak, kvq_abs(x[i]));
  peak = kvq_warp_max(peak);
  const float inverse = peak > 0.0f ? 1.0f / peak : 0.0f;
  KVQ_UNROLL
  for (int i = 0; i < KVQ_DK / 32; i++) shared_rows[n * KVQ_SHARED_DIM + 32 * i + lane] = x[i] * inverse;
  if (lane == 0) shared_factor[n] = peak * (KVQ_SCALE * KVQ_LOG2E);
#if KVQ_FRAME
  // q . R_n mu = sum over pairs of even cos(n theta) + odd sin(n theta), and a constant of channels that do not turn.
  float steady = 0.0f, size = 0.0f;
  for (int c = 2 * KVQ_PAIRS + lane; c < KVQ_DK; c += 32)
    steady += kvq_to_float(queries[at + c]) * frame_mean[c];
  float even[KVQ_PAIR_STEPS / 4 + 1], odd[KVQ_PAIR_STEPS / 4 + 1];
  KVQ_UNROLL
  for (int i = 0; i < KVQ_PAIR_STEPS / 4 + 1; i++) {
    const int p = 32 * i + lane;
    even[i] = 0.0f, odd[i] = 0.0f;
    if (p < KVQ_PAIRS) {
      const int c = kvq_first_channel(p), d = kvq_second_channel(p);
      const float q1 = kvq_to_float(queries[at + c]), q2 = kvq_to_float(queries[at + d]);
      const float a = (q1 * frame_mean[c] + q2 * frame_mean[d]) * KVQ_MAGNITUDE;
      const float b = (q2 * frame_mean[c] - q1 * frame_mean[d]) * KVQ_MAGNITUDE;
      // Turned to the first packed token: by the start of its block, then by its place in the block.
      const int block = 2 * (position / 64 * KVQ_PAIRS + p);
      const float c0 = block_turns[block], s0 = block_turns[block + 1];
      const float c1 = inner[position % 64 * 2 * KVQ_PAIRS + p], s1 = inner[(position % 64 * 2 + 1) * KVQ_PAIRS + p];
      const float turned_cos = c0 * c1 - s0 * s1, turned_sin = s0 * c1 + c0 * s1;
      even[i] = a * turned_cos + b * turned_sin;
      odd[i] = b * turned_cos - a * turned_sin;
      size = kvq_max(size, kvq_abs(even[i]) + kvq_abs(odd[i]));
    }
  }
  size = kvq_warp_max(size);
  const float smaller = size > 0.0f ? 1.0f / size : 0.0f;
  KVQ_UNROLL
  for (int i = 0; i < KVQ_PAIR_STEPS / 4 + 1; i++) {
    const int p = 32 * i + lane;
    if (p < 8 * KVQ_PAIR_STEPS) {
      shared_mean[n * KVQ_MEAN_STRIDE + 2 * p] = even[i] * smaller;
      shared_mean[n * KVQ_MEAN_STRIDE + 2 * p + 1] = odd[i] * smaller;
    }
  }
  steady = kvq_warp_sum(steady);
  if (lane == 0) shared_mean_factor[n] = size * (KVQ_SCALE * KVQ_LOG2E), shared_constant[n] = steady * (KVQ_SCALE * KVQ_LOG2E);
#endif
}
KVQ_BARRIER();

