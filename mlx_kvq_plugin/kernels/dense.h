// Attention of a group's query rows on the dense tokens, and on a sink logit: the first of the splits, whose sums go
// into the transform domain as those of packed tokens do. The groups of packed tokens are what follows `else`.
//
// Defined before, besides the constants of attend.h: KVQ_DENSE_CHUNK (tokens whose scores are in shared memory at a
// time), KVQ_CAUSAL, KVQ_SINKS (whether sink logits join the softmax), KVQ_PENDING; by the prologue: pointers of the dense
// tokens of this sequence and head, dense, sinks, packed, columns, value_signs, value_channels. With KVQ_PENDING, newer
// dense tokens of all sequences stand in one array of that many a sequence.
if (KVQ_GROUP_X == 0) {
#if KVQ_PENDING
#define KVQ_DENSE_AT(name, j, size, c) \
  kvq_to_float((j) < dense ? dense_##name[(j) * size + (c)] : newest_##name[((j) - dense) * size + (c)])
  const int tokens = dense + pending;
#else
#define KVQ_DENSE_AT(name, j, size, c) kvq_to_float(dense_##name[(j) * size + (c)])
  const int tokens = dense;
#endif
#define KVQ_ROWS_OF_WARP ((KVQ_COLUMNS + KVQ_WARPS - 1) / KVQ_WARPS)
  const int lane = KVQ_LANE, warp = KVQ_WARP, rows = kvq_min(KVQ_COLUMNS, KVQ_ROWS - first_row);
  const kvq_long query_row = (kvq_long)(batch * KVQ_HEADS + head) * KVQ_ROWS + first_row;
  for (int i = KVQ_THREAD; i < rows * KVQ_DK; i += 32 * KVQ_WARPS)
    shared_rows[i] = KVQ_QUERY(first_row + i / KVQ_DK, i % KVQ_DK) * (KVQ_SCALE * KVQ_LOG2E);
  KVQ_BARRIER();

  float peak[KVQ_ROWS_OF_WARP], total[KVQ_ROWS_OF_WARP], sums[KVQ_ROWS_OF_WARP][KVQ_DV / 32];
  KVQ_UNROLL
  for (int r = 0; r < KVQ_ROWS_OF_WARP; r++) {
    peak[r] = KVQ_LOWEST, total[r] = 0.0f;
    KVQ_UNROLL
    for (int i = 0; i < KVQ_DV / 32; i++) sums[r][i] = 0.0f;
#if KVQ_SINKS
    const int n = warp + r * KVQ_WARPS;
    if (n < rows) {
      const int query_head = head * (KVQ_ROWS / KVQ_QUERIES) + (first_row + n) / KVQ_QUERIES;
      const float logit = kvq_to_float(sink_logits[query_head]) * KVQ_LOG2E;
      peak[r] = kvq_max(peak[r], logit), total[r] = kvq_exp2(logit - peak[r]);
    }
#endif
  }
  KVQ_NO_UNROLL
  for (int begin = 0; begin < tokens; begin += KVQ_DENSE_CHUNK) {
    const int count = kvq_min(tokens - begin, KVQ_DENSE_CHUNK);
    KVQ_UNROLL4
    for (int j = warp; j < count; j += KVQ_WARPS) {
      const int token = begin + j, column = token < sinks ? token : token + packed;
      float key[KVQ_DK / 32];
      KVQ_UNROLL
      for (int i = 0; i < KVQ_DK / 32; i++) key[i] = KVQ_DENSE_AT(keys, token, KVQ_DK, 32 * i + lane);
      KVQ_UNROLL4
      for (int n = 0; n < rows; n++) {
        float score = 0.0f;
        KVQ_UNROLL
        for (int i = 0; i < KVQ_DK / 32; i++) score += key[i] * shared_rows[n * KVQ_DK + 32 * i + lane];
        score = kvq_warp_sum(score);
#if KVQ_SOFTCAP_ON
        score = kvq_capped(score);
#endif
#if KVQ_CAUSAL
        if (column > columns - KVQ_QUERIES + (first_row + n) % KVQ_QUERIES) score = 4.0f * KVQ_LOWEST;
#endif
#if KVQ_MASK
        score = kvq_masked(score, mask, batch, head, first_row + n, column, columns);
#endif
        if (lane == 0) shared_scores[n * KVQ_DENSE_CHUNK + j] = score;
      }
    }
    KVQ_BARRIER();
    KVQ_UNROLL
    for (int r = 0; r < KVQ_ROWS_OF_WARP; r++) {
      const int n = warp + r * KVQ_WARPS;
      if (n < rows) {
        float highest = peak[r], weights[KVQ_DENSE_CHUNK / 32], more = 0.0f;
        KVQ_UNROLL
        for (int i = 0; i < KVQ_DENSE_CHUNK / 32; i++) {
          weights[i] = 32 * i + lane < count ? shared_scores[n * KVQ_DENSE_CHUNK + 32 * i + lane] : 4.0f * KVQ_LOWEST;
          highest = kvq_max(highest, weights[i]);
        }
        highest = kvq_warp_max(highest);
        const float decay = kvq_exp2(peak[r] - highest);
        peak[r] = highest;
        KVQ_UNROLL
        for (int i = 0; i < KVQ_DENSE_CHUNK / 32; i++) {
          weights[i] = kvq_exp2(weights[i] - highest);
          more += weights[i];
        }
        total[r] = total[r] * decay + kvq_warp_sum(more);
        KVQ_UNROLL
        for (int i = 0; i < KVQ_DV / 32; i++) sums[r][i] *= decay;
        KVQ_UNROLL
        for (int part = 0; part < KVQ_DENSE_CHUNK / 32; part++) {
          const int some = kvq_min(count - 32 * part, 32);
          KVQ_UNROLL8
          for (int j = 0; j < some; j++) {
            const float weight = kvq_shuffle(weights[part], j);
            KVQ_UNROLL
            for (int i = 0; i < KVQ_DV / 32; i++)
              sums[r][i] += weight * KVQ_DENSE_AT(values, begin + 32 * part + j, KVQ_DV, 32 * i + lane);
          }
        }
      }
    }
    if (begin + KVQ_DENSE_CHUNK < tokens) KVQ_BARRIER();
  }

  KVQ_UNROLL
  for (int r = 0; r < KVQ_ROWS_OF_WARP; r++) {
    const int n = warp + r * KVQ_WARPS;
    if (n < rows) {
      KVQ_UNROLL
      for (int i = 0; i < KVQ_DV / 32; i++) sums[r][i] *= value_signs[32 * i + lane];
#if KVQ_VALUE_SCALES
      KVQ_UNROLL
      for (int i = 0; i < KVQ_DV / 32; i++) sums[r][i] /= value_channels[32 * i + lane];
#endif
      kvq_hadamard<KVQ_DV / 32>(sums[r], lane);
      KVQ_DEVICE float* own = partial + (query_row + n) * splits * KVQ_PARTIAL;
      KVQ_UNROLL
      for (int i = 0; i < KVQ_DV / 32; i++) own[32 * i + lane] = sums[r][i];
      if (lane == 0) own[KVQ_DV] = peak[r], own[KVQ_DV + 1] = total[r];
    }
  }
} else {
