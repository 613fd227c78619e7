// The codec's kernels with AVX-512: 16 lanes a register, two or three tiles in flight to hide each other's latency.
#include <type_traits>

#include "codec.h"

#if LMC_X86

#pragma GCC push_options
#pragma GCC target("avx2,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")

namespace lmc::codec {
namespace {

#define W 16
#include "codec_values.inl"
#undef W

inline __m512i load(const void *p) { return _mm512_loadu_si512(p); }
inline unsigned count_of(__mmask16 mask) { return static_cast<unsigned>(__builtin_popcount(mask)); }

// RECENT: with VBMI2 and BF16, as Sapphire Rapids and Zen 4 have them. Only what is instantiated so may use them.
#pragma GCC push_options
#pragma GCC target("avx512vbmi2,avx512bf16")
// States x, those of `mask` with the next words below.
template <bool RECENT>
inline __m512i refill(__m512i x, __mmask16 mask, const uint16_t *words) {
    const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(words));
    if (RECENT) {
        alignas(64) static constexpr uint16_t HIGH[32] = {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                                                          0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
        const __m512i high = _mm512_permutexvar_epi16(load(HIGH), _mm512_castsi256_si512(next));
        return _mm512_mask_shldi_epi32(x, mask, x, _mm512_maskz_expand_epi32(mask, high), 16);
    }
    return _mm512_or_si512(_mm512_mask_slli_epi32(x, mask, x, 16),
                           _mm512_maskz_expand_epi32(mask, _mm512_cvtepu16_epi32(next)));
}

// Tiles decoded side by side. What depends on a gather stands far behind it, so that those of all tiles are under way
// together: a step is `fetch`, other work, `advance`.
template <int TILES, bool RECENT>
struct Flight {
    DecodeTile *const tiles;
    const uint32_t *const table;
    __m512i x[TILES][2];
    const uint16_t *words[TILES];

    Flight(DecodeTile *tiles_, const uint32_t *table_) : tiles(tiles_), table(table_) {
        for (int i = 0; i < TILES; ++i) {
            words[i] = tiles[i].words;
            for (int k = 0; k < 2; ++k) x[i][k] = load(tiles[i].x + 16 * k);
        }
    }
    ~Flight() {
        for (int i = 0; i < TILES; ++i) {
            tiles[i].words = words[i];
            for (int k = 0; k < 2; ++k) _mm512_storeu_si512(tiles[i].x + 16 * k, x[i][k]);
        }
    }
    void fetch(bool odd, __m512i (&entries)[TILES][2]) const {
        const __m512i slots = _mm512_set1_epi32(SLOTS - 1);
#pragma GCC unroll 8
        for (int i = 0; i < TILES; ++i) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                // (x & slots) | first
                const __m512i first = load((odd ? tiles[i].odd : tiles[i].even) + 16 * k);
                const __m512i at = _mm512_ternarylogic_epi32(x[i][k], slots, first, 0xea);
                entries[i][k] = _mm512_i32gather_epi32(at, table, 4);
            }
        }
    }
    void advance(const __m512i (&entries)[TILES][2]) {
        const __m512i slots = _mm512_set1_epi32(SLOTS - 1), freqs = _mm512_set1_epi32(0xfff), low = _mm512_set1_epi32(LOW);
#pragma GCC unroll 8
        for (int i = 0; i < TILES; ++i) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                const __m512i next = _mm512_add_epi32(
                    _mm512_mullo_epi32(_mm512_and_si512(entries[i][k], freqs), _mm512_srli_epi32(x[i][k], 11)),
                    _mm512_and_si512(_mm512_srli_epi32(entries[i][k], 12), slots));
                const __mmask16 mask = _mm512_cmplt_epu32_mask(next, low);
                x[i][k] = refill<RECENT>(next, mask, words[i]);
                words[i] += count_of(mask);
            }
        }
    }
};

