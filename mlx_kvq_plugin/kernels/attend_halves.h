// Tiles by products of half precision numbers: 16 x 8 scores by 16 channels, or channels by 16 tokens, at a time.
kvq_uint query[KVQ_NT][KVQ_DK / 16][2];
float factor[KVQ_NT][2];
#if KVQ_FRAME
float mean_factor[KVQ_NT][2], steady[KVQ_NT][2];
#endif
KVQ_UNROLL
for (int nt = 0; nt < KVQ_NT; nt++) {
  KVQ_UNROLL
  for (int pair = 0; pair < KVQ_DK / 8; pair++) {
    const int at = (8 * nt + row) * KVQ_SHARED_DIM;
    const float lead = key_lead(pair % KVQ_KEY_SLOTS);
    const float low = shared_rows[at + key_channel(col, pair, 0)], high = shared_rows[at + key_channel(col, pair, 1)];
    query[nt][pair / 2][pair % 2] = kvq_to_b(kvq_pack_half2(low * lead, high * lead));
  }
  KVQ_UNROLL
  for (int i = 0; i < 2; i++) {
    factor[nt][i] = shared_factor[8 * nt + 2 * col + i];
#if KVQ_FRAME
    mean_factor[nt][i] = shared_mean_factor[8 * nt + 2 * col + i];
    steady[nt][i] = shared_constant[8 * nt + 2 * col + i];
#endif
  }
}

float sums[KVQ_NT][KVQ_DV / 16][4];
float peak[KVQ_NT][2], total[KVQ_NT][2], size = 0.0f;
KVQ_UNROLL
for (int nt = 0; nt < KVQ_NT; nt++) {
  KVQ_UNROLL
  for (int mt = 0; mt < KVQ_DV / 16; mt++) sums[nt][mt][0] = sums[nt][mt][1] = sums[nt][mt][2] = sums[nt][mt][3] = 0.0f;
  peak[nt][0] = peak[nt][1] = KVQ_LOWEST;
  total[nt][0] = total[nt][1] = 0.0f;
}

