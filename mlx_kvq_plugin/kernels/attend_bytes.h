// Tiles by products of 8-bit integers, 32 channels, or tokens, at a time. Queries and weights are two bytes, in two
// columns of the right operand: column 2 n has the high bytes of query row n, column 2 n + 1 the low ones, so a lane's
// two neighbouring columns are one query row. Weights, times the scales of their values, are integers relative to the
// highest of their tile; its sums are added to those of the tiles before it in float32. Signed levels (byte_codes.py)
// are half a unit above their bytes: half the sum of the queries, or of the weights, is added to products.
kvq_uint query[KVQ_NT][KVQ_DK / 32][2];
float factor[KVQ_NT];
#if KVQ_FRAME
float mean_factor[KVQ_NT], steady[KVQ_NT];
#endif
#if KVQ_KEY_SIGNED
float half_query[KVQ_NT];
#endif
KVQ_UNROLL
for (int nt = 0; nt < KVQ_NT; nt++) {
#if KVQ_KEY_SIGNED
  int query_sum = 0;
#endif
  KVQ_UNROLL
  for (int quad = 0; quad < KVQ_DK / 16; quad++) {
    kvq_uint packed_quad = 0;
    KVQ_UNROLL
    for (int i = 0; i < 4; i++) {
      const float x = shared_rows[(4 * nt + row / 2) * KVQ_SHARED_DIM + key_channel(col, quad, i)];
      const int whole = kvq_round(x * KVQ_QUERY_UNITS), high = (whole + 64) >> 7;
      packed_quad |= ((kvq_uint)(row % 2 ? whole - 128 * high : high) & 0xffu) << (8 * i);
#if KVQ_KEY_SIGNED
      query_sum += whole;
#endif
    }
    query[nt][quad / 2][quad % 2] = packed_quad;
  }
#if KVQ_KEY_SIGNED
  query_sum += (int)kvq_shuffle_xor_uint((kvq_uint)query_sum, 1);
  query_sum += (int)kvq_shuffle_xor_uint((kvq_uint)query_sum, 2);
  half_query[nt] = 0.5f * (float)(int)kvq_shuffle_uint((kvq_uint)query_sum, 8 * col);
#endif
  factor[nt] = shared_factor[4 * nt + col] * (KVQ_KEY_UNIT / KVQ_QUERY_UNITS);
#if KVQ_FRAME
  mean_factor[nt] = shared_mean_factor[4 * nt + col];
  steady[nt] = shared_constant[4 * nt + col];
#endif
}

float sums[KVQ_NT][KVQ_DV / 16][2];
float peak[KVQ_NT], total[KVQ_NT];
#if KVQ_VALUE_SIGNED
float weight_sum[KVQ_NT];
#endif
KVQ_UNROLL
for (int nt = 0; nt < KVQ_NT; nt++) {
#if KVQ_VALUE_SIGNED
  weight_sum[nt] = 0.0f;
#endif
  KVQ_UNROLL
  for (int mt = 0; mt < KVQ_DV / 16; mt++) sums[nt][mt][0] = sums[nt][mt][1] = 0.0f;
  peak[nt] = KVQ_LOWEST;
  total[nt] = 0.0f;
}

