// The codec's kernels with AVX-512: 16 lanes a register, up to four tiles in flight to hide each other's latency.
#include <type_traits>

#include "codec.h"

#if LMC_X86

#pragma GCC push_options
#pragma GCC target("avx2,bmi2,popcnt,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")

namespace lmc::codec {
namespace {

#define W 16
#include "codec_values.inl"

inline __m512i load(const void *p) { return _mm512_loadu_si512(p); }
inline unsigned count_of(__mmask16 mask) { return static_cast<unsigned>(__builtin_popcount(mask)); }

// RECENT: with VBMI2, VNNI and BF16, as Sapphire Rapids and Zen 4 have them. Only what is instantiated so may use them.
#pragma GCC push_options
#pragma GCC target("avx512vbmi2,avx512vnni,avx512bf16")
// Tiles decoded side by side: a step of a tile is `fetch`, other tiles' work, `advance`. What waits for a gather must stand
// far behind it, or it fills the scheduler and nothing else starts.
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
    void fetch(int i, bool odd, VI (&entries)[2]) const {
        const __m512i slots = _mm512_set1_epi32(SLOTS - 1);
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
            // (x & slots) | first
            const __m512i first = load((odd ? tiles[i].odd : tiles[i].even) + 16 * k);
            entries[k] = as<VI>(_mm512_i32gather_epi32(_mm512_ternarylogic_epi32(x[i][k], slots, first, 0xea), table, 4));
        }
    }
    void advance(int i, const VI (&entries)[2]) {
        const __m512i freqs = _mm512_set1_epi32(SLOTS - 1), low = _mm512_set1_epi32(LOW), offset = _mm512_set1_epi32(0x110100);
        __m512i next[2];
        __mmask16 mask[2];
#pragma GCC unroll 2
        for (int k = 0; k < 2; ++k) {
            const auto entry = as<__m512i>(entries[k]);
            next[k] = _mm512_mullo_epi32(_mm512_and_si512(entry, freqs), _mm512_srli_epi32(x[i][k], 11));
            next[k] = RECENT ? _mm512_dpbusd_epi32(next[k], offset, entry)
                             : _mm512_add_epi32(next[k], _mm512_madd_epi16(_mm512_maddubs_epi16(offset, entry), _mm512_set1_epi16(1)));
            mask[k] = _mm512_cmplt_epu32_mask(next[k], low);
        }
        if (RECENT) {
            // The words of all lanes at once, then each to the high half of its own 32 bits.
            alignas(64) static constexpr uint16_t HIGH[2][32] = {
                {0, 0, 0, 1, 0, 2,  0, 3,  0, 4,  0, 5,  0, 6,  0, 7,
                 0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15},
                {0, 16, 0, 17, 0, 18, 0, 19, 0, 20, 0, 21, 0, 22, 0, 23,
                 0, 24, 0, 25, 0, 26, 0, 27, 0, 28, 0, 29, 0, 30, 0, 31}};
            const __mmask32 both = _mm512_kunpackw(mask[1], mask[0]);
            const __m512i fresh = _mm512_maskz_expand_epi16(both, load(words[i]));
            words[i] += static_cast<unsigned>(__builtin_popcount(both));
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                const __m512i high = _mm512_permutexvar_epi16(load(HIGH[k]), fresh);
                x[i][k] = _mm512_mask_shldi_epi32(next[k], mask[k], next[k], high, 16);
            }
        } else {
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                const __m256i fresh = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(words[i]));
                x[i][k] = _mm512_or_si512(_mm512_mask_slli_epi32(next[k], mask[k], next[k], 16),
                                          _mm512_maskz_expand_epi32(mask[k], _mm512_cvtepu16_epi32(fresh)));
                words[i] += count_of(mask[k]);
            }
        }
    }
};

template <bool RECENT>
inline VI add_symbol(VI sum, VI entry) {
    if (RECENT) return as<VI>(_mm512_dpbusd_epi32(as<__m512i>(sum), _mm512_set1_epi32(1 << 24), as<__m512i>(entry)));
    return sum + (entry >> 24);
}

// Rounded to nearest even; no value here is denormal. Even channels below odd ones.
template <bool RECENT>
inline void store_pair(uint16_t *to, VF even, VF odd) {
    if (!RECENT) return Bf16::store(to, even, odd);
    alignas(64) static constexpr uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(as<__m512>(odd), as<__m512>(even)));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(load(ORDER), both));
}

#include "codec_flight.inl"
#undef W
#pragma GCC pop_options

const bool recent = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2") &&
                    __builtin_cpu_supports("avx512vnni");

void decode(DecodeTile *tiles, int count, int tokens, const uint32_t *table) {
    (recent ? decode_flight<LMC_ROW_RAW, true> : decode_flight<LMC_ROW_RAW, false>)(
        tiles, count, tokens, table, nullptr, nullptr, nullptr, nullptr, 0);
}

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
    if (count == 4) {
        encode_tiles<2>(tiles, tokens, table);
        encode_tiles<2>(tiles + 2, tokens, table);
    } else if (count == 3) {
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
