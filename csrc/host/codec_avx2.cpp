// The codec's kernels with AVX2: 8 lanes a register.
#include <type_traits>

#include "codec.h"

#if LMC_X86

#pragma GCC push_options
#pragma GCC target("avx2,bmi2,popcnt")

namespace lmc::codec {
namespace {

#define W 8
#include "codec_values.inl"
#undef W

// For each mask of lanes that take or give a word: which of the next 8 words each lane takes; and which lane gives each of
// the 8 words before, the last of them used.
struct Orders {
    uint64_t take[256], give[256];
    constexpr Orders() : take(), give() {
        for (int mask = 0; mask < 256; ++mask) {
            int next = 0, free = 8;
            for (uint64_t lane = 0; lane < 8; ++lane) {
                if (mask >> lane & 1) take[mask] |= static_cast<uint64_t>(next++) << 8 * lane;
            }
            for (uint64_t lane = 8; lane-- > 0;) {
                if (mask >> lane & 1) give[mask] |= lane << 8 * --free;
            }
        }
    }
};
constexpr Orders orders;

inline __m256i order(const uint64_t *packed) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(packed)));
}
inline __m256i load(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

void decode(DecodeTile *tiles, int count, int tokens, const uint32_t *table) {
    const __m256i slots = _mm256_set1_epi32(SLOTS - 1), freqs = _mm256_set1_epi32(0xfff), limit = _mm256_set1_epi32(LOW);
    const auto *base = reinterpret_cast<const int *>(table);
    for (DecodeTile *tile = tiles; tile < tiles + count; ++tile) {
        const uint16_t *words = tile->words;
        __m256i x[4];
        for (int k = 0; k < 4; ++k) x[k] = load(tile->x + 8 * k);
        for (int token = 0; token < tokens; ++token) {
            __m256i even[4];
#pragma GCC unroll 2
            for (int odd = 0; odd < 2; ++odd) {
                const uint32_t *first = odd ? tile->odd : tile->even;
                __m256i entries[4];  // all gathers are under way before the first is used
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    const __m256i at = _mm256_or_si256(_mm256_and_si256(x[k], slots), load(first + 8 * k));
                    entries[k] = _mm256_i32gather_epi32(base, at, 4);
                }
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    const __m256i entry = entries[k];
                    const __m256i next = _mm256_add_epi32(
                        _mm256_mullo_epi32(_mm256_and_si256(entry, freqs), _mm256_srli_epi32(x[k], 11)),
                        _mm256_and_si256(_mm256_srli_epi32(entry, 12), slots));
                    const __m256i low = _mm256_cmpgt_epi32(limit, next);  // states are below 2^31
                    const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(low));
                    const __m256i fresh = _mm256_permutevar8x32_epi32(
                        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(words))), order(orders.take + mask));
                    x[k] = _mm256_blendv_epi8(next, _mm256_or_si256(_mm256_slli_epi32(next, 16), fresh), low);
                    words += __builtin_popcount(static_cast<unsigned>(mask));
                    if (!odd) {
                        even[k] = _mm256_srai_epi32(entry, 24);
                    } else {
                        const __m256i pair = _mm256_blend_epi16(even[k], _mm256_srai_epi32(entry, 8), 0xaa);
                        _mm256_storeu_si256(reinterpret_cast<__m256i *>(tile->symbols + token * GROUP + 16 * k), pair);
                    }
                }
            }
        }
        for (int k = 0; k < 4; ++k) _mm256_storeu_si256(reinterpret_cast<__m256i *>(tile->x + 8 * k), x[k]);
        tile->words = words;
    }
}

void encode(EncodeTile *tiles, int count, int tokens, const uint64_t *table) {
    const __m256i low16 = _mm256_set1_epi32(0xffff), twelve = _mm256_set1_epi32(0xfff), fifteen = _mm256_set1_epi32(15);
    const __m256i slots = _mm256_set1_epi32(SLOTS), tops = _mm256_set1_epi32(static_cast<int>(0xfff00000));
    const auto *base = reinterpret_cast<const int *>(table);
    for (EncodeTile *tile = tiles; tile < tiles + count; ++tile) {
        uint16_t *words = tile->words;
        __m256i x[4];
        for (int k = 0; k < 4; ++k) x[k] = load(tile->x + 8 * k);
        for (int token = tokens - 1; token >= 0; --token) {
#pragma GCC unroll 2
            for (int odd = 1; odd >= 0; --odd) {
#pragma GCC unroll 4
                for (int k = 3; k >= 0; --k) {
                    const __m256i pair = load(tile->entries + token * GROUP + 16 * k);
                    const __m256i at = odd ? _mm256_srli_epi32(pair, 16) : _mm256_and_si256(pair, low16);
                    const __m256i entry = _mm256_i32gather_epi32(base + 1, at, 8);
                    const __m256i inverse = _mm256_i32gather_epi32(base, at, 8);
                    const __m256i stays = _mm256_cmpgt_epi32(_mm256_and_si256(entry, tops), x[k]);  // both below 2^31
                    const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(stays)) ^ 255;
                    const __m256i given =
                        _mm256_permutevar8x32_epi32(_mm256_and_si256(x[k], low16), order(orders.give + mask));
                    // 8 words go out, those below the ones given until more are.
                    _mm_storeu_si128(reinterpret_cast<__m128i *>(words - 8),
                                     _mm_packus_epi32(_mm256_castsi256_si128(given), _mm256_extracti128_si256(given, 1)));
                    words -= __builtin_popcount(static_cast<unsigned>(mask));
                    const __m256i now = _mm256_blendv_epi8(_mm256_srli_epi32(x[k], 16), x[k], stays);
                    const __m256i evens = _mm256_srli_epi64(_mm256_mul_epu32(now, inverse), 32);
                    const __m256i odds = _mm256_mul_epu32(_mm256_srli_epi64(now, 32), _mm256_srli_epi64(inverse, 32));
                    const __m256i quotient = _mm256_srlv_epi32(_mm256_blend_epi32(evens, odds, 0xaa),
                                                               _mm256_and_si256(_mm256_srli_epi32(entry, 12), fifteen));
                    const __m256i factor = _mm256_sub_epi32(slots, _mm256_srli_epi32(entry, 20));
                    x[k] = _mm256_add_epi32(_mm256_add_epi32(now, _mm256_and_si256(entry, twelve)),
                                            _mm256_mullo_epi32(quotient, factor));
                }
            }
        }
        for (int k = 0; k < 4; ++k) _mm256_storeu_si256(reinterpret_cast<__m256i *>(tile->x + 8 * k), x[k]);
        tile->words = words;
    }
}

}  // namespace

constexpr Kernels avx2 = make_kernels(decode, encode);

}  // namespace lmc::codec

#pragma GCC pop_options

#endif
