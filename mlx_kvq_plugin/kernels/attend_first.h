// What a warp loads first: its first tile's codes, and for attend_bytes.h their scales and what turns the mean term's
// queries.
const int lane = KVQ_LANE, warp = KVQ_WARP, row = KVQ_ROW(lane), col = KVQ_COL(lane);
const int split = KVQ_GROUP_X - 1, packed_splits = splits - 1;
#if KVQ_SHARED_TURNS
#define KVQ_TURN_LOADS ((KVQ_PAIR_STEPS * 4 + KVQ_WARPS - 1) / KVQ_WARPS)
kvq_uint turn_words[KVQ_TURN_LOADS][4];
KVQ_UNROLL
for (int i = 0; i < KVQ_TURN_LOADS; i++) {
  const int at = 32 * KVQ_WARPS * i + KVQ_THREAD;
  if (at < KVQ_PAIR_STEPS * 4 * 32) kvq_load16(inner_turns + 16 * at, turn_words[i]);
}
#endif
const int last_tile = (packed - 1) / 64, stride = packed_splits * KVQ_WARPS;
const int first_tile = split * KVQ_WARPS + warp;
KVQ_DEVICE const kvq_byte* key_field[KVQ_KEY_FIELDS];
KVQ_DEVICE const kvq_byte* value_field[KVQ_VALUE_FIELDS];
kvq_uint key_words[4][2][KVQ_KEY_WORDS], value_words[4][4][KVQ_VALUE_WORDS];
#define KVQ_LOAD_KEYS(tile) \
  { \
    key_fields(KVQ_KEY_PLANES, (tile) * 64 + row, col, key_field); \
    KVQ_UNROLL \
    for (int sub = 0; sub < 4; sub++) { \
      key_load(key_field, col, 16 * sub, key_words[sub][0]); \
      key_load(key_field, col, 16 * sub + 8, key_words[sub][1]); \
    } \
  }
#if KVQ_BYTES
kvq_uint raw_sizes[4];  // scales of keys, and of values, of tokens `lane` and `lane + 32` of a tile
#define KVQ_LOAD_SIZES(tile) \
  { \
    KVQ_UNROLL \
    for (int i = 0; i < 2; i++) { \
      const int token = (tile) * 64 + 32 * i + lane; \
      raw_sizes[2 * i] = kvq_load2((KVQ_DEVICE const kvq_byte*)(key_scale + token)); \
      raw_sizes[2 * i + 1] = kvq_load2((KVQ_DEVICE const kvq_byte*)(value_scale + token)); \
    } \
  }
#endif
#if KVQ_AHEAD
#if KVQ_BYTES
KVQ_LOAD_SIZES(kvq_min(first_tile, last_tile));
#endif
KVQ_LOAD_KEYS(kvq_min(first_tile, last_tile));
#endif

#if KVQ_BYTES && KVQ_FRAME && KVQ_PAIR_STEPS
// The mean term's queries, turned to the tile that a warp is at: of rotary pairs 8 step + lane % 8, query lane / 8. They
// go through shared memory into the order of operands, and are turned on by the distance of a warp's tiles.
const int operands = warp * (KVQ_NT * 16 * KVQ_OPERANDS);
float first_cos[KVQ_PAIR_STEPS], first_sin[KVQ_PAIR_STEPS];
KVQ_UNROLL
for (int step = 0; step < KVQ_PAIR_STEPS; step++) {
  const int p = 8 * step + lane % 8;
  first_cos[step] = first_sin[step] = 0.0f;
  if (p < KVQ_PAIRS)
    kvq_load_floats(block_turns + 2 * (kvq_min(first_tile, last_tile) * KVQ_PAIRS + p), first_cos[step], first_sin[step]);
}
#define KVQ_STEP_LOADS ((8 * KVQ_PAIR_STEPS + 32 * KVQ_WARPS - 1) / (32 * KVQ_WARPS))
float step_cos[KVQ_STEP_LOADS], step_sin[KVQ_STEP_LOADS];
KVQ_UNROLL
for (int i = 0; i < KVQ_STEP_LOADS; i++) {
  const int p = 32 * KVQ_WARPS * i + KVQ_THREAD;
  step_cos[i] = step_sin[i] = 0.0f;
  if (p < KVQ_PAIRS && stride <= last_tile)  // else no warp has a second tile
    kvq_load_floats(block_turns + 2 * (stride * KVQ_PAIRS + p), step_cos[i], step_sin[i]);
}
#endif
