// The end of attention: partial sums of all splits, the dense tokens, attention sinks; one group a query row.
//
// Loads that wait for nothing come first. Defined before, besides the constants of attend.h: KVQ_THREADS (a multiple of
// KVQ_DV and of 32), KVQ_CAUSAL, KVQ_SINKS (whether sink logits join the softmax), KVQ_DENSE_CHUNK; by the prologue:
// batch, head, n (query row), pointers of the dense tokens of this sequence and head, dense, sinks, packed, columns,
// splits, value_signs. With KVQ_PENDING, newer dense tokens of all sequences stand in one array of that many a sequence.
#if KVQ_PENDING
#define KVQ_DENSE_AT(name, j, size, c) \
  kvq_to_float((j) < dense ? dense_##name[(j) * size + (c)] : newest_##name[((j) - dense) * size + (c)])
const int tokens = dense + pending;
#else
#define KVQ_DENSE_AT(name, j, size, c) kvq_to_float(dense_##name[(j) * size + (c)])
const int tokens = dense;
#endif
const int lane = KVQ_LANE, warp = KVQ_WARP, channel = KVQ_THREAD % KVQ_DV, part = KVQ_THREAD / KVQ_DV;
const kvq_long query_row = (kvq_long)(batch * KVQ_HEADS + head) * KVQ_ROWS + n;
const kvq_long first_split = query_row * splits;
#define KVQ_PEAK(s) partial[(first_split + (s)) * KVQ_PARTIAL + KVQ_DV]
#define KVQ_TOTAL(s) partial[(first_split + (s)) * KVQ_PARTIAL + KVQ_DV + 1]

KVQ_SHARED_ARRAY(float, shared_scores, KVQ_DENSE_CHUNK);
KVQ_SHARED_ARRAY(float, shared_sums, KVQ_THREADS);
KVQ_SHARED_ARRAY(float, shared_more, KVQ_THREADS);
KVQ_SHARED_ARRAY(float, shared_packed, KVQ_DV);

float query[KVQ_DK / 32], ahead[KVQ_MERGE_AHEAD], values_ahead[KVQ_MERGE_AHEAD];
KVQ_UNROLL
for (int i = 0; i < KVQ_MERGE_AHEAD; i++) {
  const int s = part + i * KVQ_PARTS;
  ahead[i] = s < splits ? partial[(first_split + s) * KVQ_PARTIAL + channel] : 0.0f;
  values_ahead[i] = s < tokens ? KVQ_DENSE_AT(values, s, KVQ_DV, channel) : 0.0f;
}
KVQ_UNROLL
for (int i = 0; i < KVQ_DK / 32; i++)
  query[i] = kvq_to_float(queries[query_row * KVQ_DK + 32 * i + lane]) * (KVQ_SCALE * KVQ_LOG2E);

// Splits: their highest peak, the sum of their totals.
float peak = KVQ_LOWEST, total = 0.0f;
for (int s = lane; s < splits; s += 32) peak = kvq_max(peak, KVQ_PEAK(s));
peak = kvq_warp_max(peak);
for (int s = lane; s < splits; s += 32)
  total += KVQ_TOTAL(s) * kvq_exp2(KVQ_PEAK(s) - peak);
total = kvq_warp_sum(total);
float packed_sum = 0.0f, dense_sum = 0.0f;
KVQ_UNROLL
for (int i = 0; i < KVQ_MERGE_AHEAD; i++) {
  const int s = part + i * KVQ_PARTS;
  if (s < splits) packed_sum += ahead[i] * kvq_exp2(KVQ_PEAK(s) - peak);
}
KVQ_UNROLL4
for (int s = part + KVQ_MERGE_AHEAD * KVQ_PARTS; s < splits; s += KVQ_PARTS)
  packed_sum += partial[(first_split + s) * KVQ_PARTIAL + channel] * kvq_exp2(KVQ_PEAK(s) - peak);

float packed_weight = 1.0f;  // of the splits' sums, once other tokens have raised the peak
#if KVQ_SINKS
{
  const float logit = kvq_to_float(sink_logits[head * (KVQ_ROWS / KVQ_QUERIES) + n / KVQ_QUERIES]) * KVQ_LOG2E;
  const float highest = kvq_max(peak, logit), decay = kvq_exp2(peak - highest);
  packed_weight = decay;
  total = total * decay + kvq_exp2(logit - highest);
  peak = highest;
}
#endif

// Dense tokens, in chunks: the sinks first, then the recent ones.
KVQ_NO_UNROLL
for (int begin = 0; begin < tokens; begin += KVQ_DENSE_CHUNK) {
  const int count = kvq_min(tokens - begin, KVQ_DENSE_CHUNK);
  KVQ_UNROLL4
  for (int j = warp; j < count; j += KVQ_THREADS / 32) {
    const int token = begin + j, column = token < sinks ? token : token + packed;
    float score = 0.0f;
    KVQ_UNROLL
    for (int i = 0; i < KVQ_DK / 32; i++) score += query[i] * KVQ_DENSE_AT(keys, token, KVQ_DK, 32 * i + lane);
    score = kvq_warp_sum(score);
#if KVQ_SOFTCAP_ON
    score = kvq_capped(score);
#endif
#if KVQ_CAUSAL
    if (column > columns - KVQ_QUERIES + n % KVQ_QUERIES) score = 4.0f * KVQ_LOWEST;
#endif
#if KVQ_MASK
    score = kvq_masked(score, mask, batch, head, n, column, columns);
#endif
    if (lane == 0) shared_scores[j] = score;
  }
  KVQ_BARRIER();
  float highest = peak;
  for (int j = lane; j < count; j += 32) highest = kvq_max(highest, shared_scores[j]);
  highest = kvq_warp_max(highest);
  const float decay = kvq_exp2(peak - highest);
  peak = highest;
  float more = 0.0f;
  for (int j = lane; j < count; j += 32) more += kvq_exp2(shared_scores[j] - peak);
  total = total * decay + kvq_warp_sum(more);
  packed_weight *= decay;
  dense_sum *= decay;
  if (begin == 0) {
    KVQ_UNROLL
    for (int i = 0; i < KVQ_MERGE_AHEAD; i++) {
      const int j = part + i * KVQ_PARTS;
      if (j < count) dense_sum += kvq_exp2(shared_scores[j] - peak) * values_ahead[i];
    }
  }
  KVQ_UNROLL4
  for (int j = part + (begin == 0 ? KVQ_MERGE_AHEAD * KVQ_PARTS : 0); j < count; j += KVQ_PARTS)
    dense_sum += kvq_exp2(shared_scores[j] - peak) * KVQ_DENSE_AT(values, begin + j, KVQ_DV, channel);
  if (begin + KVQ_DENSE_CHUNK < tokens) KVQ_BARRIER();
}

shared_sums[KVQ_THREAD] = packed_sum;
shared_more[KVQ_THREAD] = dense_sum;
KVQ_BARRIER();
// Back from the transform domain: the transform is its own inverse but for the signs.
if (warp == 0) {
  float x[KVQ_DV / 32];
  KVQ_UNROLL
  for (int i = 0; i < KVQ_DV / 32; i++) {
    x[i] = 0.0f;
    KVQ_UNROLL
    for (int j = 0; j < KVQ_PARTS; j++) x[i] += shared_sums[j * KVQ_DV + 32 * i + lane];
  }
  kvq_hadamard<KVQ_DV / 32>(x, lane);
  KVQ_UNROLL
  for (int i = 0; i < KVQ_DV / 32; i++) shared_packed[32 * i + lane] = x[i] * value_signs[32 * i + lane];
}
KVQ_BARRIER();
if (part == 0) {
  float sum = shared_packed[channel] * packed_weight;
  KVQ_UNROLL
  for (int j = 0; j < KVQ_PARTS; j++) sum += shared_more[j * KVQ_DV + channel];
  kvq_store(output, query_row * KVQ_DV + channel, sum / total);
}
