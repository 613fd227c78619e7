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

template <int TILES>
inline void decode_tiles(DecodeTile *tiles, int tokens, const uint32_t *table) {
    const __m512i slots = _mm512_set1_epi32(SLOTS - 1), freqs = _mm512_set1_epi32(0xfff), low = _mm512_set1_epi32(LOW);
    __m512i x[TILES][2];
    const uint16_t *words[TILES];
    for (int i = 0; i < TILES; ++i) {
        words[i] = tiles[i].words;
        for (int k = 0; k < 2; ++k) x[i][k] = load(tiles[i].x + 16 * k);
    }
    for (int token = 0; token < tokens; ++token) {
        __m512i even[TILES][2];
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
#pragma GCC unroll 3
                for (int i = 0; i < TILES; ++i) {
                    const __m512i first = load((odd ? tiles[i].odd : tiles[i].even) + 16 * k);
                    const __m512i at = _mm512_add_epi32(_mm512_and_si512(x[i][k], slots), first);
                    const __m512i entry = _mm512_i32gather_epi32(at, table, 4);
                    const __m512i next = _mm512_add_epi32(
                        _mm512_mullo_epi32(_mm512_and_si512(entry, freqs), _mm512_srli_epi32(x[i][k], 11)),
                        _mm512_and_si512(_mm512_srli_epi32(entry, 12), slots));
                    const __mmask16 mask = _mm512_cmplt_epu32_mask(next, low);
                    const __m512i fresh = _mm512_maskz_expand_epi32(
                        mask, _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(words[i]))));
                    x[i][k] = _mm512_or_si512(_mm512_mask_slli_epi32(next, mask, next, 16), fresh);
                    words[i] += count_of(mask);
                    if (!odd) {
                        even[i][k] = _mm512_srai_epi32(entry, 24);
                    } else {
                        const __m512i pair =
                            _mm512_mask_blend_epi16(0xaaaaaaaa, even[i][k], _mm512_srai_epi32(entry, 8));
                        _mm512_storeu_si512(tiles[i].symbols + token * GROUP + 32 * k, pair);
                    }
                }
            }
        }
    }
    for (int i = 0; i < TILES; ++i) {
        tiles[i].words = words[i];
        for (int k = 0; k < 2; ++k) _mm512_storeu_si512(tiles[i].x + 16 * k, x[i][k]);
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

template <int TILES>
inline void encode_tiles(EncodeTile *tiles, int tokens, const uint32_t *table, const uint32_t *reciprocal) {
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
                    const __m512i entry = _mm512_i32gather_epi32(at, table, 4);
                    const __m512i inverse = _mm512_i32gather_epi32(at, reciprocal, 4);
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

void encode(EncodeTile *tiles, int count, int tokens, const uint32_t *table, const uint32_t *reciprocal) {
    if (count == 3) {
        encode_tiles<3>(tiles, tokens, table, reciprocal);
    } else if (count == 2) {
        encode_tiles<2>(tiles, tokens, table, reciprocal);
    } else {
        encode_tiles<1>(tiles, tokens, table, reciprocal);
    }
}

}  // namespace

constexpr Kernels avx512 = make_kernels(decode, encode);

}  // namespace lmc::codec

#pragma GCC pop_options

#endif
