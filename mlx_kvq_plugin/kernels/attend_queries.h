#define KVQ_MEAN_PARTS ((KVQ_PAIR_STEPS + 3) / 4 + (KVQ_PAIR_STEPS == 0))
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
  float x[KVQ_DK / 32];
#if KVQ_FRAME
  // q . (R_n mu + c) = sum over pairs of even cos(n theta) + odd sin(n theta), and what is the same for all tokens.
  float steady = 0.0f, size = 0.0f;
#endif
  KVQ_UNROLL
  for (int i = 0; i < KVQ_DK / 32; i++) {
    const int c = 32 * i + lane;
    x[i] = KVQ_QUERY(first_row + n, c);
#if KVQ_FRAME
    steady += x[i] * (frame_steady[c] + (c < 2 * KVQ_PAIRS ? 0.0f : frame_mean[c]));
    x[i] /= frame_scale[kvq_scale_index(c)];
#endif
    x[i] *= key_signs[c];
  }
#if KVQ_FRAME
  float even[KVQ_MEAN_PARTS], odd[KVQ_MEAN_PARTS];
  KVQ_UNROLL
  for (int i = 0; i < KVQ_MEAN_PARTS; i++) {
    const int p = 32 * i + lane;
    even[i] = 0.0f, odd[i] = 0.0f;
    if (p < KVQ_PAIRS) {
      const int c = kvq_first_channel(p), d = kvq_second_channel(p);
      const float q1 = KVQ_QUERY(first_row + n, c), q2 = KVQ_QUERY(first_row + n, d);
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
#endif
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
  size = kvq_warp_max(size);
  const float smaller = size > 0.0f ? 1.0f / size : 0.0f;
  KVQ_UNROLL
  for (int i = 0; i < KVQ_MEAN_PARTS; i++) {
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
#if KVQ_SHARED_TURNS
KVQ_UNROLL
for (int i = 0; i < KVQ_TURN_LOADS; i++) {
  const int at = 32 * KVQ_WARPS * i + KVQ_THREAD;
  if (at < KVQ_PAIR_STEPS * 4 * 32) {
    KVQ_UNROLL
    for (int j = 0; j < 4; j++) shared_turns[4 * at + j] = turn_words[i][j];
  }
}
#endif
#if KVQ_BYTES && KVQ_FRAME && KVQ_PAIR_STEPS
KVQ_UNROLL
for (int i = 0; i < KVQ_STEP_LOADS; i++) {
  const int p = 32 * KVQ_WARPS * i + KVQ_THREAD;
  if (p < 8 * KVQ_PAIR_STEPS) shared_steps[2 * p] = step_cos[i], shared_steps[2 * p + 1] = step_sin[i];
}
#endif
KVQ_BARRIER();
