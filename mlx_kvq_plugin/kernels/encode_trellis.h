// Functions of encode_tokens.h for trellis codes (trellis.py): Viterbi's algorithm, a warp a token, 8 states a lane.
//
// Defined before, besides the constants of lanes.h: KVQ_SUBSETS(SIDE), two to the number of coded bits, KVQ_STORED(SIDE),
// levels of a subset; KVQ_GENERATOR(SIDE, i); KVQ_AROUND(SIDE); kvq_level<SIDE>.
//
// The register is a circle of eight bits: that of channel t stands at place t % 8, where it takes the oldest one's place.
// So a step changes pairs of states that differ in one place, and states need not move. Places 0 to 2 count a lane's
// states, places 3 to 7 lanes. In time, channels come in the order of the bits of a packed row.
template <int SIDE>
KVQ_FUNC float kvq_level(float code);

struct kvq_workspace {  // of a warp
  KVQ_GROUP_MEMORY float* token;     // D coordinates, in time
  KVQ_GROUP_MEMORY float* distance;  // of 32 channels: to the nearest level of each subset
  KVQ_GROUP_MEMORY kvq_byte* oldest;  // a bit for each state after each channel: what its register dropped
  KVQ_GROUP_MEMORY kvq_uint* bits;   // D / 32 words of trellis bits for each of the warp's tokens
};

// What the bit of the channel `age` channels before contributes to coded bits.
template <int SIDE>
KVQ_FUNC int kvq_column(int age) {
  int column = 0;
  KVQ_UNROLL
  for (int i = 0; i < 3; i++) column |= (KVQ_GENERATOR(SIDE, i) >> age & 1) << i;
  return column;
}

// Coded bits of what stands at places [first, first + count) but for that of the phase.
template <int SIDE>
KVQ_FUNC int kvq_part(int state, int first, int count, int phase) {
  int part = 0;
  KVQ_UNROLL
  for (int i = 0; i < count; i++)
    if (first + i != phase && (state >> i & 1) != 0) part ^= kvq_column<SIDE>((phase - first - i) & 7);
  return part;
}

// The channel of a place in time.
template <int SIDE>
KVQ_FUNC int kvq_time(int channel) {
  return channel % (KVQ_DIM(SIDE) / 8) * 8 + channel / (KVQ_DIM(SIDE) / 8);
}

// Costs of a lane's states after `length` channels from `first` on, in a circle, from those before.
template <int SIDE>
KVQ_FUNC void kvq_forward(KVQ_PRIVATE const kvq_workspace& work, int first, int length, KVQ_PRIVATE float* cost,
                          int lane) {
  const int subsets = KVQ_SUBSETS(SIDE), newest = kvq_column<SIDE>(0), dropped = kvq_column<SIDE>(8);
  kvq_uint parts = 0;  // of the lane's places, four bits a phase; its states have the newest bit that they drop
  KVQ_UNROLL
  for (int phase = 0; phase < 8; phase++) {
    int part = kvq_part<SIDE>(lane, 3, 5, phase);
    if (phase >= 3 && (lane >> (phase - 3) & 1) != 0) part ^= newest ^ dropped;
    parts |= (kvq_uint)part << (4 * phase);
  }
  KVQ_NO_UNROLL
  for (int block = 0; block < length; block += 32) {
    const float x = work.token[(first + block + lane) & (KVQ_DIM(SIDE) - 1)];
    KVQ_UNROLL
    for (int s = 0; s < subsets; s++) {
      float nearest = 3.0e38f;
      KVQ_UNROLL
      for (int u = 0; u < KVQ_STORED(SIDE); u++) {
        const float e = x - kvq_level<SIDE>((float)(u * subsets + s));
        nearest = kvq_least(nearest, e * e);
      }
      work.distance[lane * subsets + s] = nearest;
    }
    KVQ_WARP_BARRIER();
    KVQ_NO_UNROLL
    for (int base = 0; base < 32; base += 8) {
      KVQ_UNROLL
      for (int phase = 0; phase < 8; phase++) {
        const int part = (int)(parts >> (4 * phase) & 7u);
        float d[8], next[8];
        KVQ_UNROLL
        for (int s = 0; s < subsets; s++) d[s] = work.distance[(base + phase) * subsets + (s ^ part)];
        kvq_uint oldest = 0;
        KVQ_UNROLL
        for (int r = 0; r < 8; r++) {
          const int own = kvq_part<SIDE>(r, 0, 3, phase);
          if (phase < 3) {
            const int zero = r & ~(1 << phase), one = r | 1 << phase, to = own ^ (r == one ? newest : 0);
            const float a = cost[zero] + d[to], b = cost[one] + d[to ^ dropped];
            oldest |= (b < a ? 1u : 0u) << r;
            next[r] = kvq_least(a, b);
          } else {
            const float mine = cost[r] + d[own];
            const float other = kvq_shuffle_xor(cost[r], 1 << (phase - 3)) + d[own ^ dropped];
            oldest |= (other < mine ? 1u : 0u) << r;
            next[r] = kvq_least(mine, other);
          }
        }
        if (phase >= 3 && (lane >> (phase - 3) & 1) != 0) oldest ^= 0xffu;  // its own states had the bit set
        KVQ_UNROLL
        for (int r = 0; r < 8; r++) cost[r] = next[r];
        work.oldest[(block + base + phase) * 32 + lane] = (kvq_byte)oldest;
      }
    }
    KVQ_WARP_BARRIER();
  }
}

