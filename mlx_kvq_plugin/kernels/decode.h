// Planes and dense tokens of some KV heads to dense keys and values in token order: sinks, packed, recent.
//
// Defined before, besides the constants of lanes.h: KVQ_WARPS, KVQ_BLOCKS (blocks of 64 positions of a group),
// KVQ_KEY_TYPE, KVQ_VALUE_TYPE, KVQ_KEY_SECOND, KVQ_VALUE_SECOND (the last plane of codes); by the prologue:
// first_head, heads, packed, row (of the first packed token in the planes), position (of that token), dense, sinks.
const int lane = KVQ_LANE, warp = KVQ_WARP;
const int side = KVQ_GROUP_Z % 2, batch = KVQ_GROUP_Z / 2, total = packed + dense, skip = position % 64;
const kvq_long plane = (kvq_long)batch * dense_keys_shape[1] + first_head + KVQ_GROUP_Y;
const kvq_long out = ((kvq_long)batch * heads + KVQ_GROUP_Y) * total;
const int blocks = (skip + packed + 63) / 64, groups = (blocks + KVQ_BLOCKS - 1) / KVQ_BLOCKS;

if (KVQ_GROUP_X < groups) {
  const int first = KVQ_GROUP_X * KVQ_BLOCKS, last = kvq_min(first + KVQ_BLOCKS, blocks);
  if (side == 0) {
    kvq_frame frame;
    frame.block = position / 64;
#if KVQ_FRAME
    frame.mean = frames + plane * KVQ_FRAME_SIZE;
#if KVQ_PAIRS
    frame.block_cos = block_cos;
    frame.block_sin = block_sin;
    frame.inner = inner;
#endif
#endif
    const kvq_long at = plane * key_scale_shape[2] + row;
    kvq_decode<0>((KVQ_DEVICE const kvq_byte*)key0, (KVQ_DEVICE const kvq_byte*)KVQ_KEY_SECOND, key_scale + at, at,
                  key_signs, frame, keys + (out + sinks) * KVQ_DIM(0), first, last, skip, packed, lane, warp);
  } else {
    kvq_frame frame = kvq_frame();
#if KVQ_VALUE_SCALES
    frame.channels = frames + plane * KVQ_FRAME_SIZE + KVQ_KEY_FRAME_SIZE;
#endif
    const kvq_long at = plane * value_scale_shape[2] + row;
    kvq_decode<1>((KVQ_DEVICE const kvq_byte*)value0, (KVQ_DEVICE const kvq_byte*)KVQ_VALUE_SECOND, value_scale + at,
                  at, value_signs, frame, values + (out + sinks) * KVQ_DIM(1), first, last, skip, packed, lane, warp);
  }
} else {
  const int first = (KVQ_GROUP_X - groups) * 64, last = kvq_min(first + 64, dense), rows = dense_keys_shape[2];
  if (side == 0)
    kvq_join<0>(dense_keys + plane * rows * KVQ_DIM(0), keys + out * KVQ_DIM(0), sinks, packed, first, last,
                KVQ_THREAD);
  else
    kvq_join<1>(dense_values + plane * rows * KVQ_DIM(1), values + out * KVQ_DIM(1), sinks, packed, first, last,
                KVQ_THREAD);
}
