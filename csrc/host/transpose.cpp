// Transpositions inside pages: keys stored as [dim][token], and pairs interleaved for matrix instructions.
//
// A tile is one 16-byte lane of E = 16 / element size elements from each of LANES * E source rows; lane by lane it is
// an E x E transposition by unpacking, and each destination row gets LANES * 16 contiguous bytes: a whole cache line
// for four lanes, which is what streaming stores want.
#include <string.h>

#include "cpu.h"
#include "nest.h"

namespace lmc {
namespace {

template <class T>
void tile_portable(char *to, const char *from, int64_t to_stride, int64_t from_stride, int64_t us, int64_t vs) {
    for (int64_t v = 0; v < vs; ++v) {
        for (int64_t u = 0; u < us; ++u) {
            memcpy(to + v * to_stride + u * static_cast<int64_t>(sizeof(T)),
                   from + u * from_stride + v * static_cast<int64_t>(sizeof(T)), sizeof(T));
        }
    }
}

template <class T>
void transpose_portable(const Nest &nest, char *to, const char *from, bool) {
    constexpr int64_t SIDE = 16, ELEMENT = sizeof(T);
    for (int64_t w = 0; w < nest.w.extent; ++w, to += nest.w.to, from += nest.w.from)
    for (int64_t u = 0; u < nest.u.extent; u += SIDE) {
        const int64_t us = nest.u.extent - u < SIDE ? nest.u.extent - u : SIDE;
        for (int64_t v = 0; v < nest.v.extent; v += SIDE) {
            const int64_t vs = nest.v.extent - v < SIDE ? nest.v.extent - v : SIDE;
            tile_portable<T>(to + v * nest.v.to + u * ELEMENT, from + u * nest.u.from + v * ELEMENT, nest.v.to,
                             nest.u.from, us, vs);
        }
    }
}

#if LMC_X86

LMC_TARGET_AVX512 inline __m512i rows4(const char *from, int64_t apart) {
    __m512i rows = _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    rows = _mm512_inserti32x4(rows, _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + apart)), 1);
    rows = _mm512_inserti32x4(rows, _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + 2 * apart)), 2);
    return _mm512_inserti32x4(rows, _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + 3 * apart)), 3);
}

LMC_TARGET_AVX2 inline __m256i rows2(const char *from, int64_t apart) {
    const __m256i row = _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from)));
    return _mm256_inserti128_si256(row, _mm_loadu_si128(reinterpret_cast<const __m128i *>(from + apart)), 1);
}

LMC_TARGET_AVX512 inline void put(char *to, __m512i row, bool stream) {
    if (stream) {
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to), row);
    } else {
        _mm512_storeu_si512(to, row);
    }
}

LMC_TARGET_AVX2 inline void put(char *to, __m256i row, bool stream) {
    if (stream) {
        _mm256_stream_si256(reinterpret_cast<__m256i *>(to), row);
    } else {
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), row);
    }
}

// 32 rows x 8 elements of 2 bytes -> 8 rows of 64 bytes.
LMC_TARGET_AVX512 inline void tile2_avx512(char *to, const char *from, int64_t ts, int64_t fs, bool stream) {
    __m512i a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = rows4(from + i * fs, 8 * fs);
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm512_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm512_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        for (int k = 0; k < 2; ++k) {
            a[4 * i + 2 * k] = _mm512_unpacklo_epi32(b[4 * i + k], b[4 * i + k + 2]);
            a[4 * i + 2 * k + 1] = _mm512_unpackhi_epi32(b[4 * i + k], b[4 * i + k + 2]);
        }
    }
    for (int i = 0; i < 4; ++i) {
        put(to + 2 * i * ts, _mm512_unpacklo_epi64(a[i], a[i + 4]), stream);
        put(to + (2 * i + 1) * ts, _mm512_unpackhi_epi64(a[i], a[i + 4]), stream);
    }
}

// 16 rows x 8 elements of 2 bytes -> 8 rows of 32 bytes.
LMC_TARGET_AVX2 inline void tile2_avx2(char *to, const char *from, int64_t ts, int64_t fs, bool stream) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = rows2(from + i * fs, 8 * fs);
    for (int i = 0; i < 4; ++i) {
        b[2 * i] = _mm256_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
        for (int k = 0; k < 2; ++k) {
            a[4 * i + 2 * k] = _mm256_unpacklo_epi32(b[4 * i + k], b[4 * i + k + 2]);
            a[4 * i + 2 * k + 1] = _mm256_unpackhi_epi32(b[4 * i + k], b[4 * i + k + 2]);
        }
    }
    for (int i = 0; i < 4; ++i) {
        put(to + 2 * i * ts, _mm256_unpacklo_epi64(a[i], a[i + 4]), stream);
        put(to + (2 * i + 1) * ts, _mm256_unpackhi_epi64(a[i], a[i + 4]), stream);
    }
}