#if KVQ_FRAME && KVQ_PAIR_STEPS
float even[KVQ_NT][KVQ_PAIR_STEPS], odd[KVQ_NT][KVQ_PAIR_STEPS];
KVQ_UNROLL
for (int step = 0; step < KVQ_PAIR_STEPS; step++) {
  KVQ_UNROLL
  for (int nt = 0; nt < KVQ_NT; nt++) {
    const int at = (4 * nt + lane / 8) * KVQ_MEAN_STRIDE + 2 * (8 * step + lane % 8);
    even[nt][step] = shared_mean[at] * first_cos[step] + shared_mean[at + 1] * first_sin[step];
    odd[nt][step] = shared_mean[at + 1] * first_cos[step] - shared_mean[at] * first_sin[step];
  }
}
#endif
KVQ_NO_UNROLL
for (int tile = first_tile; tile <= last_tile; tile += stride) {
  // Planes have room for the whole of a last, partial tile; what stands there gets no weight.
  const int tile_row = tile * 64;
  const bool whole = tile_row + 64 <= packed;
#if !KVQ_AHEAD
  KVQ_LOAD_SIZES(tile);
#endif
  float key_size[4][2], value_size[4][2];
  {
    const kvq_uint both[2] = {kvq_low_halves(raw_sizes[0], raw_sizes[1]), kvq_low_halves(raw_sizes[2], raw_sizes[3])};
    KVQ_UNROLL
    for (int sub = 0; sub < 4; sub++) {
      KVQ_UNROLL
      for (int i = 0; i < 2; i++) {
        const kvq_uint found = kvq_shuffle_uint(both[sub / 2], 16 * (sub % 2) + 8 * i + row);
        key_size[sub][i] = kvq_bits_float(found << 16), value_size[sub][i] = kvq_bits_float(found & 0xffff0000u);
      }
    }
  }
  value_fields(KVQ_VALUE_PLANES, tile_row + 2 * col, row, value_field);
#if !KVQ_AHEAD
  key_fields(KVQ_KEY_PLANES, tile_row + row, col, key_field);
#endif

#if KVQ_FRAME && KVQ_PAIR_STEPS
  kvq_uint mean[KVQ_NT][KVQ_PAIR_STEPS][2];  // in columns of low bytes too, whose sums are not used
  KVQ_UNROLL
  for (int step = 0; step < KVQ_PAIR_STEPS; step++) {
    const int p = 8 * step + lane % 8;
    const float c = shared_steps[2 * p], s = shared_steps[2 * p + 1];
    KVQ_UNROLL
    for (int nt = 0; nt < KVQ_NT; nt++) {
      const int at = operands + (16 * nt + lane / 8 * 4 + lane % 4) * KVQ_OPERANDS + 2 * step + lane % 8 / 4;
      const float x = even[nt][step], y = odd[nt][step];
      shared_operands[at] = kvq_pack_half2(x, y);
      even[nt][step] = x * c + y * s;
      odd[nt][step] = y * c - x * s;
    }
  }
  KVQ_WARP_BARRIER();
  KVQ_UNROLL
  for (int nt = 0; nt < KVQ_NT; nt++) {
    KVQ_UNROLL
    for (int i = 0; i < 2 * KVQ_PAIR_STEPS; i++)
      mean[nt][i / 2][i % 2] = shared_operands[operands + (16 * nt + row / 2 * 4 + col) * KVQ_OPERANDS + i];
  }
  KVQ_WARP_BARRIER();
#endif

  float scores[4][KVQ_NT][2];
  KVQ_UNROLL
  for (int sub = 0; sub < 4; sub++) {
    kvq_uint near_quads[KVQ_KEY_TABLES * (KVQ_DK / 16)], far_quads[KVQ_KEY_TABLES * (KVQ_DK / 16)];
#if !KVQ_AHEAD
    key_load(key_field, col, 16 * sub, key_words[sub][0]);
    key_load(key_field, col, 16 * sub + 8, key_words[sub][1]);
#endif
    key_quads(key_words[sub][0], near_quads);
    key_quads(key_words[sub][1], far_quads);
#if KVQ_AHEAD
    KVQ_UNROLL
    for (int i = 0; i < 4; i++) value_load(value_field, row, 16 * sub + i / 2 * 8 + i % 2, value_words[sub][i]);
#endif
    KVQ_UNROLL
    for (int nt = 0; nt < KVQ_NT; nt++) {
      int products[4] = {0, 0, 0, 0}, others[4] = {0, 0, 0, 0};
      KVQ_UNROLL
      for (int k = 0; k < KVQ_KEY_TABLES * (KVQ_DK / 32); k++)  // two sums: each product waits for the one before it
        kvq_mma_bytes(k % 2 ? others : products, near_quads[2 * k], far_quads[2 * k], near_quads[2 * k + 1],
                      far_quads[2 * k + 1], query[nt][k % (KVQ_DK / 32)][0], query[nt][k % (KVQ_DK / 32)][1]);
#if KVQ_FRAME
      float means[4] = {0.0f, 0.0f, 0.0f, 0.0f}, more_means[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#if KVQ_PAIR_STEPS
      KVQ_UNROLL
      for (int step = 0; step < KVQ_PAIR_STEPS; step++) {
        const int at = ((sub * KVQ_PAIR_STEPS + step) * 32 + row * 4 + col) * 4;
        kvq_uint turn[4];
        KVQ_LOAD_TURN(at, turn);
        kvq_mma(step % 2 ? more_means : means, turn[0], turn[1], turn[2], turn[3], mean[nt][step][0], mean[nt][step][1]);
      }
#endif
#endif
      KVQ_UNROLL
      for (int i = 0; i < 2; i++) {
        const int product = (products[2 * i] + others[2 * i]) * 128 + (products[2 * i + 1] + others[2 * i + 1]);
#if KVQ_KEY_SIGNED
        float score = ((float)product + half_query[nt]) * (key_size[sub][i] * factor[nt]);
#else
        float score = (float)product * (key_size[sub][i] * factor[nt]);
#endif
#if KVQ_FRAME
        score += kvq_fma(means[2 * i] + more_means[2 * i], mean_factor[nt], steady[nt]);
#endif
#if KVQ_SOFTCAP_ON
        score = kvq_capped(score);
#endif
#if KVQ_MASK
        const int r = kvq_min(tile_row + 16 * sub + row + i * 8, packed - 1);
        const int n = first_row + 4 * nt + col;
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
      for (int i = 0; i < 2; i++) {
        if (tile_row + 16 * sub + row + i * 8 >= packed) {
          value_size[sub][i] = 0.0f;
          KVQ_UNROLL
          for (int nt = 0; nt < KVQ_NT; nt++) scores[sub][nt][i] = 4.0f * KVQ_LOWEST;
        }
      }
    }
  }

  // Logarithms and inverses of the scales of values.
  float lift[4][2];
  KVQ_UNROLL
  for (int sub = 0; sub < 4; sub++) {
    KVQ_UNROLL
    for (int i = 0; i < 2; i++) {
      const float size = kvq_max(value_size[sub][i], KVQ_SMALLEST_SIZE);
      lift[sub][i] = kvq_log2(size);
      value_size[sub][i] = kvq_inverse(size);
    }
  }
  // Online softmax: one maximum for a tile, and one of weights times scales of values.
  float share[KVQ_NT], tile_total[KVQ_NT];
#if KVQ_VALUE_SIGNED
  float tile_weights[KVQ_NT];
#endif
  KVQ_UNROLL
  for (int nt = 0; nt < KVQ_NT; nt++) {
    float highest = scores[0][nt][0], heaviest = 4.0f * KVQ_LOWEST;
    KVQ_UNROLL
    for (int sub = 0; sub < 4; sub++) highest = kvq_max(highest, kvq_max(scores[sub][nt][0], scores[sub][nt][1]));
    highest = kvq_row_max(highest);
    KVQ_UNROLL
    for (int sub = 0; sub < 4; sub++) {
      KVQ_UNROLL
      for (int i = 0; i < 2; i++) {
        scores[sub][nt][i] = scores[sub][nt][i] - highest + lift[sub][i];
        heaviest = kvq_max(heaviest, scores[sub][nt][i]);
      }
    }
    heaviest = kvq_row_max(heaviest);
    KVQ_UNROLL
    for (int sub = 0; sub < 4; sub++) scores[sub][nt][0] -= heaviest, scores[sub][nt][1] -= heaviest;
    const float peak_now = kvq_max(peak[nt], highest);
    if (kvq_any(peak_now != peak[nt])) {
      const float decay = kvq_exp2(peak[nt] - peak_now);
      total[nt] *= decay;
#if KVQ_VALUE_SIGNED
      weight_sum[nt] *= decay;
#endif
      KVQ_UNROLL
      for (int mt = 0; mt < KVQ_DV / 16; mt++) sums[nt][mt][0] *= decay, sums[nt][mt][1] *= decay;
      peak[nt] = peak_now;
    }
    share[nt] = kvq_exp2(highest - peak_now + heaviest);
    tile_total[nt] = 0.0f;
#if KVQ_VALUE_SIGNED
    tile_weights[nt] = 0.0f;
#endif
  }
#if KVQ_AHEAD
  KVQ_LOAD_SIZES(kvq_min(tile + stride, last_tile));
  KVQ_LOAD_KEYS(kvq_min(tile + stride, last_tile));
#endif

  int tile_sums[KVQ_NT][KVQ_DV / 16][4];
  KVQ_UNROLL
  for (int nt = 0; nt < KVQ_NT; nt++) {
    KVQ_UNROLL
    for (int mt = 0; mt < KVQ_DV / 16; mt++) {
      KVQ_UNROLL
      for (int i = 0; i < 4; i++) tile_sums[nt][mt][i] = 0;
    }
  }
  KVQ_UNROLL
  for (int part = 0; part < 2; part++) {  // of 32 tokens
    kvq_uint quads[2][KVQ_VALUE_TABLES * (KVQ_DV / 8)], weights[KVQ_NT][2];
    KVQ_UNROLL
    for (int side = 0; side < 2; side++) {
      const int sub = 2 * part + side;
#if !KVQ_AHEAD
      KVQ_UNROLL
      for (int i = 0; i < 4; i++) value_load(value_field, row, 16 * sub + i / 2 * 8 + i % 2, value_words[sub][i]);
#endif
      // In the order in which a transposition of pairs of tokens leaves their weights.
      value_quads(value_words[sub][0], value_words[sub][2], value_words[sub][1], value_words[sub][3], quads[side]);
      KVQ_UNROLL
      for (int nt = 0; nt < KVQ_NT; nt++) {
        kvq_uint whole_weight[2];
        KVQ_UNROLL
        for (int i = 0; i < 2; i++) {
          const float weight = kvq_exp2(scores[sub][nt][i]);
          tile_total[nt] = kvq_fma(weight, value_size[sub][i], tile_total[nt]);
#if KVQ_VALUE_SIGNED
          tile_weights[nt] += weight;
#endif
          // An integer below 2^14 in the low bits of 2^23 and more.
          whole_weight[i] = kvq_float_bits(kvq_fma(weight, KVQ_WEIGHT_UNITS, 8388608.0f));
        }
        const kvq_uint both = kvq_low_halves(whole_weight[0], whole_weight[1]);
        const kvq_uint pairs = kvq_permute((both >> 7) & 0x007f007fu, both & 0x007f007fu, 0x6420u);
        weights[nt][side] = kvq_rows_to_b(pairs);
      }
    }
    KVQ_UNROLL
    for (int nt = 0; nt < KVQ_NT; nt++) {
      KVQ_UNROLL
      for (int k = 0; k < KVQ_VALUE_TABLES * (KVQ_DV / 16); k++)
        kvq_mma_bytes(tile_sums[nt][k % (KVQ_DV / 16)], quads[0][2 * k], quads[0][2 * k + 1], quads[1][2 * k],
                      quads[1][2 * k + 1], weights[nt][0], weights[nt][1]);
    }
  }
  KVQ_UNROLL
  for (int nt = 0; nt < KVQ_NT; nt++) {
    total[nt] = kvq_fma(tile_total[nt], share[nt], total[nt]);
#if KVQ_VALUE_SIGNED
    weight_sum[nt] = kvq_fma(tile_weights[nt], share[nt], weight_sum[nt]);
#endif
    KVQ_UNROLL
    for (int mt = 0; mt < KVQ_DV / 16; mt++) {
      KVQ_UNROLL
      for (int j = 0; j < 2; j++)
        sums[nt][mt][j] =
            kvq_fma((float)(tile_sums[nt][mt][2 * j] * 128 + tile_sums[nt][mt][2 * j + 1]), share[nt], sums[nt][mt][j]);
    }
  }
}

// The warps' sums, one after the other, relative to the highest of their peaks.
KVQ_UNROLL
for (int nt = 0; nt < KVQ_NT; nt++) {
  const float sum = kvq_row_sum(total[nt]);
#if KVQ_VALUE_SIGNED
  weight_sum[nt] = kvq_row_sum(weight_sum[nt]) * (0.5f * KVQ_WEIGHT_UNITS);
#endif
  if (row == 0) {
    shared_peak[warp * KVQ_COLUMNS + 4 * nt + col] = peak[nt];
    shared_total[warp * KVQ_COLUMNS + 4 * nt + col] = sum;
  }
}
KVQ_BARRIER();
const int region = warp % KVQ_REGIONS * (KVQ_COLUMNS * KVQ_SHARED_DIM);
for (int turn = 0; turn < KVQ_WARPS; turn += KVQ_REGIONS) {
  if (warp / KVQ_REGIONS * KVQ_REGIONS == turn) {
    KVQ_UNROLL
    for (int nt = 0; nt < KVQ_NT; nt++) {
      const int n = 4 * nt + col;
      float top = KVQ_LOWEST;
      for (int w = 0; w < KVQ_WARPS; w++) top = kvq_max(top, shared_peak[w * KVQ_COLUMNS + n]);
      const float unit = kvq_exp2(peak[nt] - top) * (KVQ_VALUE_UNIT / KVQ_WEIGHT_UNITS);
      KVQ_UNROLL
      for (int mt = 0; mt < KVQ_DV / 16; mt++) {
        KVQ_UNROLL
        for (int j = 0; j < 2; j++) {
          const int at = region + n * KVQ_SHARED_DIM + value_channel(row, 2 * mt + j);
#if KVQ_VALUE_SIGNED
          const float more = (sums[nt][mt][j] + weight_sum[nt]) * unit;
#else
          const float more = sums[nt][mt][j] * unit;
#endif
          shared_rows[at] = turn == 0 ? more : shared_rows[at] + more;
        }
      }
    }
  }
  KVQ_BARRIER();
}
