// Tokens on lanes, for encode.h and decode.h. A token's D channels lie on D / 16 neighbouring lanes, its places. Place
// m holds channels 8 m to 8 m + 7, then D / 2 + 8 m to D / 2 + 8 m + 7: four steps of a Hadamard transform, halves of
// bytes of packed codes and, for most rotaries, pairs of channels meet in a lane, and dense rows are read in 16 bytes.
//
// Defined before, for SIDE 0 (keys) and 1 (values): KVQ_DIM(SIDE), KVQ_WORDS(SIDE); of the frame of keys: KVQ_FRAME,
// KVQ_PAIRS, KVQ_HALF_LAYOUT, KVQ_MAGNITUDE, KVQ_PARTNER (0: the other channel of a pair may lie on another lane; 1:
// beside a channel; 8: eight on).
#define KVQ_PLACES(SIDE) (KVQ_DIM(SIDE) / 16)
#define KVQ_TOKENS(SIDE) (32 / KVQ_PLACES(SIDE))

// What several words are stored as at once.
struct alignas(16) kvq_words4 {
  kvq_uint a, b, c, d;
};
struct alignas(8) kvq_words2 {
  kvq_uint a, b;
};
union kvq_number_bits {
  kvq_uint word;
  float number;
};
union kvq_bfloat_pair {
  kvq_uint word;
  kvq_bfloat number[2];
};

KVQ_FUNC float kvq_number_of(kvq_uint word) {
  kvq_number_bits bits;
  bits.word = word;
  return bits.number;
}
KVQ_FUNC kvq_uint kvq_word_of(float number) {
  kvq_number_bits bits;
  bits.number = number;
  return bits.word;
}
KVQ_FUNC kvq_uint kvq_pack_bfloat2(float low, float high) {
  kvq_bfloat_pair pair;
  pair.number[0] = kvq_to_bfloat(low);
  pair.number[1] = kvq_to_bfloat(high);
  return pair.word;
}

KVQ_FUNC void kvq_store_words2(KVQ_DEVICE kvq_byte* p, kvq_uint a, kvq_uint b) {
  KVQ_DEVICE kvq_words2* words = (KVQ_DEVICE kvq_words2*)p;
  words->a = a, words->b = b;
}
KVQ_FUNC void kvq_store_words4(KVQ_DEVICE kvq_byte* p, kvq_uint a, kvq_uint b, kvq_uint c, kvq_uint d) {
  KVQ_DEVICE kvq_words4* words = (KVQ_DEVICE kvq_words4*)p;
  words->a = a, words->b = b, words->c = c, words->d = d;
}

// Four, or eight, numbers from an address of a multiple of 16 bytes.
KVQ_FUNC void kvq_read4(KVQ_DEVICE const float* p, KVQ_PRIVATE float* x) {
  kvq_uint w[4];
  kvq_load16((KVQ_DEVICE const kvq_byte*)p, w);
  KVQ_UNROLL
  for (int i = 0; i < 4; i++) x[i] = kvq_number_of(w[i]);
}
KVQ_FUNC void kvq_read8(KVQ_DEVICE const float* p, KVQ_PRIVATE float* x) {
  kvq_read4(p, x);
  kvq_read4(p + 4, x + 4);
}
KVQ_FUNC void kvq_read8(KVQ_DEVICE const kvq_half* p, KVQ_PRIVATE float* x) {
  kvq_uint w[4];
  kvq_load16((KVQ_DEVICE const kvq_byte*)p, w);
  KVQ_UNROLL
  for (int i = 0; i < 4; i++) x[2 * i] = kvq_low_half(w[i]), x[2 * i + 1] = kvq_high_half(w[i]);
}
KVQ_FUNC void kvq_read8(KVQ_DEVICE const kvq_bfloat* p, KVQ_PRIVATE float* x) {
  kvq_uint w[4];
  kvq_load16((KVQ_DEVICE const kvq_byte*)p, w);
  KVQ_UNROLL
  for (int i = 0; i < 4; i++) x[2 * i] = kvq_number_of(w[i] << 16), x[2 * i + 1] = kvq_number_of(w[i] & 0xffff0000u);
}
KVQ_FUNC void kvq_write8(KVQ_DEVICE float* p, KVQ_PRIVATE const float* x) {
  kvq_uint w[8];
  KVQ_UNROLL
  for (int i = 0; i < 8; i++) w[i] = kvq_word_of(x[i]);
  kvq_store_words4((KVQ_DEVICE kvq_byte*)p, w[0], w[1], w[2], w[3]);
  kvq_store_words4((KVQ_DEVICE kvq_byte*)(p + 4), w[4], w[5], w[6], w[7]);
}
KVQ_FUNC void kvq_write8(KVQ_DEVICE kvq_half* p, KVQ_PRIVATE const float* x) {
  kvq_store_words4((KVQ_DEVICE kvq_byte*)p, kvq_pack_half2(x[0], x[1]), kvq_pack_half2(x[2], x[3]),
                   kvq_pack_half2(x[4], x[5]), kvq_pack_half2(x[6], x[7]));
}
KVQ_FUNC void kvq_write8(KVQ_DEVICE kvq_bfloat* p, KVQ_PRIVATE const float* x) {
  kvq_store_words4((KVQ_DEVICE kvq_byte*)p, kvq_pack_bfloat2(x[0], x[1]), kvq_pack_bfloat2(x[2], x[3]),
                   kvq_pack_bfloat2(x[4], x[5]), kvq_pack_bfloat2(x[6], x[7]));
}
// The 16 channels of a place of one row.
template <int SIDE, typename P>
KVQ_FUNC void kvq_read_row(P row, int place, KVQ_PRIVATE float* x) {
  kvq_read8(row + 8 * place, x);
  kvq_read8(row + (KVQ_DIM(SIDE) / 2 + 8 * place), x + 8);
}
template <int SIDE, typename P>
KVQ_FUNC void kvq_write_row(P row, int place, KVQ_PRIVATE const float* x) {
  kvq_write8(row + 8 * place, x);
  kvq_write8(row + (KVQ_DIM(SIDE) / 2 + 8 * place), x + 8);
}
template <int SIDE>
KVQ_FUNC int kvq_channel(int j, int place) {
  return j / 8 * (KVQ_DIM(SIDE) / 2) + 8 * place + j % 8;
}

