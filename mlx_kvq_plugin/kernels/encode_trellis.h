// Functions of encode_tokens.h for trellis codes (trellis.py): Viterbi's algorithm, four tokens a warp, 8 lanes a token.
//
// Defined before, besides the constants of lanes.h: KVQ_SUBSETS(SIDE), two to the number of coded bits, KVQ_STORED(SIDE),
// levels of a subset; KVQ_AROUND(SIDE); kvq_level<SIDE>; kvq_parts<SIDE>, kvq_steps<SIDE>, kvq_first_steps<SIDE>,
// kvq_column<SIDE> (viterbi.py).
//
// The register is a circle of eight bits: that of channel t stands at place t % 8, where it takes the oldest one's place.
// So a step changes pairs of states that differ in one place, and states need not move. Places 0 to 4 count a lane's 32
// states, places 5 to 7 the lanes of a token. In time, channels come in the order of the bits of a packed row.
template <int SIDE>
KVQ_FUNC float kvq_level(float code);
template <int SIDE>
KVQ_FUNC kvq_uint kvq_parts(int sub);
template <int SIDE>
KVQ_FUNC int kvq_column(int age);
template <int SIDE>
KVQ_FUNC void kvq_steps(KVQ_GROUP_MEMORY const kvq_uint* distance, kvq_uint parts, int sub, KVQ_PRIVATE kvq_uint* c,
                        KVQ_PRIVATE kvq_uint* oldest);
template <int SIDE>
KVQ_FUNC void kvq_first_steps(KVQ_GROUP_MEMORY const kvq_uint* distance, kvq_uint parts, int sub, KVQ_PRIVATE kvq_uint* c);

#define KVQ_AT_ONCE(SIDE) (KVQ_TOKENS(SIDE) < 4 ? KVQ_TOKENS(SIDE) : 4)  // tokens
#define KVQ_DISTANCES 72  // words of a token's table: eight channels and subsets, and eight more, for other banks
#define KVQ_FAR 10000.0f  // the cost of what is not to be chosen: others stay far below, sums inside of half precision

struct kvq_workspace {  // of a warp
  KVQ_GROUP_MEMORY float* tokens;       // D coordinates of each, in time
  KVQ_GROUP_MEMORY kvq_uint* distance;  // of eight channels: to the nearest level of each subset, for pairs of states
  KVQ_GROUP_MEMORY kvq_uint* bits;      // D / 32 words of trellis bits for each of the warp's tokens
  KVQ_GROUP_MEMORY kvq_uint* planes;    // as many words for each coded bit
};

// The channel of a place in time.
template <int SIDE>
KVQ_FUNC int kvq_time(int channel) {
  return channel % (KVQ_DIM(SIDE) / 8) * 8 + channel / (KVQ_DIM(SIDE) / 8);
}

// Costs of a lane's states after `length` channels of its token from `first` on, from those before; if it DECIDES, of each
// channel a word too: for each of the lane's states, what its register dropped. Distances are those above the least of a
// channel, which all paths have to bear, so that half precision has no large numbers to round.
template <int SIDE, int DECIDES>
KVQ_FUNC void kvq_forward(KVQ_PRIVATE const kvq_workspace& work, KVQ_GROUP_MEMORY const float* x, int first, int length,
                          KVQ_PRIVATE kvq_uint* cost, KVQ_PRIVATE kvq_uint* oldest, int lane) {
  const int subsets = KVQ_SUBSETS(SIDE), group = lane >> 3, sub = lane & 7;
  const kvq_uint parts = kvq_parts<SIDE>(sub);
  const int other = kvq_column<SIDE>((sub + 4) & 7);  // what the place in which pairs differ changes of a subset
  KVQ_GROUP_MEMORY kvq_uint* distance = work.distance + group * KVQ_DISTANCES;
  KVQ_NO_UNROLL
  for (int base = 0; base < length; base += 8) {
    const float z = x[first + base + sub];
    float nearest[KVQ_SUBSETS(SIDE)], second[KVQ_SUBSETS(SIDE)], least = 3.0e38f;
    KVQ_UNROLL
    for (int s = 0; s < subsets; s++) {
      nearest[s] = 3.0e38f;
      KVQ_UNROLL
      for (int u = 0; u < KVQ_STORED(SIDE); u++) {
        const float e = z - kvq_level<SIDE>((float)(u * subsets + s));
        nearest[s] = kvq_least(nearest[s], e * e);
      }
      least = kvq_least(least, nearest[s]);
    }
    KVQ_UNROLL
    for (int s = 0; s < subsets; s++) nearest[s] = kvq_least(nearest[s] - least, KVQ_FAR), second[s] = nearest[s];
    KVQ_UNROLL
    for (int bit = 1; bit < subsets; bit *= 2) {
      KVQ_UNROLL
      for (int s = 0; s < subsets; s++) {
        const float low = second[s], high = second[s | bit];
        if ((s & bit) == 0 && (other & bit) != 0) second[s] = high, second[s | bit] = low;
      }
    }
    KVQ_UNROLL
    for (int s = 0; s < subsets; s++) distance[sub * subsets + s] = kvq_pack_half2(nearest[s], second[s]);
    KVQ_WARP_BARRIER();
    if (DECIDES)
      kvq_steps<SIDE>(distance, parts, sub, cost, oldest + base);
    else
      kvq_first_steps<SIDE>(distance, parts, sub, cost);
    KVQ_WARP_BARRIER();
  }
}