// 16 rows x 4 elements of 4 bytes -> 4 rows of 64 bytes.
LMC_TARGET_AVX512 inline void tile4_avx512(char *to, const char *from, int64_t ts, int64_t fs, bool stream) {
    const __m512i r0 = rows4(from, 4 * fs), r1 = rows4(from + fs, 4 * fs);
    const __m512i r2 = rows4(from + 2 * fs, 4 * fs), r3 = rows4(from + 3 * fs, 4 * fs);
    const __m512i a = _mm512_unpacklo_epi32(r0, r1), b = _mm512_unpackhi_epi32(r0, r1);
    const __m512i c = _mm512_unpacklo_epi32(r2, r3), d = _mm512_unpackhi_epi32(r2, r3);
    put(to, _mm512_unpacklo_epi64(a, c), stream);
    put(to + ts, _mm512_unpackhi_epi64(a, c), stream);
    put(to + 2 * ts, _mm512_unpacklo_epi64(b, d), stream);
    put(to + 3 * ts, _mm512_unpackhi_epi64(b, d), stream);
}

// 8 rows x 4 elements of 4 bytes -> 4 rows of 32 bytes.
LMC_TARGET_AVX2 inline void tile4_avx2(char *to, const char *from, int64_t ts, int64_t fs, bool stream) {
    const __m256i r0 = rows2(from, 4 * fs), r1 = rows2(from + fs, 4 * fs);
    const __m256i r2 = rows2(from + 2 * fs, 4 * fs), r3 = rows2(from + 3 * fs, 4 * fs);
    const __m256i a = _mm256_unpacklo_epi32(r0, r1), b = _mm256_unpackhi_epi32(r0, r1);
    const __m256i c = _mm256_unpacklo_epi32(r2, r3), d = _mm256_unpackhi_epi32(r2, r3);
    put(to, _mm256_unpacklo_epi64(a, c), stream);
    put(to + ts, _mm256_unpackhi_epi64(a, c), stream);
    put(to + 2 * ts, _mm256_unpacklo_epi64(b, d), stream);
    put(to + 3 * ts, _mm256_unpackhi_epi64(b, d), stream);
}

// Whether streaming stores to `to` + any multiple of the strides are aligned to `bytes`.
inline bool aligned(const char *to, int64_t strides, uintptr_t bytes) {
    return ((reinterpret_cast<uintptr_t>(to) | static_cast<uintptr_t>(strides)) & (bytes - 1)) == 0;
}

// Transpositions whose u loop is a multiple of LINE bytes and whose v loop is one of 16. The source is read a cache
// line of v at a time (its lines stay in L1 while u sweeps over them), the next line ahead of need.
#define LMC_TILES(NAME, TARGET, TILE, ELEMENT, LINE)                                                             \
    TARGET void NAME(const Nest &nest, char *to, const char *from, bool stream) {                                \
        constexpr int64_t us = LINE / ELEMENT, vs = 16 / ELEMENT, line = 64 / ELEMENT;                           \
        const int64_t ts = nest.v.to, fs = nest.u.from;                                                          \
        const bool whole = stream && aligned(to, ts | nest.w.to, LINE);                                          \
        for (int64_t w = 0; w < nest.w.extent; ++w, to += nest.w.to, from += nest.w.from) {                      \
            for (int64_t v = 0; v < nest.v.extent; v += line) {                                                  \
                const int64_t end = v + line < nest.v.extent ? v + line : nest.v.extent;                         \
                for (int64_t u = 0; u < nest.u.extent; u += us) {                                                \
                    const char *rows = from + u * fs;                                                            \
                    for (int64_t i = 0; i < us; ++i) _mm_prefetch(rows + i * fs + end * ELEMENT, _MM_HINT_T0);   \
                    for (int64_t k = v; k < end; k += vs) {                                                      \
                        TILE(to + k * ts + u * ELEMENT, rows + k * ELEMENT, ts, fs, whole);                      \
                    }                                                                                            \
                }                                                                                                \
            }                                                                                                    \
        }                                                                                                        \
    }
