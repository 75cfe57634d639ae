// Functions of encode.h: one side's tokens, as its codec does it.
//
// Defined before, besides the constants of lanes.h: KVQ_ROOT(SIDE), sqrt(D); KVQ_SCALING(SIDE): 0 least squares, 1
// norm, 2 unbiased; KVQ_CODED(SIDE): coded bits of a trellis code; kvq_code<SIDE>, kvq_level<SIDE>,
// kvq_write_codes<SIDE> (lanes.py).
template <int SIDE>
KVQ_FUNC int kvq_code(float z);
template <int SIDE>
KVQ_FUNC float kvq_level(float code);
template <int SIDE>
KVQ_FUNC void kvq_write_codes(KVQ_DEVICE kvq_byte* plane0, KVQ_DEVICE kvq_byte* plane1, kvq_long row, int place,
                              bool used, KVQ_PRIVATE const kvq_uint* codes);

#if KVQ_TRELLIS  // a warp encodes once: what a lane holds of tokens and frame must not live through Viterbi's algorithm
#define KVQ_ONCE(SIDE) (KVQ_TILE <= KVQ_WARPS * KVQ_TOKENS(SIDE))
#else
#define KVQ_ONCE(SIDE) 0
struct kvq_workspace {};
#endif

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
  int position;
};

#if KVQ_FRAME
// R_n mean of the channels of a place, for the token at `position`.
KVQ_FUNC void kvq_turned_mean(KVQ_PRIVATE const kvq_frame& frame, int position, int place, KVQ_PRIVATE const float* own,
                              KVQ_PRIVATE const float* other, KVQ_PRIVATE float* turned) {
#if KVQ_PAIRS
  float c0[KVQ_TURNS], s0[KVQ_TURNS], c1[KVQ_TURNS], s1[KVQ_TURNS];
  kvq_read_turns(frame.block_cos + position / 64 * KVQ_PAIRS, place, 1.0f, c0);
  kvq_read_turns(frame.block_sin + position / 64 * KVQ_PAIRS, place, 0.0f, s0);
  kvq_read_turns(frame.inner + position % 64 * 2 * KVQ_PAIRS, place, 1.0f, c1);
  kvq_read_turns(frame.inner + (position % 64 * 2 + 1) * KVQ_PAIRS, place, 0.0f, s1);
  KVQ_UNROLL
  for (int t = 0; t < KVQ_TURNS; t++) {
    const float c = c0[t] * c1[t] - s0[t] * s1[t];
    s0[t] = s0[t] * c1[t] + c0[t] * s1[t];
    c0[t] = c;
  }
  KVQ_UNROLL
  for (int j = 0; j < 16; j++) turned[j] = own[j] * c0[kvq_turn(j)] + other[j] * s0[kvq_turn(j)];
#else
  KVQ_UNROLL
  for (int j = 0; j < 16; j++) turned[j] = own[j];
#endif
}
#endif