template <int TILES>
void decode_tiles(DecodeTile *tiles, int tokens, const uint32_t *table) {
    Flight<TILES, false> flight(tiles, table);
    __m512i even[TILES][2], odd[TILES][2];
    for (int token = 0; token < tokens; ++token) {
        flight.fetch(false, even);
        flight.advance(even);
        flight.fetch(true, odd);
        flight.advance(odd);
#pragma GCC unroll 8
        for (int i = 0; i < TILES; ++i) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                const __m512i pair =
                    _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srai_epi32(even[i][k], 24), _mm512_srai_epi32(odd[i][k], 8));
                _mm512_storeu_si512(tiles[i].symbols + token * GROUP + 32 * k, pair);
            }
        }
    }
}

void decode(DecodeTile *tiles, int count, int tokens, const uint32_t *table) {
    if (count == 3) {
        decode_tiles<3>(tiles, tokens, table);
    } else if (count == 2) {
        decode_tiles<2>(tiles, tokens, table);
    } else {
        decode_tiles<1>(tiles, tokens, table);
    }
}

// Symbols of 16 even or odd channels to fp32.
struct alignas(64) Half {
    int32_t round[16], halve[16], previous[16], anchor[16];
    float scale[16];
};
template <int MODE>
inline __m512 value_of(__m512i entry, Half &half, __m512 token_scale) {
    __m512i r = _mm512_srai_epi32(entry, 24);
    if (MODE == LMC_ROW_ANCHORED) {
        const __m512i before = load(half.previous);
        r = _mm512_add_epi32(r, _mm512_srav_epi32(_mm512_add_epi32(before, load(half.round)), load(half.halve)));
        _mm512_store_si512(half.previous, r);
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(r, load(half.anchor))), _mm512_load_ps(half.scale));
    }
    return _mm512_mul_ps(_mm512_cvtepi32_ps(r), _mm512_mul_ps(_mm512_load_ps(half.scale), token_scale));
}

// Rounded to nearest even; no value here is denormal. Even channels below odd ones.
template <bool RECENT>
inline __m512i pack(__m512 even, __m512 odd);
template <>
inline __m512i pack<false>(__m512 even, __m512 odd) {
    const __m512i bias = _mm512_set1_epi32(0x7fff), one = _mm512_set1_epi32(1);
    const __m512i a = _mm512_castps_si512(even), b = _mm512_castps_si512(odd);
    const __m512i low = _mm512_add_epi32(_mm512_add_epi32(a, bias), _mm512_and_si512(_mm512_srli_epi32(a, 16), one));
    const __m512i high = _mm512_add_epi32(_mm512_add_epi32(b, bias), _mm512_and_si512(_mm512_srli_epi32(b, 16), one));
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(low, 16), high);
}
template <>
inline __m512i pack<true>(__m512 even, __m512 odd) {
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(load(ORDER), reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even)));
}

// Sign and mantissa of 16 pairs, even channels first in memory, joined with their exponent fields.
inline __m512i join_pair(__m512i even, __m512i odd, const Half *halves, const uint8_t *rest) {
    const __m512i field = _mm512_set1_epi32(255);
    const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(rest)));
    const __m512i low = _mm512_and_si512(_mm512_sub_epi32(load(halves[0].anchor), _mm512_srli_epi32(even, 24)), field);
    const __m512i high = _mm512_and_si512(_mm512_sub_epi32(load(halves[1].anchor), _mm512_srli_epi32(odd, 24)), field);
    const __m512i fields = _mm512_or_si512(_mm512_slli_epi32(low, 7), _mm512_slli_epi32(high, 23));
    // Spread the two bytes to the two halves of the lane; then mantissas stay and signs move to the top.
    const __m512i wide = _mm512_or_si512(_mm512_and_si512(bits, field), _mm512_slli_epi32(_mm512_srli_epi32(bits, 8), 16));
    const __m512i mantissas = _mm512_and_si512(wide, _mm512_set1_epi32(0x007f007f));
    const __m512i signs = _mm512_slli_epi32(_mm512_and_si512(wide, _mm512_set1_epi32(0x00800080)), 8);
    return _mm512_or_si512(fields, _mm512_or_si512(mantissas, signs));
}