// The state before the first channel on the path to a state after `length` of them; also the path's trellis bits.
template <int SIDE>
KVQ_FUNC int kvq_back(KVQ_PRIVATE const kvq_uint* oldest, int group, int state, int length, bool stores,
                      KVQ_GROUP_MEMORY kvq_uint* bits) {
  kvq_uint word = 0;
  KVQ_NO_UNROLL
  for (int base = length - 8; base >= 0; base -= 8) {
    KVQ_UNROLL
    for (int place = 7; place >= 0; place--) {
      const kvq_uint own = kvq_shuffle_uint(oldest[base + place], 8 * group + (state >> 5));
      word = word << 1 | (kvq_uint)(state >> place & 1);
      state = (state & ~(1 << place)) | (int)(own >> (state & 31) & 1u) << place;
    }
    if (stores && (base & 31) == 0) bits[base / 32] = word;
  }
  return state;
}

// Trellis bits of the warp's tokens from `token` on, as many as go at once: the channels around the first one decide about
// the state there, from which the way goes through all of them, by the same instructions. Those before the first one
// need costs alone, which is a tenth faster in all than to decide there too.
template <int SIDE>
KVQ_FUNC void kvq_viterbi(KVQ_PRIVATE const kvq_workspace& work, int token, int lane) {
  const int around = KVQ_AROUND(SIDE), group = (lane >> 3) % KVQ_AT_ONCE(SIDE), sub = lane & 7;
  KVQ_GROUP_MEMORY const float* x = work.tokens + (token + group) * KVQ_DIM(SIDE);
  kvq_uint cost[16];  // of pairs of states
  kvq_uint oldest[KVQ_DIM(SIDE)];
  KVQ_UNROLL
  for (int r = 0; r < 16; r++) cost[r] = 0u;
  int start = 0;
  kvq_forward<SIDE, 0>(work, x, KVQ_DIM(SIDE) - around, around, cost, oldest, lane);
  KVQ_NO_UNROLL
  for (int whole = 0; whole < 2; whole++) {
    kvq_forward<SIDE, 1>(work, x, 0, whole ? KVQ_DIM(SIDE) : around, cost, oldest, lane);
    if (whole) break;
    float least = kvq_low_half(cost[0]);
    int best = sub << 5;
    KVQ_UNROLL
    for (int r = 1; r < 32; r++) {
      const float own = r < 16 ? kvq_low_half(cost[r % 16]) : kvq_high_half(cost[r % 16]);
      if (own < least) best = sub << 5 | r;
      least = kvq_least(least, own);
    }
    KVQ_UNROLL
    for (int mask = 1; mask < 8; mask *= 2) {
      const float other = kvq_shuffle_xor(least, mask);
      const int state = (int)kvq_shuffle_xor_uint((kvq_uint)best, mask);
      if (other < least || (other == least && state < best)) best = state;
      least = kvq_least(least, other);
    }
    start = kvq_back<SIDE>(oldest, group, best, around, false, work.bits);
    KVQ_UNROLL
    for (int r = 0; r < 16; r++) {
      const int state = sub << 5 | r;
      cost[r] = kvq_pack_half2(state == start ? 0.0f : KVQ_FAR, (state | 16) == start ? 0.0f : KVQ_FAR);
    }
  }
  const bool stores = sub == 0 && lane >> 3 < KVQ_AT_ONCE(SIDE);
  kvq_back<SIDE>(oldest, group, start, KVQ_DIM(SIDE), stores, work.bits + (token + group) * (KVQ_DIM(SIDE) / 32));
  KVQ_WARP_BARRIER();
}

// Coded bits of all channels, planes of trellis bits and theirs shifted along the circle of a token: a word a lane.
template <int SIDE>
KVQ_FUNC void kvq_plane_bits(KVQ_PRIVATE const kvq_workspace& work, int lane) {
  const int words = KVQ_DIM(SIDE) / 32;
  if (lane < 16) {
    const kvq_uint own = work.bits[lane], before = work.bits[lane % words == 0 ? lane + words - 1 : lane - 1];
    KVQ_UNROLL
    for (int i = 0; i < KVQ_CODED(SIDE); i++) {
      kvq_uint plane = 0u;
      KVQ_UNROLL
      for (int age = 0; age <= 8; age++)
        if ((kvq_column<SIDE>(age) >> i & 1) != 0) plane ^= age == 0 ? own : own << age | before >> (32 - age);
      work.planes[16 * i + lane] = plane;
    }
  }
  KVQ_WARP_BARRIER();
}

// The code of a channel, the trellis bit in its highest bit, and its level: the nearest that the bits of its token allow.
template <int SIDE>
KVQ_FUNC kvq_uint kvq_coded(KVQ_PRIVATE const kvq_workspace& work, int token, int time, float z,
                            KVQ_PRIVATE float* nearest) {
  const int word = token * (KVQ_DIM(SIDE) / 32) + (time >> 5), place = time & 31;
  int subset = 0;
  KVQ_UNROLL
  for (int i = 0; i < KVQ_CODED(SIDE); i++) subset |= (int)(work.planes[16 * i + word] >> place & 1u) << i;
  float least = 3.0e38f;
  int stored = 0;
  KVQ_UNROLL
  for (int u = 0; u < KVQ_STORED(SIDE); u++) {
    const float level = kvq_level<SIDE>((float)(u * KVQ_SUBSETS(SIDE) + subset)), e = z - level;
    if (e * e < least) stored = u, least = e * e, *nearest = level;
  }
  return (work.bits[word] >> place & 1u) << 7 | (kvq_uint)(stored * KVQ_SUBSETS(SIDE) + subset);
}
