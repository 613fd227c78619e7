// The codec's kernels with AVX2: 8 lanes a register. Encoding has no scatter of words to gain from it and stays plain.
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

// For each mask of lanes that need a word: which of the next 8 words each lane takes.
struct Spread {
    uint64_t order[256];
    constexpr Spread() : order() {
        for (int mask = 0; mask < 256; ++mask) {
            uint64_t packed = 0;
            for (int lane = 0, next = 0; lane < 8; ++lane) {
                if (mask >> lane & 1) packed |= static_cast<uint64_t>(next++) << 8 * lane;
            }
            order[mask] = packed;
        }
    }
};
constexpr Spread spreads;

inline __m256i load(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }

void decode(DecodeTile *tiles, int count, int tokens, const uint32_t *table) {
    const __m256i slots = _mm256_set1_epi32(SLOTS - 1), freqs = _mm256_set1_epi32(0xfff);
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
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) {
                    const __m256i at = _mm256_add_epi32(_mm256_and_si256(x[k], slots), load(first + 8 * k));
                    const __m256i entry = _mm256_i32gather_epi32(base, at, 4);
                    const __m256i next = _mm256_add_epi32(
                        _mm256_mullo_epi32(_mm256_and_si256(entry, freqs), _mm256_srli_epi32(x[k], 11)),
                        _mm256_and_si256(_mm256_srli_epi32(entry, 12), slots));
                    const __m256i low = _mm256_cmpeq_epi32(_mm256_srli_epi32(next, 15), _mm256_setzero_si256());
                    const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(low));
                    const __m256i order =
                        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(spreads.order + mask)));
                    const __m256i fresh = _mm256_permutevar8x32_epi32(
                        _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(words))), order);
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

}  // namespace

constexpr Kernels avx2 = make_kernels(decode, encode_plain);

}  // namespace lmc::codec

#pragma GCC pop_options

#endif