template <int TILES, int MODE, bool RECENT>
void decode_values(DecodeTile *tiles, int tokens, const uint32_t *table, const float *token_scale, const Channels *channels,
                   const uint8_t *const *rests, uint16_t *const *outs, int64_t stride) {
    Flight<TILES, RECENT> flight(tiles, table);
    Half halves[TILES][2][2];
    for (int i = 0; i < TILES; ++i) {
        for (int c = 0; c < GROUP; ++c) {
            Half &half = halves[i][c / 32][c % 2];
            const int lane = c % 32 / 2;
            half.round[lane] = channels[i].round[c];
            half.halve[lane] = channels[i].halve[c];
            half.previous[lane] = 0;
            half.anchor[lane] = channels[i].anchor[c];
            half.scale[lane] = channels[i].scale[c];
        }
    }
    __m512i even[TILES][2], odd[TILES][2], first[TILES][2];
    flight.fetch(false, even);
    for (int token = 0; token < tokens; ++token) {
        const __m512 scale = _mm512_set1_ps(token_scale[token]);
        flight.advance(even);
        flight.fetch(true, odd);
#pragma GCC unroll 8
        for (int i = 0; i < TILES; ++i) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                first[i][k] = MODE == LMC_ROW_LOSSLESS
                                  ? even[i][k]
                                  : _mm512_castps_si512(value_of<MODE>(even[i][k], halves[i][k][0], scale));
            }
        }
        flight.advance(odd);
        flight.fetch(false, even);  // of the next token; after the last one it is not used
#pragma GCC unroll 8
        for (int i = 0; i < TILES; ++i) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                const __m512i pair =
                    MODE == LMC_ROW_LOSSLESS
                        ? join_pair(first[i][k], odd[i][k], halves[i][k], rests[i] + token * GROUP + 32 * k)
                        : pack<RECENT>(_mm512_castsi512_ps(first[i][k]), value_of<MODE>(odd[i][k], halves[i][k][1], scale));
                uint16_t *to = outs[i] + token * stride + 32 * k;
                _mm512_storeu_si512(to, pair);
                __builtin_prefetch(to + 8 * stride, 1);  // a row apart, where no hardware looks ahead
            }
        }
    }
}

template <int MODE, bool RECENT>
void decode_flight(DecodeTile *tiles, int count, int tokens, const uint32_t *table, const float *token_scale,
                   const Channels *channels, const uint8_t *const *rests, uint16_t *const *outs, int64_t stride) {
    if (count == 3) {
        decode_values<3, MODE, RECENT>(tiles, tokens, table, token_scale, channels, rests, outs, stride);
    } else if (count == 2) {
        decode_values<2, MODE, RECENT>(tiles, tokens, table, token_scale, channels, rests, outs, stride);
    } else {
        decode_values<1, MODE, RECENT>(tiles, tokens, table, token_scale, channels, rests, outs, stride);
    }
}
#pragma GCC pop_options

const bool recent = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2");

void decode_bf16(DecodeTile *tiles, int count, int tokens, const uint32_t *table, int mode, const float *token_scale,
                 const Channels *channels, const uint8_t *const *rests, uint16_t *const *outs, int64_t stride) {
    const auto go = [&](auto flight) { flight(tiles, count, tokens, table, token_scale, channels, rests, outs, stride); };
    if (mode == LMC_ROW_LOSSLESS) {
        go(recent ? decode_flight<LMC_ROW_LOSSLESS, true> : decode_flight<LMC_ROW_LOSSLESS, false>);
    } else if (mode == LMC_ROW_ANCHORED) {
        go(recent ? decode_flight<LMC_ROW_ANCHORED, true> : decode_flight<LMC_ROW_ANCHORED, false>);
    } else {
        go(recent ? decode_flight<LMC_ROW_PER_TOKEN, true> : decode_flight<LMC_ROW_PER_TOKEN, false>);
    }
}

