// Attention of a few query rows on packed keys and values, split over tokens: partial sums, each followed by the peak
// of its scores and the total of its weights.
//
// A group serves one KV head, up to KVQ_COLUMNS query rows and one split; each of its warps goes through tiles of 64
// tokens by itself. The body is several files: dense.h is the split of tokens that are not packed, attend_queries.h
// prepares queries, attend_halves.h or attend_bytes.h goes through the tiles, attend_end.h stores the sums, which last.h
// lets the last group merge where it can. Keys are the rows of matrix products, decoded in registers; scores pass through
// a transposition of registers into the weights of the values, which are summed in the transform domain.
//
// Defined before: KVQ_DK, KVQ_DV, KVQ_ROWS (query rows of a KV head), KVQ_COLUMNS (KVQ_NT times 8, of bytes 4), KVQ_WARPS,
// KVQ_HEADS (KV heads), KVQ_SCALE, KVQ_SOFTCAP (0: none), KVQ_FRAME, KVQ_PAIRS, KVQ_HALF_LAYOUT, KVQ_MAGNITUDE,
// KVQ_MASK (0: none, 1: bool, 2: added float32), KVQ_MASK_BATCHES, KVQ_MASK_HEADS, KVQ_MASK_QUERIES, KVQ_QUERIES (L);
// KVQ_AHEAD (whether the codes of the next tile are loaded while this one's are used), KVQ_REGIONS;
// by the prologue: batch, the pointers of this sequence and head (from its first packed token on), packed, position,
// columns, sinks, splits, and the tables: key_signs, inner (cos, then sin, of places in a block), inner_turns (the same as
// operands), block_turns (cos and sin in turn, of blocks).
const int first_row = KVQ_GROUP_Y % KVQ_QUERY_TILES * KVQ_COLUMNS;

KVQ_SHARED_ARRAY(float, shared_rows, KVQ_REGIONS * KVQ_COLUMNS * KVQ_SHARED_DIM);
KVQ_SHARED_ARRAY(float, shared_scores, KVQ_COLUMNS * KVQ_DENSE_CHUNK);
KVQ_SHARED_ARRAY(float, shared_factor, KVQ_COLUMNS);
KVQ_SHARED_ARRAY(float, shared_peak, KVQ_WARPS * KVQ_COLUMNS);
KVQ_SHARED_ARRAY(float, shared_total, KVQ_WARPS * KVQ_COLUMNS);
#if KVQ_FRAME
#if KVQ_SHARED_TURNS
KVQ_SHARED_ARRAY(kvq_uint, shared_turns, KVQ_PAIR_STEPS * 4 * 32 * 4);
#endif
KVQ_SHARED_ARRAY(float, shared_mean, KVQ_COLUMNS * KVQ_MEAN_STRIDE);
KVQ_SHARED_ARRAY(float, shared_mean_factor, KVQ_COLUMNS);
KVQ_SHARED_ARRAY(float, shared_constant, KVQ_COLUMNS);
#endif
#if KVQ_BYTES && KVQ_FRAME && KVQ_PAIR_STEPS
#define KVQ_OPERANDS (2 * KVQ_PAIR_STEPS + 4)
KVQ_SHARED_ARRAY(float, shared_steps, 16 * KVQ_PAIR_STEPS);
KVQ_SHARED_ARRAY(kvq_uint, shared_operands, KVQ_WARPS * KVQ_NT * 16 * KVQ_OPERANDS);
#endif

// Channel c of query row n of the KV head.
#define KVQ_QUERY(n, c) \
  kvq_to_float(queries[batch * queries_strides[0] + \
                       (head * (KVQ_ROWS / KVQ_QUERIES) + (n) / KVQ_QUERIES) * queries_strides[1] + \
                       (n) % KVQ_QUERIES * queries_strides[2] + (c) * queries_strides[3]])

// Four words of the table of turns, a lane's part of a left operand.
#if KVQ_SHARED_TURNS
#define KVQ_LOAD_TURN(at, turn) \
  KVQ_UNROLL \
  for (int j = 0; j < 4; j++) turn[j] = shared_turns[(at) + j]
#else
#define KVQ_LOAD_TURN(at, turn) kvq_load16(inner_turns + 4 * (at), turn)
#endif
