// Functions of encode_tokens.h for trellis codes (trellis.py): Viterbi's algorithm, four tokens a warp, 8 lanes a token.
//
// Defined before, besides the constants of lanes.h: KVQ_SUBSETS(SIDE), two to the number of coded bits, KVQ_STORED(SIDE),
// levels of a subset; KVQ_AROUND(SIDE); kvq_level<SIDE>; kvq_parts<SIDE>, kvq_steps<SIDE>, kvq_column<SIDE> (viterbi.py).
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
KVQ_FUNC void kvq_steps(KVQ_GROUP_MEMORY const float* distance, kvq_uint parts, int sub, bool writes, int stride,
                        KVQ_PRIVATE float* c, KVQ_GROUP_MEMORY kvq_uint* oldest);

#define KVQ_AT_ONCE(SIDE) (KVQ_TOKENS(SIDE) < 4 ? KVQ_TOKENS(SIDE) : 4)  // tokens
#define KVQ_DISTANCES 72  // floats of a token's table: eight channels and subsets, and eight more, for other banks

struct kvq_workspace {  // of a warp
  KVQ_GROUP_MEMORY float* tokens;     // D coordinates of each, in time
  KVQ_GROUP_MEMORY float* distance;   // of eight channels: to the nearest level of each subset
  KVQ_GROUP_MEMORY kvq_uint* oldest;  // after each channel, a bit for each state: what its register dropped
  KVQ_GROUP_MEMORY kvq_uint* bits;    // D / 32 words of trellis bits for each of the warp's tokens
};

// The channel of a place in time.
template <int SIDE>
KVQ_FUNC int kvq_time(int channel) {
  return channel % (KVQ_DIM(SIDE) / 8) * 8 + channel / (KVQ_DIM(SIDE) / 8);
}

// Costs of a lane's states after `length` channels of its token from `first` on, in a circle, from those before.
template <int SIDE>
KVQ_FUNC void kvq_forward(KVQ_PRIVATE const kvq_workspace& work, KVQ_GROUP_MEMORY const float* x, int first, int length,
                          KVQ_PRIVATE float* cost, int lane) {
  const int subsets = KVQ_SUBSETS(SIDE), group = lane >> 3, sub = lane & 7;
  const bool writes = group < KVQ_AT_ONCE(SIDE);
  const kvq_uint parts = kvq_parts<SIDE>(sub);
  KVQ_GROUP_MEMORY float* distance = work.distance + group * KVQ_DISTANCES;
  KVQ_NO_UNROLL
  for (int base = 0; base < length; base += 8) {
    const float z = x[(first + base + sub) & (KVQ_DIM(SIDE) - 1)];
    KVQ_UNROLL
    for (int s = 0; s < subsets; s++) {
      float nearest = 3.0e38f;
      KVQ_UNROLL
      for (int u = 0; u < KVQ_STORED(SIDE); u++) {
        const float e = z - kvq_level<SIDE>((float)(u * subsets + s));
        nearest = kvq_least(nearest, e * e);
      }
      distance[sub * subsets + s] = nearest;
    }
    KVQ_WARP_BARRIER();
    kvq_steps<SIDE>(distance, parts, sub, writes, 8 * KVQ_AT_ONCE(SIDE), cost,
                    work.oldest + (base * KVQ_AT_ONCE(SIDE) + (writes ? group : 0)) * 8 + sub);
    KVQ_WARP_BARRIER();
  }
}

// The state before channel `stop` on the path to a state after `length` channels; with `bits`, also its trellis bits.
template <int SIDE>
KVQ_FUNC int kvq_back(KVQ_PRIVATE const kvq_workspace& work, int group, int state, int length, int stop, bool stores,
                      KVQ_GROUP_MEMORY kvq_uint* bits) {
  kvq_uint word = 0;
  KVQ_NO_UNROLL
  for (int t = length - 1; t >= stop; t--) {
    const int place = t & 7;
    const kvq_uint dropped = work.oldest[(t * KVQ_AT_ONCE(SIDE) + group) * 8 + (state >> 5)] >> (state & 31) & 1u;
    word |= (kvq_uint)(state >> place & 1) << (t & 31);
    state = (state & ~(1 << place)) | (int)dropped << place;
    if (stores && (t & 31) == 0) bits[t / 32] = word;
    if ((t & 31) == 0) word = 0;
  }
  return state;
}

// Trellis bits of the warp's tokens from `token` on, as many as go at once.
template <int SIDE>
KVQ_FUNC void kvq_viterbi(KVQ_PRIVATE const kvq_workspace& work, int token, int lane) {
  const int around = KVQ_AROUND(SIDE), group = (lane >> 3) % KVQ_AT_ONCE(SIDE), sub = lane & 7;
  KVQ_GROUP_MEMORY const float* x = work.tokens + (token + group) * KVQ_DIM(SIDE);
  float cost[32];
  KVQ_UNROLL
  for (int r = 0; r < 32; r++) cost[r] = 0.0f;
  kvq_forward<SIDE>(work, x, KVQ_DIM(SIDE) - around, 2 * around, cost, lane);
  float least = cost[0];
  int best = sub << 5;
  KVQ_UNROLL
  for (int r = 1; r < 32; r++) {
    if (cost[r] < least) best = sub << 5 | r;
    least = kvq_least(least, cost[r]);
  }
  KVQ_UNROLL
  for (int mask = 1; mask < 8; mask *= 2) {
    const float other = kvq_shuffle_xor(least, mask);
    const int state = (int)kvq_shuffle_xor_uint((kvq_uint)best, mask);
    if (other < least || (other == least && state < best)) best = state;
    least = kvq_least(least, other);
  }
  const int start = kvq_back<SIDE>(work, group, best, 2 * around, around, false, work.bits);
  KVQ_WARP_BARRIER();
  KVQ_UNROLL
  for (int r = 0; r < 32; r++) cost[r] = (sub << 5 | r) == start ? 0.0f : 1.0e30f;
  kvq_forward<SIDE>(work, x, 0, KVQ_DIM(SIDE), cost, lane);
  const bool stores = sub == 0 && lane >> 3 < KVQ_AT_ONCE(SIDE);
  kvq_back<SIDE>(work, group, start, KVQ_DIM(SIDE), 0, stores, work.bits + (token + group) * (KVQ_DIM(SIDE) / 32));
  KVQ_WARP_BARRIER();
}

// The code of a channel, the trellis bit in its highest bit: the nearest level that the bits of its token allow.
template <int SIDE>
KVQ_FUNC kvq_uint kvq_coded(KVQ_GROUP_MEMORY const kvq_uint* bits, int time, float z) {
  const int word = time >> 5, place = time & 31, last = KVQ_DIM(SIDE) / 32 - 1;
  const kvq_uint own = bits[word], before = bits[word == 0 ? last : word - 1];
  int subset = 0;
  KVQ_UNROLL
  for (int age = 0; age <= 8; age++) {
    const kvq_uint bit = place >= age ? own >> (place - age) : before >> (32 + place - age);
    subset ^= (bit & 1u) != 0 ? kvq_column<SIDE>(age) : 0;
  }
  float least = 3.0e38f;
  int stored = 0;
  KVQ_UNROLL
  for (int u = 0; u < KVQ_STORED(SIDE); u++) {
    const float e = z - kvq_level<SIDE>((float)(u * KVQ_SUBSETS(SIDE) + subset));
    if (e * e < least) stored = u, least = e * e;
  }
  return (own >> place & 1u) << 7 | (kvq_uint)(stored * KVQ_SUBSETS(SIDE) + subset);
}