// The state before channel `stop` on the path to a state after `length` channels; with `words`, also its trellis bits.
template <int SIDE>
KVQ_FUNC int kvq_back(KVQ_PRIVATE const kvq_workspace& work, int state, int length, int stop, int words, int lane) {
  kvq_uint word = 0;
  KVQ_NO_UNROLL
  for (int t = length - 1; t >= stop; t--) {
    const int place = t & 7;
    const int dropped = work.oldest[t * 32 + (state >> 3)] >> (state & 7) & 1;
    word |= (kvq_uint)(state >> place & 1) << (t & 31);
    state = (state & ~(1 << place)) | dropped << place;
    if (words >= 0 && (t & 31) == 0) {
      if (lane == 0) work.bits[words + t / 32] = word;
      word = 0;
    }
  }
  return state;
}

// Trellis bits of the token in `work.token`, to `work.bits` from `words` on.
template <int SIDE>
KVQ_FUNC void kvq_viterbi(KVQ_PRIVATE const kvq_workspace& work, int words, int lane) {
  const int around = KVQ_AROUND(SIDE);
  float cost[8];
  KVQ_UNROLL
  for (int r = 0; r < 8; r++) cost[r] = 0.0f;
  kvq_forward<SIDE>(work, KVQ_DIM(SIDE) - around, 2 * around, cost, lane);
  float least = cost[0];
  int best = lane << 3;
  KVQ_UNROLL
  for (int r = 1; r < 8; r++) {
    if (cost[r] < least) best = lane << 3 | r;
    least = kvq_least(least, cost[r]);
  }
  KVQ_UNROLL
  for (int mask = 1; mask < 32; mask *= 2) {
    const float other = kvq_shuffle_xor(least, mask);
    const int state = (int)kvq_shuffle_xor_uint((kvq_uint)best, mask);
    if (other < least || (other == least && state < best)) best = state;
    least = kvq_least(least, other);
  }
  const int start = kvq_back<SIDE>(work, best, 2 * around, around, -1, lane);
  KVQ_WARP_BARRIER();
  KVQ_UNROLL
  for (int r = 0; r < 8; r++) cost[r] = (lane << 3 | r) == start ? 0.0f : 1.0e30f;
  kvq_forward<SIDE>(work, 0, KVQ_DIM(SIDE), cost, lane);
  kvq_back<SIDE>(work, start, KVQ_DIM(SIDE), 0, words, lane);
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
