// Functions of decode.h: one side's packed tokens, as its codec reads them.
//
// Defined before, besides the constants of lanes.h: KVQ_WARPS, KVQ_ROOT(SIDE), sqrt(D); kvq_level<SIDE>,
// kvq_read_codes<SIDE>, kvq_split_codes<SIDE> (lanes.py).
template <int SIDE>
KVQ_FUNC float kvq_level(float code);
template <int SIDE>
KVQ_FUNC void kvq_read_codes(KVQ_DEVICE const kvq_byte* plane0, KVQ_DEVICE const kvq_byte* plane1, kvq_long row,
                             int place, KVQ_PRIVATE kvq_uint* words);
template <int SIDE>
KVQ_FUNC void kvq_split_codes(KVQ_PRIVATE const kvq_uint* words, int place, KVQ_PRIVATE kvq_uint* codes);

// Of one head.
struct kvq_frame {
#if KVQ_FRAME
  KVQ_DEVICE const float* mean;  // then the constant, then the scales of pairs and of channels that do not turn
  KVQ_DEVICE const float* block_cos;
  KVQ_DEVICE const float* block_sin;
  KVQ_DEVICE const float* inner;
#endif
#if KVQ_VALUE_SCALES
  KVQ_DEVICE const float* channels;  // scales of the channels of values
#endif
  int block;  // of the first packed token's position
};

// Tokens of blocks [first, last), of 64 positions each, counted from the first packed token's; that token is number
// `skip` of block 0. `sizes` and `y` begin at the first token, planes `row` rows before it.
template <int SIDE, typename S, typename P>
KVQ_FUNC void kvq_decode(KVQ_DEVICE const kvq_byte* plane0, KVQ_DEVICE const kvq_byte* plane1, S sizes, kvq_long row,
                         KVQ_DEVICE const float* signs, KVQ_PRIVATE const kvq_frame& frame, P y, int first, int last,
                         int skip, int packed, int lane, int warp) {
  const int place = lane & (KVQ_PLACES(SIDE) - 1), step = KVQ_WARPS * KVQ_TOKENS(SIDE);
  float factor[16];
  kvq_read_row<SIDE>(signs, place, factor);
#if KVQ_VALUE_SCALES
  if (SIDE == 1) {
    float channel[16];
    kvq_read_row<1>(frame.channels, place, channel);
    KVQ_UNROLL
    for (int j = 0; j < 16; j++) factor[j] *= channel[j];
  }
#endif
#if KVQ_FRAME
  float steady[16];
  if (SIDE == 0) {
    kvq_read_row<0>(frame.mean + KVQ_DIM(0), place, steady);
    KVQ_UNROLL
    for (int j = 0; j < 16; j++) factor[j] *= 1.0f / frame.mean[2 * KVQ_DIM(0) + kvq_scale_index(kvq_channel<0>(j, place))];
  }
#endif
  KVQ_NO_UNROLL
  for (int block = first; block < last; block++) {
    const int i0 = warp * KVQ_TOKENS(SIDE) + lane / KVQ_PLACES(SIDE), token0 = 64 * block - skip + i0;
    kvq_uint words[KVQ_WORDS(SIDE)], next[KVQ_WORDS(SIDE)];
    int held = kvq_min(token0 < 0 ? 0 : token0, packed - 1);
    kvq_read_codes<SIDE>(plane0, plane1, row + held, place, next);
    float size, next_size = kvq_to_float(sizes[held]);
#if KVQ_FRAME
    float own[16], other[16];  // of the mean, turned to the block's start
    if (SIDE == 0) {
      kvq_read_mean(frame.mean, place, own, other);
#if KVQ_PAIRS
      float c[KVQ_TURNS], s[KVQ_TURNS];
      kvq_read_turns(frame.block_cos + (frame.block + block) * KVQ_PAIRS, place, 1.0f, c);
      kvq_read_turns(frame.block_sin + (frame.block + block) * KVQ_PAIRS, place, 0.0f, s);
      KVQ_UNROLL
      for (int j = 0; j < 16; j++) {
        const float turned = own[j] * c[kvq_turn(j)] + other[j] * s[kvq_turn(j)];
        other[j] = other[j] * c[kvq_turn(j)] - own[j] * s[kvq_turn(j)];
        own[j] = turned;
      }
      if (KVQ_PARTNER) kvq_pair_up(own, other);
#endif
    }
#endif
    KVQ_NO_UNROLL
    for (int i = i0; i < 64; i += step) {
      const int token = 64 * block - skip + i;
      KVQ_UNROLL
      for (int w = 0; w < KVQ_WORDS(SIDE); w++) words[w] = next[w];
      size = next_size;
      held = kvq_min(token + step < 0 ? 0 : token + step, packed - 1);
      if (i + step < 64) {
        kvq_read_codes<SIDE>(plane0, plane1, row + held, place, next);
        next_size = kvq_to_float(sizes[held]);
      }
#if KVQ_FRAME
      float c[KVQ_TURNS], s[KVQ_TURNS];
      if (SIDE == 0 && KVQ_PAIRS) {
        kvq_read_turns(frame.inner + i * 2 * KVQ_PAIRS, place, 1.0f, c);
        kvq_read_turns(frame.inner + (i * 2 + 1) * KVQ_PAIRS, place, 0.0f, s);
      }
#endif
      kvq_uint codes[4];
      kvq_split_codes<SIDE>(words, place, codes);
      float x[16];
      KVQ_UNROLL
      for (int j = 0; j < 16; j++) x[j] = kvq_level<SIDE>((float)(codes[j / 4] >> (j % 4 * 8) & 0xffu));
      kvq_token_hadamard<SIDE>(x, place);
      size *= 1.0f / KVQ_ROOT(SIDE);
      KVQ_UNROLL
      for (int j = 0; j < 16; j++) {
        const float turned = x[j] * factor[j];
        float more = 0.0f;
#if KVQ_FRAME
        if (SIDE == 0) {
          more = own[j];
          if (KVQ_PAIRS) more = own[j] * c[kvq_turn(j)] + other[j] * s[kvq_turn(j)];
          more += steady[j];
        }
#endif
        x[j] = turned * size + more;
      }
      if (token >= 0 && token < packed) kvq_write_row<SIDE>(y + (kvq_long)token * KVQ_DIM(SIDE), place, x);
    }
  }
}

// Rows [first, last) of the dense buffer `x`, of which the first `sinks` stay where they are; the others come after
// the packed tokens.
template <int SIDE, typename P, typename Q>
KVQ_FUNC void kvq_join(P x, Q y, int sinks, int packed, int first, int last, int index) {
  const int words = KVQ_ROW_BYTES(SIDE) / 16;
  KVQ_DEVICE const kvq_byte* from = (KVQ_DEVICE const kvq_byte*)x;
  KVQ_DEVICE kvq_byte* to = (KVQ_DEVICE kvq_byte*)y;
  KVQ_UNROLL4
  for (int i = first * words + index; i < last * words; i += 32 * KVQ_WARPS) {
    kvq_uint w[4];
    kvq_load16(from + (kvq_long)i * 16, w);
    kvq_store_words4(to + (i / words < sinks ? i : i + (kvq_long)packed * words) * 16, w[0], w[1], w[2], w[3]);
  }
}