LMC_TILES(tiles2_avx512, LMC_TARGET_AVX512, tile2_avx512, 2, 64)
LMC_TILES(tiles2_avx2, LMC_TARGET_AVX2, tile2_avx2, 2, 32)
LMC_TILES(tiles4_avx512, LMC_TARGET_AVX512, tile4_avx512, 4, 64)
LMC_TILES(tiles4_avx2, LMC_TARGET_AVX2, tile4_avx2, 4, 32)
#undef LMC_TILES

// 16 pairs of 2-byte elements at a time: first elements to one row, second to another.
LMC_TARGET_AVX2 void split_pairs_avx2(const Nest &nest, char *to, const char *from, bool) {
    const __m256i low = _mm256_set1_epi32(0xffff);
    for (int64_t w = 0; w < nest.w.extent; ++w, to += nest.w.to, from += nest.w.from) {
        for (int64_t u = 0; u < nest.u.extent; u += 16) {
            const auto *in = reinterpret_cast<const __m256i *>(from + 4 * u);
            const __m256i a = _mm256_loadu_si256(in), b = _mm256_loadu_si256(in + 1);
            const __m256i even = _mm256_packus_epi32(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
            const __m256i odd = _mm256_packus_epi32(_mm256_srli_epi32(a, 16), _mm256_srli_epi32(b, 16));
            put(to + 2 * u, _mm256_permute4x64_epi64(even, 0xd8), false);
            put(to + nest.v.to + 2 * u, _mm256_permute4x64_epi64(odd, 0xd8), false);
        }
    }
}

// The same, 16 pairs from each of two steps of w that follow each other in the rows: whole cache lines.
LMC_TARGET_AVX512 void split_pairs_avx512(const Nest &nest, char *to, const char *from, bool stream) {
    alignas(64) static constexpr uint16_t EVEN[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                                      32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
    const __m512i even = _mm512_load_si512(EVEN), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    const bool whole = stream && aligned(to, nest.v.to, 64);
    for (int64_t w = 0; w < nest.w.extent; w += 2) {
        const char *in = from + w * nest.w.from;
        const __m512i a = _mm512_loadu_si512(in), b = _mm512_loadu_si512(in + nest.w.from);
        put(to + 32 * w, _mm512_permutex2var_epi16(a, even, b), whole);
        put(to + nest.v.to + 32 * w, _mm512_permutex2var_epi16(a, odd, b), whole);
    }
}

// The inverse: two rows of 2-byte elements to pairs.
LMC_TARGET_AVX2 void join_pairs_avx2(const Nest &nest, char *to, const char *from, bool stream) {
    const bool whole = stream && aligned(to, nest.w.to, 64);
    for (int64_t w = 0; w < nest.w.extent; ++w, to += nest.w.to, from += nest.w.from) {
        for (int64_t v = 0; v < nest.v.extent; v += 16) {
            const __m256i even = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + 2 * v));
            const __m256i odd = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from + nest.u.from + 2 * v));
            const __m256i low = _mm256_unpacklo_epi16(even, odd), high = _mm256_unpackhi_epi16(even, odd);
            put(to + 4 * v, _mm256_permute2x128_si256(low, high, 0x20), whole);
            put(to + 4 * v + 32, _mm256_permute2x128_si256(low, high, 0x31), whole);
        }
    }
}

#endif

}  // namespace

Kernel pick_transpose_kernel(const Nest &nest) {
#if LMC_X86
    const int level = simd_level();
    const int64_t row = nest.u.extent * nest.run, column = nest.v.extent * nest.run;
    if (level != LMC_PORTABLE) {
        if (nest.run == 2 && nest.v.extent == 2 && nest.u.from == 4 && nest.u.extent % 16 == 0) {
            const bool lines = nest.u.extent == 16 && nest.w.to == 32 && nest.w.extent % 2 == 0;
            return level == LMC_AVX512 && lines ? split_pairs_avx512 : split_pairs_avx2;
        }
        if (nest.run == 2 && nest.u.extent == 2 && nest.v.to == 4 && nest.v.extent % 16 == 0) return join_pairs_avx2;
        if (level == LMC_AVX512 && row % 64 == 0 && column % 16 == 0) {
            return nest.run == 2 ? tiles2_avx512 : tiles4_avx512;
        }
        if (row % 32 == 0 && column % 16 == 0) return nest.run == 2 ? tiles2_avx2 : tiles4_avx2;
    }
#endif
    return nest.run == 2 ? transpose_portable<uint16_t> : transpose_portable<uint32_t>;
}

}  // namespace lmc
