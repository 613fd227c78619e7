// Whole tiles decoded side by side, words to values, W lanes a register: included after codec_values.inl and a
// Flight<TILES, RECENT>, add_symbol and store_pair of the instruction set.

// Constants of W lanes' even or odd channels.
struct alignas(4 * W) Half {
    int32_t round[W], halve[W], previous[W], top[W];
    float scale[W];
};
template <int MODE, bool RECENT>
inline VF value_of(VI entry, Half &half, float token_scale) {
    if (MODE == LMC_ROW_ANCHORED) {
        const VI before = (get<VI>(half.previous) + get<VI>(half.round)) >> get<VI>(half.halve);
        const VI q = add_symbol<RECENT>(before, entry);
        put(half.previous, q);
        return to<VF>(q) * get<VF>(half.scale);
    }
    return to<VF>(entry >> 24) * (get<VF>(half.scale) * token_scale);
}

// Sign and mantissa of W pairs, even channels first in memory, joined with their exponent fields.
inline VU join_pair(VI even, VI odd, const Half *halves, const uint8_t *rest) {
    const VU bits = to<VU>(get<VH>(rest));
    const VU low = (get<VU>(halves[0].top) - (as<VU>(even) >> 24)) & 255, high = (get<VU>(halves[1].top) - (as<VU>(odd) >> 24)) & 255;
    // Spread the two bytes to the two halves of the lane; then mantissas stay and signs move to the top.
    const VU wide = (bits & 255) | (bits >> 8) << 16;
    return low << 7 | high << 23 | (wide & 0x007f007f) | (wide & 0x00800080) << 8;
}

// Whole tiles of bfloat16; or symbols only, where MODE is LMC_ROW_RAW.
template <int TILES, int MODE, bool RECENT>
void decode_values(DecodeTile *tiles, int tokens, const uint32_t *table, const float *token_scale, const Channels *channels,
                   const uint8_t *const *rests, uint16_t *const *outs, int64_t stride) {
    constexpr int PARTS = LANES / W;
    Flight<TILES, RECENT> flight(tiles, table);
    Half halves[TILES][PARTS][2];
    for (int i = 0; i < TILES && MODE != LMC_ROW_RAW; ++i) {
        for (int c = 0; c < GROUP; ++c) {
            Half &half = halves[i][c / (2 * W)][c % 2];
            const int lane = c % (2 * W) / 2;
            half.round[lane] = channels[i].round[c];
            half.halve[lane] = channels[i].halve[c];
            half.previous[lane] = channels[i].previous[c];
            half.top[lane] = channels[i].top[c];
            half.scale[lane] = channels[i].scale[c];
        }
    }
    // With many tiles a tile's gather comes behind the next tile's step, when its indices are known.
    constexpr int LAG = TILES > 2;
    VI even[TILES][PARTS], odd[TILES][PARTS], first[TILES][PARTS];
#pragma GCC unroll 4
    for (int i = 0; i < TILES - LAG; ++i) flight.fetch(i, false, even[i]);
    for (int token = 0; token < tokens; ++token) {
        const float scale = MODE == LMC_ROW_PER_TOKEN ? token_scale[token] : 1.0f;
#pragma GCC unroll 4
        for (int i = 0; i < TILES; ++i) {
            flight.advance(i, even[i]);
            if (i < LAG) {
                flight.fetch(TILES - 1, false, even[TILES - 1]);
            } else {
                flight.fetch(i - LAG, true, odd[i - LAG]);
            }
#pragma GCC unroll 4
            for (int k = 0; k < PARTS; ++k) {
                first[i][k] = even[i][k];
                if (MODE == LMC_ROW_ANCHORED || MODE == LMC_ROW_PER_TOKEN) {
                    first[i][k] = as<VI>(value_of<MODE, RECENT>(even[i][k], halves[i][k][0], scale));
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < TILES; ++i) {
            flight.advance(i, odd[i]);
            if (i < LAG) {
                flight.fetch(TILES - 1, true, odd[TILES - 1]);
            } else {
                flight.fetch(i - LAG, false, even[i - LAG]);  // of the next token; after the last one it is not used
            }
#pragma GCC unroll 4
            for (int k = 0; k < PARTS; ++k) {
                const VI a = first[i][k], b = odd[i][k];
                if (MODE == LMC_ROW_RAW) {
                    put(tiles[i].symbols + token * GROUP + 2 * W * k, (as<VU>(a >> 24) & 0xffff) | (as<VU>(b >> 8) & 0xffff0000));
                    continue;
                }
                uint16_t *to = outs[i] + token * stride + 2 * W * k;
                if (MODE == LMC_ROW_LOSSLESS) {
                    put(to, join_pair(a, b, halves[i][k], rests[i] + token * GROUP + 2 * W * k));
                } else {
                    store_pair<RECENT>(to, as<VF>(a), value_of<MODE, RECENT>(b, halves[i][k][1], scale));
                }
                __builtin_prefetch(to + 8 * stride, 1);  // a row apart, where no hardware looks ahead
            }
        }
    }
}

template <int MODE, bool RECENT>
void decode_flight(DecodeTile *tiles, int count, int tokens, const uint32_t *table, const float *token_scale,
                   const Channels *channels, const uint8_t *const *rests, uint16_t *const *outs, int64_t stride) {
    const auto go = [&](auto values) { values(tiles, tokens, table, token_scale, channels, rests, outs, stride); };
    if (count == 4) {
        go(decode_values<4, MODE, RECENT>);
    } else if (count == 3) {
        go(decode_values<3, MODE, RECENT>);
    } else if (count == 2) {
        go(decode_values<2, MODE, RECENT>);
    } else {
        go(decode_values<1, MODE, RECENT>);
    }
}