template <int TILES>
inline void encode_tiles(EncodeTile *tiles, int tokens, const uint64_t *table) {
    const __m512i low16 = _mm512_set1_epi32(0xffff), twelve = _mm512_set1_epi32(0xfff), fifteen = _mm512_set1_epi32(15);
    const __m512i slots = _mm512_set1_epi32(SLOTS), tops = _mm512_set1_epi32(static_cast<int>(0xfff00000));
    __m512i x[TILES][2];
    uint16_t *words[TILES];
    for (int i = 0; i < TILES; ++i) {
        words[i] = tiles[i].words;
        for (int k = 0; k < 2; ++k) x[i][k] = load(tiles[i].x + 16 * k);
    }
    for (int token = tokens - 1; token >= 0; --token) {
#pragma GCC unroll 2
        for (int odd = 1; odd >= 0; --odd) {
#pragma GCC unroll 2
            for (int k = 1; k >= 0; --k) {
#pragma GCC unroll 3
                for (int i = 0; i < TILES; ++i) {
                    const __m512i pair = load(tiles[i].entries + token * GROUP + 32 * k);
                    const __m512i at = odd ? _mm512_srli_epi32(pair, 16) : _mm512_and_si512(pair, low16);
                    const __m512i entry = _mm512_i32gather_epi32(at, reinterpret_cast<const uint32_t *>(table) + 1, 8);
                    const __m512i inverse = _mm512_i32gather_epi32(at, table, 8);
                    const __mmask16 mask = _mm512_cmpge_epu32_mask(x[i][k], _mm512_and_si512(entry, tops));
                    const unsigned emitted = count_of(mask);
                    words[i] -= emitted;
                    const __m256i out = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(mask, x[i][k]));
                    _mm256_mask_storeu_epi16(words[i], static_cast<__mmask16>(_bzhi_u32(0xffff, emitted)), out);
                    const __m512i now = _mm512_mask_srli_epi32(x[i][k], mask, x[i][k], 16);
                    const __m512i evens = _mm512_srli_epi64(_mm512_mul_epu32(now, inverse), 32);
                    const __m512i odds = _mm512_mul_epu32(_mm512_srli_epi64(now, 32), _mm512_srli_epi64(inverse, 32));
                    const __m512i high = _mm512_mask_blend_epi32(0xaaaa, evens, odds);
                    const __m512i quotient =
                        _mm512_srlv_epi32(high, _mm512_and_si512(_mm512_srli_epi32(entry, 12), fifteen));
                    const __m512i factor = _mm512_sub_epi32(slots, _mm512_srli_epi32(entry, 20));
                    x[i][k] = _mm512_add_epi32(_mm512_add_epi32(now, _mm512_and_si512(entry, twelve)),
                                               _mm512_mullo_epi32(quotient, factor));
                }
            }
        }
    }
    for (int i = 0; i < TILES; ++i) {
        tiles[i].words = words[i];
        for (int k = 0; k < 2; ++k) _mm512_storeu_si512(tiles[i].x + 16 * k, x[i][k]);
    }
}

void encode(EncodeTile *tiles, int count, int tokens, const uint64_t *table) {
    if (count == 3) {
        encode_tiles<3>(tiles, tokens, table);
    } else if (count == 2) {
        encode_tiles<2>(tiles, tokens, table);
    } else {
        encode_tiles<1>(tiles, tokens, table);
    }
}

}  // namespace

constexpr Kernels avx512 = make_kernels(decode, encode, decode_bf16);

}  // namespace lmc::codec

#pragma GCC pop_options

#endif
