// The end of attention: the splits' sums of a query row, back from the transform domain; a warp for each row.
//
// A lane holds KVQ_DV / 32 neighbouring channels: the Hadamard transform leaves any order of channels that is an order of
// their numbers' bits. Defined before, besides the constants of attend.h: KVQ_MERGE_ROWS and KVQ_MERGE_WARPS of a group,
// KVQ_MERGE_AHEAD (splits loaded together, a divisor of 32), first_row, splits, value_signs; with KVQ_VALUE_SCALES
// value_channels, scales of the channels of this KV head's values.
#define KVQ_CHANNELS (KVQ_DV / 32)
const int merging_lane = KVQ_LANE;
for (int n = KVQ_WARP; n < KVQ_MERGE_ROWS && first_row + n < KVQ_ROWS; n += KVQ_MERGE_WARPS) {
  const kvq_long row = (kvq_long)(batch * KVQ_HEADS + head) * KVQ_ROWS + first_row + n;
  KVQ_DEVICE const float* parts = partial + row * splits * KVQ_PARTIAL;
  float highest = KVQ_LOWEST, total = 0.0f, sums[KVQ_CHANNELS];
  KVQ_UNROLL
  for (int i = 0; i < KVQ_CHANNELS; i++) sums[i] = 0.0f;
  for (int s = merging_lane; s < splits; s += 32) {
    float ends[2];
    kvq_load_stored<2>(parts + s * KVQ_PARTIAL + KVQ_DV, ends);
    highest = kvq_max(highest, ends[0]);
  }
  highest = kvq_warp_max(highest);
  KVQ_NO_UNROLL
  for (int begin = 0; begin < splits; begin += 32) {
    float share = 0.0f;  // of split `begin` + lane
    if (begin + merging_lane < splits) {
      float ends[2];
      kvq_load_stored<2>(parts + (begin + merging_lane) * KVQ_PARTIAL + KVQ_DV, ends);
      share = kvq_exp2(ends[0] - highest);
      total += ends[1] * share;
    }
    KVQ_NO_UNROLL
    for (int first = begin; first < kvq_min(splits, begin + 32); first += KVQ_MERGE_AHEAD) {
      float some[KVQ_MERGE_AHEAD][KVQ_CHANNELS];
      KVQ_UNROLL
      for (int i = 0; i < KVQ_MERGE_AHEAD; i++)  // a split that there is not gets no share
        kvq_load_stored<KVQ_CHANNELS>(
            parts + kvq_min(first + i, splits - 1) * KVQ_PARTIAL + KVQ_CHANNELS * merging_lane, some[i]);
      KVQ_UNROLL
      for (int i = 0; i < KVQ_MERGE_AHEAD; i++) {
        const float weight = kvq_shuffle(share, first - begin + i);
        KVQ_UNROLL
        for (int j = 0; j < KVQ_CHANNELS; j++) sums[j] += weight * some[i][j];
      }
    }
  }
  total = kvq_warp_sum(total);
  kvq_hadamard<KVQ_CHANNELS>(sums, merging_lane);
  KVQ_UNROLL
  for (int i = 0; i < KVQ_CHANNELS; i++) {
    const int channel = KVQ_CHANNELS * merging_lane + i;
    float found = sums[i] * value_signs[channel] / total;
#if KVQ_VALUE_SCALES
    found *= value_channels[channel];
#endif
    kvq_store(output, row * KVQ_DV + channel, found);
  }
}
