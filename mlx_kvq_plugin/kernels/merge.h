// The end of attention: partial sums of all splits, the dense tokens, attention sinks; one group a query row.
//
// Defined before, besides the constants of attend.h: KVQ_THREADS (a multiple of KVQ_DV and of 32), KVQ_CAUSAL, KVQ_SINKS
// (whether sink logits join the softmax); by the prologue: batch, head, n (query row), pointers of the dense tokens of this
// sequence and head, dense, sinks, packed, columns, splits.
const int lane = KVQ_LANE, warp = KVQ_WARP, channel = KVQ_THREAD % KVQ_DV, part = KVQ_THREAD / KVQ_DV;
const kvq_long query_row = (kvq_long)(batch * KVQ_HEADS + head) * KVQ_ROWS + n;

KVQ_SHARED_ARRAY(float, shared_scores, KVQ_DENSE_CHUNK);
KVQ_SHARED_ARRAY(float, shared_sums, KVQ_THREADS);
KVQ_SHARED_ARRAY(float, shared_packed, KVQ_DV);


float query[KVQ_DK / 32];
KVQ_UNROLL
for (int i = 0; i < KVQ_DK / 32; i++) query[i] = kvq_to_float(queries[query_row * KVQ_DK + 32 * i + lane]) * (KVQ_SCALE * KVQ_LOG2E);

// Splits: one peak, one total, one weighted sum.
float peak = KVQ_LOWEST, total = 0.0f, sum = 0.0f;
for (int s = lane; s < splits; s += 32) peak = kvq_max(peak, statistics[(query_row * splits + s) * 2]);
peak = kvq_warp_max(peak);
for (int s = lane; s < splits; s += 32)
  total += statistics[(query_row * splits + s) * 2 + 1] * kvq_exp2(statistics[(query_row * splits + s) * 2] - peak);
total = kvq_warp_sum(total);
KVQ_UNROLL4
for (int s = part; s < splits; s += KVQ_THREADS / KVQ_DV)
  sum += partial[(query_row * splits + s) * KVQ_DV + channel] * kvq_exp2(statistics[(query_row * splits + s) * 2] - peak);
shared_sums[KVQ_THREAD] = sum;
KVQ_BARRIER();
if (part == 0) {
  KVQ_UNROLL
  for (int i = 1; i < KVQ_THREADS / KVQ_DV; i++) sum += shared_sums[i * KVQ_DV + channel];
  shared_packed[channel] = sum;
}
KVQ_BARRIER();

// Back from the transform domain: the transform is its own inverse but for the signs.
if (warp == 0) {
  float x[KVQ_DV / 32];
  KVQ_UNROLL
  for (int i = 0; i < KVQ_DV / 32; i++) x[i] = shared_packed[32 * i + lane];
  kvq_hadamard<KVQ_DV / 32>(x, lane);
  KVQ_UNROLL
  for (int i = 0; i < KVQ_DV / 32; i++) shared_packed[32 * i + lane] = x[i] * value_signs[32 * i + lane];
}
KVQ_BARRIER();

sum = part == 0 ? shared_packed[channel] : 0.0f;
#if KVQ_SINKS
{
  const float logit = kvq_to_float(sink_logits[head * (KVQ_ROWS / KVQ_QUERIES) + n / KVQ_QUERIES]) * KVQ_LOG2E;
  const float highest = kvq_max(peak, logit), decay = kvq_exp2(peak - highest);
  sum *= decay;
  total = total * decay + kvq_exp2(logit - highest);
  peak = highest;
}
#endif

// Dense tokens, in chunks: the sinks first, then the recent ones.
KVQ_NO_UNROLL
for (int begin = 0; begin < dense; begin += KVQ_DENSE_CHUNK) {
  const int count = dense - begin < KVQ_DENSE_CHUNK ? dense - begin : KVQ_DENSE_CHUNK;
  for (int j = warp; j < count; j += KVQ_THREADS / 32) {
    const int token = begin + j, column = token < sinks ? token : token + packed;
    float score = 0.0f;
    KVQ_UNROLL
    for (int i = 0; i < KVQ_DK / 32; i++) score += query[i] * kvq_to_float(dense_keys[(kvq_long)token * KVQ_DK + 32 * i + lane]);
    score = kvq_warp_sum(score);
#if KVQ_SOFTCAP_ON
    score = KVQ_SOFTCAP * KVQ_LOG2E * kvq_tanh(score * (1.0f / (KVQ_SOFTCAP * KVQ_LOG2E)));
#endif
#if KVQ_CAUSAL
    if (column > columns - KVQ_QUERIES + n % KVQ_QUERIES) score = 2.0f * KVQ_LOWEST;
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
  sum *= decay;
  KVQ_UNROLL4
  for (int j = part; j < count; j += KVQ_THREADS / KVQ_DV)
    sum += kvq_exp2(shared_scores[j] - peak) * kvq_to_float(dense_values[(kvq_long)(begin + j) * KVQ_DV + channel]);
  KVQ_BARRIER();
}

shared_sums[KVQ_THREAD] = sum;
KVQ_BARRIER();
if (part == 0) {
  KVQ_UNROLL
  for (int i = 1; i < KVQ_THREADS / KVQ_DV; i++) sum += shared_sums[i * KVQ_DV + channel];
  kvq_store(output, query_row * KVQ_DV + channel, sum / total);
}