// Tokens [first, last) of rows `x` to rows `at` + token of the planes.
template <int SIDE, typename P>
KVQ_FUNC void kvq_encode(P x, KVQ_DEVICE const float* signs, KVQ_PRIVATE const kvq_frame& frame,
                         KVQ_DEVICE kvq_byte* plane0, KVQ_DEVICE kvq_byte* plane1, KVQ_DEVICE kvq_bfloat* scales,
                         kvq_long at, int first, int last, KVQ_PRIVATE const kvq_workspace& work, int lane, int warp) {
  const int place = lane & (KVQ_PLACES(SIDE) - 1), own_token = lane / KVQ_PLACES(SIDE);
  float sign[16];
  kvq_read_row<SIDE>(signs, place, sign);
#if KVQ_VALUE_SCALES
  if (SIDE == 1) {
    float channel[16];
    kvq_read_row<1>(frame.channels, place, channel);
    KVQ_UNROLL
    for (int j = 0; j < 16; j++) sign[j] /= channel[j];
  }
#endif
#if KVQ_FRAME
  float own[16], other[16], steady[16], scale[16];
  if (SIDE == 0) {
    kvq_read_mean(frame.mean, place, own, other);
    kvq_read_row<0>(frame.mean + KVQ_DIM(0), place, steady);
    KVQ_UNROLL
    for (int j = 0; j < 16; j++) scale[j] = frame.mean[2 * KVQ_DIM(0) + kvq_scale_index(kvq_channel<0>(j, place))] * sign[j];
  }
#endif
  KVQ_NO_UNROLL
  for (int base = first + warp * KVQ_TOKENS(SIDE); base < last; base += KVQ_WARPS * KVQ_TOKENS(SIDE)) {
    const int token = kvq_min(base + own_token, last - 1);
    const bool used = base + own_token < last;
    float y[16];
    kvq_read_row<SIDE>(x + (kvq_long)token * KVQ_DIM(SIDE), place, y);
#if KVQ_FRAME
    if (SIDE == 0) {
      float mean[16];
      kvq_turned_mean(frame, frame.position + token, place, own, other, mean);
      KVQ_UNROLL
      for (int j = 0; j < 16; j++) y[j] = (y[j] - (mean[j] + steady[j])) * scale[j];
    }
#endif
    if (SIDE == 1 || !KVQ_FRAME) {
      KVQ_UNROLL
      for (int j = 0; j < 16; j++) y[j] *= sign[j];
    }
    kvq_token_hadamard<SIDE>(y, place);
    float energy = 0.0f;
    KVQ_UNROLL
    for (int j = 0; j < 16; j++) {
      y[j] *= 1.0f / KVQ_ROOT(SIDE);
      energy += y[j] * y[j];
    }
    energy = kvq_token_sum<SIDE>(energy);

    const float inverse = kvq_rsqrt(kvq_max(energy, 1.0e-37f)) * KVQ_ROOT(SIDE);
    float product = 0.0f, size = 0.0f;
    kvq_uint codes[4];
#if KVQ_TRELLIS
    if (KVQ_CODED(SIDE) > 0) {
      KVQ_WARP_BARRIER();
      KVQ_UNROLL
      for (int j = 0; j < 16; j++)
        work.tokens[own_token * KVQ_DIM(SIDE) + kvq_time<SIDE>(kvq_channel<SIDE>(j, place))] = y[j] * inverse;
      KVQ_WARP_BARRIER();
      KVQ_NO_UNROLL
      for (int i = 0; i < KVQ_TOKENS(SIDE) && base + i < last; i += KVQ_AT_ONCE(SIDE)) kvq_viterbi<SIDE>(work, i, lane);
      kvq_plane_bits<SIDE>(work, lane);
      KVQ_UNROLL
      for (int j = 0; j < 16; j++)
        y[j] = work.tokens[own_token * KVQ_DIM(SIDE) + kvq_time<SIDE>(kvq_channel<SIDE>(j, place))];
    }
#endif
    KVQ_UNROLL
    for (int quad = 0; quad < 4; quad++) {
      codes[quad] = 0;
      KVQ_UNROLL
      for (int i = 0; i < 4; i++) {
#if KVQ_TRELLIS
        if (KVQ_CODED(SIDE) > 0) {
          const int j = 4 * quad + i, time = kvq_time<SIDE>(kvq_channel<SIDE>(j, place));
          float level = 0.0f;
          const kvq_uint found = kvq_coded<SIDE>(work, own_token, time, y[j], &level);
          product += y[j] * level;
          size += level * level;
          codes[quad] |= found << (8 * i);
          continue;
        }
#endif
        const int code = kvq_code<SIDE>(y[4 * quad + i] * inverse);
        const float level = kvq_level<SIDE>((float)code);
        product += y[4 * quad + i] * level;
        size += level * level;
        codes[quad] |= (kvq_uint)code << (8 * i);
      }
    }
    product = kvq_token_sum<SIDE>(product);
    if (KVQ_CODED(SIDE) > 0) product /= inverse;
    size = kvq_token_sum<SIDE>(size);
    float factor = product / size;
    if (KVQ_SCALING(SIDE) == 1) factor = kvq_sqrt(energy / size);
    if (KVQ_SCALING(SIDE) == 2) factor = energy / kvq_max(product, 1.0e-37f);
    kvq_write_codes<SIDE>(plane0, plane1, at + token, place, used, codes);
    if (used && place == 0) scales[at + token] = kvq_to_bfloat(factor);
    if (KVQ_ONCE(SIDE)) break;
  }
}

#if KVQ_COMPACT
// Rows [first, last) of a buffer that holds the `dense` rows of `x` without the `count` from `start` on, then zeros.
template <int SIDE, typename P, typename Q>
KVQ_FUNC void kvq_compact(P x, Q y, int start, int count, int dense, int first, int last, int index) {
  const int words = KVQ_ROW_BYTES(SIDE) / 16;
  KVQ_DEVICE const kvq_byte* from = (KVQ_DEVICE const kvq_byte*)x;
  KVQ_DEVICE kvq_byte* to = (KVQ_DEVICE kvq_byte*)y;
  for (int i = first * words + index; i < last * words; i += 32 * KVQ_WARPS) {
    const int row = i / words;
    kvq_uint w[4] = {0, 0, 0, 0};
    if (row < dense - count) kvq_load16(from + (kvq_long)(row < start ? i : i + count * words) * 16, w);
    kvq_store_words4(to + (kvq_long)i * 16, w[0], w[1], w[2], w[3]);
  }
}
#endif
