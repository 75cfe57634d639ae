// The group's sums, peaks and totals, from shared memory.
const kvq_long out_row = (kvq_long)(batch * KVQ_HEADS + head) * KVQ_ROWS + first_row;
for (int i = KVQ_THREAD; i < KVQ_COLUMNS * KVQ_DV; i += 32 * KVQ_WARPS) {
  const int n = i / KVQ_DV;
  if (first_row + n < KVQ_ROWS) {
    float sum = 0.0f;
    KVQ_UNROLL
    for (int r = 0; r < KVQ_REGIONS; r++) sum += shared_rows[(r * KVQ_COLUMNS + n) * KVQ_SHARED_DIM + i % KVQ_DV];
    partial[((out_row + n) * splits + KVQ_GROUP_X) * KVQ_PARTIAL + i % KVQ_DV] = sum;
  }
}
for (int n = KVQ_THREAD; n < KVQ_COLUMNS; n += 32 * KVQ_WARPS) {
  if (first_row + n < KVQ_ROWS) {
    float highest = KVQ_LOWEST, sum = 0.0f;
    for (int w = 0; w < KVQ_WARPS; w++) highest = kvq_max(highest, shared_peak[w * KVQ_COLUMNS + n]);
    for (int w = 0; w < KVQ_WARPS; w++)
      sum += shared_total[w * KVQ_COLUMNS + n] * kvq_exp2(shared_peak[w * KVQ_COLUMNS + n] - highest);
    partial[((out_row + n) * splits + KVQ_GROUP_X) * KVQ_PARTIAL + KVQ_DV] = highest;
    partial[((out_row + n) * splits + KVQ_GROUP_X) * KVQ_PARTIAL + KVQ_DV + 1] = sum;
  }
}
}
