// Tokens of dense keys and values to planes of codes, and the rest of the dense tokens to smaller buffers.
//
// Defined before, besides the constants of lanes.h: KVQ_WARPS, KVQ_TILE (tokens of a group), KVQ_COMPACT,
// KVQ_KEY_TYPE, KVQ_VALUE_TYPE, KVQ_KEY_SECOND, KVQ_VALUE_SECOND (the last plane of codes); by the prologue: start,
// count, position (of the first token), dense, capacity (rows of the new buffers).
const int lane = KVQ_LANE, warp = KVQ_WARP;
const int head = KVQ_GROUP_Y, side = KVQ_GROUP_Z % 2, batch = KVQ_GROUP_Z / 2;
const kvq_long plane = (kvq_long)batch * dense_keys_shape[1] + head;
const int rows = dense_keys_shape[2], tiles = (count + KVQ_TILE - 1) / KVQ_TILE;
#if KVQ_TRELLIS
KVQ_SHARED_ARRAY(float, shared_tokens, KVQ_WARPS * 32 * 16);
KVQ_SHARED_ARRAY(kvq_uint, shared_distance, KVQ_WARPS * 4 * KVQ_DISTANCES);
KVQ_SHARED_ARRAY(kvq_uint, shared_bits, KVQ_WARPS * 16);
KVQ_SHARED_ARRAY(kvq_uint, shared_planes, KVQ_WARPS * 48);
kvq_workspace work;
work.tokens = shared_tokens + warp * (32 * 16);
work.distance = shared_distance + warp * (4 * KVQ_DISTANCES);
work.bits = shared_bits + warp * 16;
work.planes = shared_planes + warp * 48;
#else
const kvq_workspace work = kvq_workspace();
#endif

if (KVQ_GROUP_X < tiles) {
  const int first = KVQ_GROUP_X * KVQ_TILE, last = kvq_min(first + KVQ_TILE, count);
  if (side == 0) {
    KVQ_DEVICE const KVQ_KEY_TYPE* x = (KVQ_DEVICE const KVQ_KEY_TYPE*)dense_keys + (plane * rows + start) * KVQ_DIM(0);
    kvq_frame frame;
#if KVQ_FRAME
    frame.mean = frames + plane * KVQ_FRAME_SIZE;
#if KVQ_PAIRS
    frame.block_cos = block_cos;
    frame.block_sin = block_sin;
    frame.inner = inner;
#endif
    frame.position = position;
#endif
    kvq_encode<0>(x, key_signs, frame, key0, KVQ_KEY_SECOND, key_scale, plane * count, first, last, work, lane,
                  warp);
  } else {
    KVQ_DEVICE const KVQ_VALUE_TYPE* x =
        (KVQ_DEVICE const KVQ_VALUE_TYPE*)dense_values + (plane * rows + start) * KVQ_DIM(1);
    kvq_frame frame = kvq_frame();
#if KVQ_VALUE_SCALES
    frame.channels = frames + plane * KVQ_FRAME_SIZE + KVQ_KEY_FRAME_SIZE;
#endif
    kvq_encode<1>(x, value_signs, frame, value0, KVQ_VALUE_SECOND, value_scale, plane * count, first, last, work, lane,
                  warp);
  }
}
#if KVQ_COMPACT
else {
  const int first = (KVQ_GROUP_X - tiles) * KVQ_TILE, last = kvq_min(first + KVQ_TILE, capacity);
  if (side == 0)
    kvq_compact<0>(dense_keys + plane * rows * KVQ_DIM(0), new_keys + plane * capacity * KVQ_DIM(0), start, count,
                   dense, first, last, KVQ_THREAD);
  else
    kvq_compact<1>(dense_values + plane * rows * KVQ_DIM(1), new_values + plane * capacity * KVQ_DIM(1), start, count,
                   dense, first, last, KVQ_THREAD);
}
#endif