// A sum over the places of a token.
template <int SIDE>
KVQ_FUNC float kvq_token_sum(float x) {
  KVQ_UNROLL
  for (int mask = 1; mask < KVQ_PLACES(SIDE); mask *= 2) x += kvq_shuffle_xor(x, mask);
  return x;
}

// sqrt(D) times the orthonormal Hadamard transform.
template <int SIDE>
KVQ_FUNC void kvq_token_hadamard(KVQ_PRIVATE float* x, int place) {
  KVQ_UNROLL
  for (int step = 1; step < 16; step *= 2) {
    KVQ_UNROLL
    for (int i = 0; i < 16; i++) {
      if ((i & step) == 0) {
        const float a = x[i], b = x[i + step];
        x[i] = a + b;
        x[i + step] = a - b;
      }
    }
  }
  KVQ_UNROLL
  for (int mask = 1; mask < KVQ_PLACES(SIDE); mask *= 2) {
    const float sign = (place & mask) != 0 ? -1.0f : 1.0f;
    KVQ_UNROLL
    for (int i = 0; i < 16; i++) x[i] = kvq_fma(x[i], sign, kvq_shuffle_xor(x[i], mask));
  }
}

#if KVQ_FRAME
#define KVQ_TURNS (KVQ_PAIRS == 0 ? 1 : KVQ_PARTNER ? 8 : 16)

// Rotary pairs of a lane: which of its KVQ_TURNS turns channel j, and the first of turns 4 k to 4 k + 3.
KVQ_FUNC int kvq_turn(int j) { return KVQ_PARTNER == 8 ? j % 8 : KVQ_PARTNER == 1 ? j / 2 : j; }
KVQ_FUNC int kvq_turn_pair(int k, int place) {
  if (KVQ_PARTNER == 8) return 8 * place + 4 * k;
  if (KVQ_PARTNER == 1) return k * (KVQ_DIM(0) / 4) + 4 * place;
  const int c = kvq_channel<0>(4 * k, place);
  return c < KVQ_PAIRS ? c : c < 2 * KVQ_PAIRS ? c - KVQ_PAIRS : KVQ_PAIRS;
}
// One row of a table for the pairs of a lane; `unturned` for channels that do not turn.
KVQ_FUNC void kvq_read_turns(KVQ_DEVICE const float* row, int place, float unturned, KVQ_PRIVATE float* x) {
  KVQ_UNROLL
  for (int k = 0; k < KVQ_TURNS / 4; k++) {
    if (KVQ_PAIRS % 4 == 0) {
      const int p = kvq_turn_pair(k, place);
      x[4 * k] = x[4 * k + 1] = x[4 * k + 2] = x[4 * k + 3] = unturned;
      if (2 * KVQ_PAIRS == KVQ_DIM(0) || p < KVQ_PAIRS) kvq_read4(row + p, x + 4 * k);
    } else {
      KVQ_UNROLL
      for (int i = 0; i < 4; i++) {
        const int c = kvq_channel<0>(4 * k + i, place);
        const int p = KVQ_PARTNER ? kvq_turn_pair(k, place) + i : c < KVQ_PAIRS ? c : c - KVQ_PAIRS;
        x[4 * k + i] = p < KVQ_PAIRS ? row[p] : unturned;
      }
    }
  }
}

// What the channels of a lane have as mean, and what else their pairs contribute: R mean = own cos + other sin.
KVQ_FUNC void kvq_pair_up(KVQ_PRIVATE const float* own, KVQ_PRIVATE float* other) {
  KVQ_UNROLL
  for (int j = 0; j < 16; j++) other[j] = (j & KVQ_PARTNER) != 0 ? own[j ^ KVQ_PARTNER] : -own[j ^ KVQ_PARTNER];
}
KVQ_FUNC void kvq_read_mean(KVQ_DEVICE const float* mean, int place, KVQ_PRIVATE float* own, KVQ_PRIVATE float* other) {
  kvq_read_row<0>(mean, place, own);
  KVQ_UNROLL
  for (int j = 0; j < 16; j++) {
    const int c = kvq_channel<0>(j, place);
    if (c < 2 * KVQ_PAIRS) own[j] *= KVQ_MAGNITUDE;
    other[j] = 0.0f;
    if (KVQ_PARTNER == 0 && c < 2 * KVQ_PAIRS)
      other[j] = c < KVQ_PAIRS ? -KVQ_MAGNITUDE * mean[c + KVQ_PAIRS] : KVQ_MAGNITUDE * mean[c - KVQ_PAIRS];
  }
  if (KVQ_PARTNER) kvq_pair_up(own, other);
}
#endif