kvq_uint key_mask[KVQ_KEY_MASKS], value_mask[KVQ_VALUE_MASKS];
key_masks(key_mask);
value_masks(value_mask);
KVQ_NO_UNROLL
for (int tile = first_tile; tile <= last_tile; tile += stride) {
  // Planes have room for the whole of a last, partial tile; what stands there gets no weight.
  const int tile_row = tile * 64;
  const bool whole = tile_row + 64 <= packed;
  KVQ_DEVICE const kvq_bfloat* key_sizes = key_scale + (tile_row + row);
  KVQ_DEVICE const kvq_bfloat* value_sizes = value_scale + (tile_row + row);
  float key_size[4][2], value_size[4][2];
  KVQ_UNROLL
  for (int sub = 0; sub < 4; sub++) {
    key_size[sub][0] = kvq_load_bfloat(key_sizes, 16 * sub), key_size[sub][1] = kvq_load_bfloat(key_sizes, 16 * sub + 8);
    value_size[sub][0] = kvq_load_bfloat(value_sizes, 16 * sub);
    value_size[sub][1] = kvq_load_bfloat(value_sizes, 16 * sub + 8);
  }
  value_fields(KVQ_VALUE_PLANES, tile_row + 2 * col, row, value_field);
#if !KVQ_AHEAD
  key_fields(KVQ_KEY_PLANES, tile_row + row, col, key_field);
#endif

#if KVQ_FRAME
  KVQ_DEVICE const float* turns = block_turns + 2 * (tile * KVQ_PAIRS + col);
  kvq_uint mean[KVQ_NT][KVQ_PAIR_STEPS + (KVQ_PAIR_STEPS == 0)][2];
  KVQ_UNROLL
  for (int step = 0; step < KVQ_PAIR_STEPS; step++) {
    KVQ_UNROLL
    for (int i = 0; i < 2; i++) {
      const int p = 8 * step + 4 * i + col;
      const bool used = 8 * KVQ_PAIR_STEPS == KVQ_PAIRS || p < KVQ_PAIRS;
      float c = 0.0f, s = 0.0f;
      if (used) kvq_load_floats(turns + 2 * (8 * step + 4 * i), c, s);
      KVQ_UNROLL
      for (int nt = 0; nt < KVQ_NT; nt++) {
        const int at = (8 * nt + row) * KVQ_MEAN_STRIDE + 2 * p;
        const float even = shared_mean[at], odd = shared_mean[at + 1];
        mean[nt][step][i] = kvq_to_b(kvq_pack_half2(even * c + odd * s, odd * c - even * s));
      }
    }
  }
#endif

  float scores[4][KVQ_NT][4];
  KVQ_UNROLL
  for (int sub = 0; sub < 4; sub++) {
    kvq_uint near_pairs[KVQ_DK / 8], far_pairs[KVQ_DK / 8];
#if !KVQ_AHEAD
    key_load(key_field, col, 16 * sub, key_words[sub][0]);
    key_load(key_field, col, 16 * sub + 8, key_words[sub][1]);
#endif
    key_pairs(key_words[sub][0], key_mask, near_pairs);
    key_pairs(key_words[sub][1], key_mask, far_pairs);
#if KVQ_AHEAD
    KVQ_UNROLL
    for (int i = 0; i < 4; i++) value_load(value_field, row, 16 * sub + i / 2 * 8 + i % 2, value_words[sub][i]);
#endif
    KVQ_UNROLL
    for (int nt = 0; nt < KVQ_NT; nt++) {
      float products[4] = {0.0f, 0.0f, 0.0f, 0.0f}, others[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      KVQ_UNROLL
      for (int k = 0; k < KVQ_DK / 16; k++)  // two sums, since each product waits for the one before it
        kvq_mma(k % 2 ? others : products, near_pairs[2 * k], far_pairs[2 * k], near_pairs[2 * k + 1], far_pairs[2 * k + 1],
                query[nt][k][0], query[nt][k][1]);
#if KVQ_FRAME
      float means[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      KVQ_UNROLL
      for (int step = 0; step < KVQ_PAIR_STEPS; step++) {
        const int at = ((sub * KVQ_PAIR_STEPS + step) * 32 + row * 4 + col) * 4;
        kvq_uint turn[4];
        KVQ_LOAD_TURN(at, turn);
        kvq_mma(means, turn[0], turn[1], turn[2], turn[3], mean[nt][step][0], mean[nt][step][1]);
      }
#endif
      KVQ_UNROLL
      for (int i = 0; i < 4; i++) {
        float score = (products[i] + others[i]) * (key_size[sub][i / 2] * factor[nt][i % 2]);
#if KVQ_FRAME
        score += kvq_fma(means[i], mean_factor[nt][i % 2], steady[nt][i % 2]);
#endif
#if KVQ_SOFTCAP_ON
        score = kvq_capped(score);
#endif
#if KVQ_MASK
        const int r = kvq_min(tile_row + 16 * sub + row + i / 2 * 8, packed - 1);
        const int n = first_row + 8 * nt + 2 * col + i % 2;
        if (n < KVQ_ROWS) score = kvq_masked(score, mask, batch, head, n, sinks + r, columns);
#endif
        scores[sub][nt][i] = score;
      }
    }
  }
  if (!whole) {  // two exponents below the lowest score: no weight, even if all others are masked
    KVQ_UNROLL
    for (int sub = 0; sub < 4; sub++) {
      KVQ_UNROLL
      for (int nt = 0; nt < KVQ_NT; nt++) {
        KVQ_UNROLL
        for (int i = 0; i < 4; i++) {
          const int r = tile_row + 16 * sub + row + i / 2 * 8;
          if (r >= packed) scores[sub][nt][i] = 4.0f * KVQ_LOWEST;
        }
      }
    }
  }

  // Online softmax: one maximum for a tile. Weights carry the values' scales, relative to the largest of them so far.
  if (!whole) {  // what follows takes the largest of the values' scales: not of rows that are no tokens
    KVQ_UNROLL
    for (int sub = 0; sub < 4; sub++) {
      KVQ_UNROLL
      for (int i = 0; i < 2; i++)
        if (tile_row + 16 * sub + row + i * 8 >= packed) value_size[sub][i] = 0.0f;
    }
  }
  float size_now = size;
  KVQ_UNROLL
  for (int sub = 0; sub < 4; sub++) size_now = kvq_max(size_now, kvq_max(value_size[sub][0], value_size[sub][1]));
  size_now = kvq_row_max(size_now);
  float peak_now[KVQ_NT][2];
  bool moved = size_now != size;
  KVQ_UNROLL
  for (int nt = 0; nt < KVQ_NT; nt++) {
    KVQ_UNROLL
    for (int i = 0; i < 2; i++) {
      float highest = peak[nt][i];
      KVQ_UNROLL
      for (int sub = 0; sub < 4; sub++) highest = kvq_max(highest, kvq_max(scores[sub][nt][i], scores[sub][nt][i + 2]));
      peak_now[nt][i] = kvq_row_max(highest);
      moved = moved || peak_now[nt][i] != peak[nt][i];
    }
  }
  if (kvq_any(moved)) {
    const float smaller = size_now > 0.0f ? size / size_now : 0.0f;
    KVQ_UNROLL
    for (int nt = 0; nt < KVQ_NT; nt++) {
      KVQ_UNROLL
      for (int i = 0; i < 2; i++) {
        const float decay = kvq_exp2(peak[nt][i] - peak_now[nt][i]);
        total[nt][i] *= decay;
        KVQ_UNROLL
        for (int mt = 0; mt < KVQ_DV / 16; mt++) sums[nt][mt][i] *= decay * smaller, sums[nt][mt][i + 2] *= decay * smaller;
        peak[nt][i] = peak_now[nt][i];
      }
    }
    size = size_now;
  }
  const float inverse_size = size > 0.0f ? KVQ_WEIGHT_PEAK / size : 0.0f;
#if KVQ_AHEAD
  key_fields(KVQ_KEY_PLANES, kvq_min(tile + stride, last_tile) * 64 + row, col, key_field);
#endif

  KVQ_UNROLL
  for (int sub = 0; sub < 4; sub++) {
    kvq_uint near_pairs[KVQ_DV / 8], far_pairs[KVQ_DV / 8];
#if !KVQ_AHEAD
    KVQ_UNROLL
    for (int i = 0; i < 4; i++) value_load(value_field, row, 16 * sub + i / 2 * 8 + i % 2, value_words[sub][i]);
#endif
    value_pairs(value_words[sub][0], value_words[sub][1], value_mask, near_pairs);
    value_pairs(value_words[sub][2], value_words[sub][3], value_mask, far_pairs);
#if KVQ_AHEAD
    key_load(key_field, col, 16 * sub, key_words[sub][0]);
    key_load(key_field, col, 16 * sub + 8, key_words[sub][1]);
#endif
    KVQ_UNROLL
    for (int nt = 0; nt < KVQ_NT; nt++) {
      float weights[4];
      KVQ_UNROLL
      for (int i = 0; i < 4; i++) {
        const float weight = kvq_exp2(scores[sub][nt][i] - peak[nt][i % 2]);
        total[nt][i % 2] += weight;
        weights[i] = weight * (value_size[sub][i / 2] * inverse_size);
      }
      const kvq_uint near_weights = kvq_rows_to_b(kvq_pack_half2(weights[0], weights[1]));
      const kvq_uint far_weights = kvq_rows_to_b(kvq_pack_half2(weights[2], weights[3]));
      KVQ_UNROLL
      for (int mt = 0; mt < KVQ_DV / 16; mt++)
        kvq_mma(sums[nt][mt], near_pairs[2 * mt], near_pairs[2 * mt + 1], far_pairs[2 * mt], far_pairs[2 * mt + 1],
                near_weights, far_weights);
    }
  }
}

// The warps' sums, one after the other, relative to the highest of their peaks.
KVQ_UNROLL
for (int nt = 0; nt < KVQ_NT; nt++) {
  KVQ_UNROLL
  for (int i = 0; i < 2; i++) {
    const float sum = kvq_row_sum(total[nt][i]);
    if (row == 0) {
      shared_peak[warp * KVQ_COLUMNS + 8 * nt + 2 * col + i] = peak[nt][i];
      shared_total[warp * KVQ_COLUMNS + 8 * nt + 2 * col + i] = sum;
    }
  }
}
KVQ_BARRIER();
const int region = warp % KVQ_REGIONS * (KVQ_COLUMNS * KVQ_SHARED_DIM);
for (int turn = 0; turn < KVQ_WARPS; turn += KVQ_REGIONS) {
  if (warp / KVQ_REGIONS * KVQ_REGIONS == turn) {
    KVQ_UNROLL
    for (int nt = 0; nt < KVQ_NT; nt++) {
      KVQ_UNROLL
      for (int i = 0; i < 2; i++) {
        const int n = 8 * nt + 2 * col + i;
        float highest = KVQ_LOWEST;
        for (int w = 0; w < KVQ_WARPS; w++) highest = kvq_max(highest, shared_peak[w * KVQ_COLUMNS + n]);
        const float share = kvq_exp2(peak[nt][i] - highest) * size * (1.0f / KVQ_WEIGHT_PEAK);
        KVQ_UNROLL
        for (int mt = 0; mt < KVQ_DV / 16; mt++) {
          KVQ_UNROLL
          for (int j = 0; j < 2; j++) {
            const int at = region + n * KVQ_SHARED_DIM + value_channel(row, 2 * mt + j);
            const float more = sums[nt][mt][2 * j + i] * share * value_lead((2 * mt + j) % KVQ_VALUE_SLOTS);
            shared_rows[at] = turn == 0 ? more : shared_rows[at] + more;
          }
        }
      }
    }
  }
  KVQ_BARRIER();
}
