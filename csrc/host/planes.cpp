// Byte planes: all first bytes of the elements, then all second bytes, ... Exponents and mantissas then compress apart.
#include <errno.h>

#include "cpu.h"

namespace {

template <int ITEM>
void split_portable(const uint8_t *in, uint8_t *out, int64_t begin, int64_t count) {
    for (int64_t i = begin; i < count; ++i) {
        for (int k = 0; k < ITEM; ++k) out[k * count + i] = in[ITEM * i + k];
    }
}

template <int ITEM>
void join_portable(const uint8_t *in, uint8_t *out, int64_t begin, int64_t count) {
    for (int64_t i = begin; i < count; ++i) {
        for (int k = 0; k < ITEM; ++k) out[ITEM * i + k] = in[k * count + i];
    }
}

#if LMC_X86

LMC_TARGET_AVX2 inline __m256i get(const uint8_t *from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(from));
}

LMC_TARGET_AVX2 inline void put(uint8_t *to, __m256i bytes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to), bytes);
}

// Each does 32 elements a step and returns the first element not done.

LMC_TARGET_AVX2 int64_t split2_avx2(const uint8_t *in, uint8_t *out, int64_t count) {
    const __m256i low = _mm256_set1_epi16(0xff);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m256i a = get(in + 2 * i), b = get(in + 2 * i + 32);
        const __m256i first = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
        const __m256i second = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
        put(out + i, _mm256_permute4x64_epi64(first, 0xd8));
        put(out + count + i, _mm256_permute4x64_epi64(second, 0xd8));
    }
    return i;
}

LMC_TARGET_AVX2 int64_t join2_avx2(const uint8_t *in, uint8_t *out, int64_t count) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m256i a = get(in + i), b = get(in + count + i);
        const __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
        put(out + 2 * i, _mm256_permute2x128_si256(low, high, 0x20));
        put(out + 2 * i + 32, _mm256_permute2x128_si256(low, high, 0x31));
    }
    return i;
}

LMC_TARGET_AVX2 int64_t split4_avx2(const uint8_t *in, uint8_t *out, int64_t count) {
    // Bytes of one plane together within each lane, then plane by plane across the four registers.
    const __m256i by_plane = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                              0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i in_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        __m256i r[4];
        for (int k = 0; k < 4; ++k) r[k] = _mm256_shuffle_epi8(get(in + 4 * i + 32 * k), by_plane);
        const __m256i ab = _mm256_unpacklo_epi32(r[0], r[1]), cd = _mm256_unpacklo_epi32(r[2], r[3]);
        const __m256i ef = _mm256_unpackhi_epi32(r[0], r[1]), gh = _mm256_unpackhi_epi32(r[2], r[3]);
        put(out + i, _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(ab, cd), in_order));
        put(out + count + i, _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(ab, cd), in_order));
        put(out + 2 * count + i, _mm256_permutevar8x32_epi32(_mm256_unpacklo_epi64(ef, gh), in_order));
        put(out + 3 * count + i, _mm256_permutevar8x32_epi32(_mm256_unpackhi_epi64(ef, gh), in_order));
    }
    return i;
}

LMC_TARGET_AVX2 int64_t join4_avx2(const uint8_t *in, uint8_t *out, int64_t count) {
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) {
        const __m256i p0 = get(in + i), p1 = get(in + count + i);
        const __m256i p2 = get(in + 2 * count + i), p3 = get(in + 3 * count + i);
        const __m256i low01 = _mm256_unpacklo_epi8(p0, p1), high01 = _mm256_unpackhi_epi8(p0, p1);
        const __m256i low23 = _mm256_unpacklo_epi8(p2, p3), high23 = _mm256_unpackhi_epi8(p2, p3);
        const __m256i a = _mm256_unpacklo_epi16(low01, low23), b = _mm256_unpackhi_epi16(low01, low23);
        const __m256i c = _mm256_unpacklo_epi16(high01, high23), d = _mm256_unpackhi_epi16(high01, high23);
        put(out + 4 * i, _mm256_permute2x128_si256(a, b, 0x20));
        put(out + 4 * i + 32, _mm256_permute2x128_si256(c, d, 0x20));
        put(out + 4 * i + 64, _mm256_permute2x128_si256(a, b, 0x31));
        put(out + 4 * i + 96, _mm256_permute2x128_si256(c, d, 0x31));
    }
    return i;
}

#endif

}  // namespace

extern "C" int32_t lmc_split_planes(const void *elements_in, void *planes_out, int64_t elements, int32_t itemsize) {
    const auto *in = static_cast<const uint8_t *>(elements_in);
    auto *out = static_cast<uint8_t *>(planes_out);
    if (itemsize != 2 && itemsize != 4) return -EINVAL;
    int64_t done = 0;
#if LMC_X86
    if (lmc::simd_level() != LMC_PORTABLE) done = (itemsize == 2 ? split2_avx2 : split4_avx2)(in, out, elements);
#endif
    (itemsize == 2 ? split_portable<2> : split_portable<4>)(in, out, done, elements);
    return 0;
}

extern "C" int32_t lmc_join_planes(const void *planes_in, void *elements_out, int64_t elements, int32_t itemsize) {
    const auto *in = static_cast<const uint8_t *>(planes_in);
    auto *out = static_cast<uint8_t *>(elements_out);
    if (itemsize != 2 && itemsize != 4) return -EINVAL;
    int64_t done = 0;
#if LMC_X86
    if (lmc::simd_level() != LMC_PORTABLE) done = (itemsize == 2 ? join2_avx2 : join4_avx2)(in, out, elements);
#endif
    (itemsize == 2 ? join_portable<2> : join_portable<4>)(in, out, done, elements);
    return 0;
}
