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

// For each mask of lanes that take or give a word: which bytes of the next 8 words each lane takes, 128 for none; and which
// lane gives each of the 8 words before, the last of them used.
struct Orders {
    uint8_t take[256][16];
    uint64_t give[256];
    constexpr Orders() : take(), give() {
        for (int mask = 0; mask < 256; ++mask) {
            int next = 0, free = 8;
            for (int lane = 0; lane < 8; ++lane) {
                const bool takes = mask >> lane & 1;
                take[mask][2 * lane] = static_cast<uint8_t>(takes ? 2 * next : 128);
                take[mask][2 * lane + 1] = static_cast<uint8_t>(takes ? 2 * next++ + 1 : 128);
            }
            for (uint64_t lane = 8; lane-- > 0;) {
                if (mask >> lane & 1) give[mask] |= lane << 8 * --free;
            }
        }
    }
};
alignas(64) constexpr Orders orders;

inline __m256i order(const uint64_t *packed) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(packed)));
}
inline __m256i load(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
inline __m128i load_half(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }

template <int TILES, bool>
struct Flight {
    DecodeTile *const tiles;
    const int *const table;
    __m256i x[TILES][4];
    const uint16_t *words[TILES];

    Flight(DecodeTile *tiles_, const uint32_t *table_) : tiles(tiles_), table(reinterpret_cast<const int *>(table_)) {
        for (int i = 0; i < TILES; ++i) {
            words[i] = tiles[i].words;
            for (int k = 0; k < 4; ++k) x[i][k] = load(tiles[i].x + 8 * k);
        }
    }
    ~Flight() {
        for (int i = 0; i < TILES; ++i) {
            tiles[i].words = words[i];
            for (int k = 0; k < 4; ++k) _mm256_storeu_si256(reinterpret_cast<__m256i *>(tiles[i].x + 8 * k), x[i][k]);
        }
    }
    void fetch(int i, bool odd, VI (&entries)[4]) const {
        const uint32_t *first = odd ? tiles[i].odd : tiles[i].even;
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const __m256i at = _mm256_or_si256(_mm256_and_si256(x[i][k], _mm256_set1_epi32(SLOTS - 1)), load(first + 8 * k));
            entries[k] = as<VI>(_mm256_i32gather_epi32(table, at, 4));
        }
    }
    void advance(int i, const VI (&entries)[4]) {
        const __m256i freqs = _mm256_set1_epi32(SLOTS - 1), limit = _mm256_set1_epi32(LOW), offset = _mm256_set1_epi32(0x110100);
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
            const auto entry = as<__m256i>(entries[k]);
            const __m256i next = _mm256_add_epi32(
                _mm256_mullo_epi32(_mm256_and_si256(entry, freqs), _mm256_srli_epi32(x[i][k], 11)),
                _mm256_madd_epi16(_mm256_maddubs_epi16(offset, entry), _mm256_set1_epi16(1)));
            const __m256i low = _mm256_cmpgt_epi32(limit, next);  // states are below 2^31
            const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(low));
            const __m256i fresh = _mm256_cvtepu16_epi32(_mm_shuffle_epi8(load_half(words[i]), load_half(orders.take[mask])));
            x[i][k] = _mm256_or_si256(_mm256_sllv_epi32(next, _mm256_and_si256(low, _mm256_set1_epi32(16))), fresh);
            words[i] += __builtin_popcount(static_cast<unsigned>(mask));
        }
    }
};
template <bool>
inline VI add_symbol(VI sum, VI entry) {
    return sum + (entry >> 24);
}
template <bool>
inline void store_pair(uint16_t *to, VF even, VF odd) {
    Bf16::store(to, even, odd);
}

#include "codec_flight.inl"
#undef W

void decode(DecodeTile *tiles, int count, int tokens, const uint32_t *table) {
    decode_flight<LMC_ROW_RAW, false>(tiles, count, tokens, table, nullptr, nullptr, nullptr, nullptr, 0);
}
void decode_bf16(DecodeTile *tiles, int count, int tokens, const uint32_t *table, int mode, const float *token_scale,
                 const Channels *channels, const uint8_t *const *rests, uint16_t *const *outs, int64_t stride) {
    const auto go = [&](auto flight) { flight(tiles, count, tokens, table, token_scale, channels, rests, outs, stride); };
    if (mode == LMC_ROW_LOSSLESS) {
        go(decode_flight<LMC_ROW_LOSSLESS, false>);
    } else if (mode == LMC_ROW_ANCHORED) {
        go(decode_flight<LMC_ROW_ANCHORED, false>);
    } else {
        go(decode_flight<LMC_ROW_PER_TOKEN, false>);
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

constexpr Kernels avx2 = make_kernels(decode, encode, decode_bf16);

}  // namespace lmc::codec

#pragma GCC pop_options

#endif
