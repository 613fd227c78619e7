// XXH3-64, seed 0, default secret. After the specification: Collet, "xxHash fast digest algorithm",
// doc/xxhash_spec.md of the xxHash project.
#include <string.h>

#include "cpu.h"

namespace {

constexpr uint64_t P32_1 = 0x9E3779B1, P32_2 = 0x85EBCA77, P32_3 = 0xC2B2AE3D;
constexpr uint64_t P64_1 = 0x9E3779B185EBCA87, P64_2 = 0xC2B2AE3D27D4EB4F, P64_3 = 0x165667B19E3779F9,
                   P64_4 = 0x85EBCA77C2B2AE63, P64_5 = 0x27D4EB2F165667C5;
constexpr uint64_t MX1 = 0x165667919E3779F9, MX2 = 0x9FB21C651E98DF25;

constexpr int64_t SECRET_BYTES = 192, STRIPE = 64, STRIPES = (SECRET_BYTES - STRIPE) / 8, BLOCK = STRIPE * STRIPES;

alignas(64) constexpr uint8_t SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

inline uint32_t read32(const uint8_t *p) {
    uint32_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

inline uint64_t read64(const uint8_t *p) {
    uint64_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

inline uint64_t rotl(uint64_t v, int bits) { return v << bits | v >> (64 - bits); }

inline uint64_t fold(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

inline uint64_t avalanche(uint64_t h) {
    h ^= h >> 37;
    h *= MX1;
    return h ^ h >> 32;
}

inline uint64_t avalanche_xxh64(uint64_t h) {
    h ^= h >> 33;
    h *= P64_2;
    h ^= h >> 29;
    h *= P64_3;
    return h ^ h >> 32;
}

inline uint64_t mix16(const uint8_t *in, const uint8_t *secret) {
    return fold(read64(in) ^ read64(secret), read64(in + 8) ^ read64(secret + 8));
}

uint64_t hash_0_to_16(const uint8_t *in, uint64_t length) {
    if (length > 8) {
        const uint64_t low = read64(in) ^ read64(SECRET + 24) ^ read64(SECRET + 32);
        const uint64_t high = read64(in + length - 8) ^ read64(SECRET + 40) ^ read64(SECRET + 48);
        return avalanche(length + __builtin_bswap64(low) + high + fold(low, high));
    }
    if (length >= 4) {
        const uint64_t both = read32(in + length - 4) + (static_cast<uint64_t>(read32(in)) << 32);
        uint64_t h = both ^ read64(SECRET + 8) ^ read64(SECRET + 16);
        h ^= rotl(h, 49) ^ rotl(h, 24);
        h *= MX2;
        h ^= (h >> 35) + length;
        h *= MX2;
        return h ^ h >> 28;
    }
    if (length) {
        const uint32_t combined = static_cast<uint32_t>(in[0]) << 16 | static_cast<uint32_t>(in[length >> 1]) << 24 |
                                  in[length - 1] | static_cast<uint32_t>(length) << 8;
        return avalanche_xxh64(combined ^ static_cast<uint64_t>(read32(SECRET) ^ read32(SECRET + 4)));
    }
    return avalanche_xxh64(read64(SECRET + 56) ^ read64(SECRET + 64));
}

uint64_t hash_17_to_240(const uint8_t *in, uint64_t length) {
    uint64_t acc = length * P64_1;
    if (length <= 128) {
        for (uint64_t i = (length - 1) / 32 + 1; i-- > 0;) {
            acc += mix16(in + 16 * i, SECRET + 32 * i);
            acc += mix16(in + length - 16 * (i + 1), SECRET + 32 * i + 16);
        }
        return avalanche(acc);
    }
    for (uint64_t i = 0; i < 8; ++i) acc += mix16(in + 16 * i, SECRET + 16 * i);
    acc = avalanche(acc);
    for (uint64_t i = 8; i < length / 16; ++i) acc += mix16(in + 16 * i, SECRET + 16 * (i - 8) + 3);
    return avalanche(acc + mix16(in + length - 16, SECRET + 136 - 17));
}

// Long inputs keep 8 lanes of 64 bits. Each variant consumes everything after the first 240-byte limit: whole
// blocks with a scramble after each, the stripes of the last block, and the last 64 bytes.

constexpr uint64_t START[8] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};

inline void accumulate_portable(uint64_t *acc, const uint8_t *in, const uint8_t *secret) {
    for (int i = 0; i < 8; ++i) {
        const uint64_t data = read64(in + 8 * i), keyed = data ^ read64(secret + 8 * i);
        acc[i ^ 1] += data;
        acc[i] += (keyed & 0xffffffff) * (keyed >> 32);
    }
}

void lanes_portable(uint64_t *acc, const uint8_t *in, int64_t length) {
    const int64_t blocks = (length - 1) / BLOCK;
    for (int64_t b = 0; b < blocks; ++b, in += BLOCK) {
        for (int64_t s = 0; s < STRIPES; ++s) accumulate_portable(acc, in + STRIPE * s, SECRET + 8 * s);
        for (int i = 0; i < 8; ++i) {
            acc[i] = (acc[i] ^ acc[i] >> 47 ^ read64(SECRET + SECRET_BYTES - STRIPE + 8 * i)) * P32_1;
        }
    }
    const int64_t rest = length - blocks * BLOCK;
    for (int64_t s = 0; s < (rest - 1) / STRIPE; ++s) accumulate_portable(acc, in + STRIPE * s, SECRET + 8 * s);
    accumulate_portable(acc, in + rest - STRIPE, SECRET + SECRET_BYTES - STRIPE - 7);
}

#if LMC_X86

LMC_TARGET_AVX2 inline __m256i step_avx2(__m256i acc, const uint8_t *in, const uint8_t *secret) {
    const __m256i data = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(in));
    const __m256i keyed = _mm256_xor_si256(data, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(secret)));
    const __m256i product = _mm256_mul_epu32(keyed, _mm256_srli_epi64(keyed, 32));
    return _mm256_add_epi64(acc, _mm256_add_epi64(product, _mm256_shuffle_epi32(data, 0x4e)));
}

LMC_TARGET_AVX2 inline __m256i scramble_avx2(__m256i acc, const uint8_t *secret) {
    const __m256i prime = _mm256_set1_epi32(static_cast<int>(P32_1));
    const __m256i keyed = _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)),
                                           _mm256_loadu_si256(reinterpret_cast<const __m256i *>(secret)));
    const __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(keyed, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(keyed, prime), _mm256_slli_epi64(high, 32));
}

LMC_TARGET_AVX2 void lanes_avx2(uint64_t *acc, const uint8_t *in, int64_t length) {
    __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(acc));
    __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(acc + 4));
    const int64_t blocks = (length - 1) / BLOCK;
    for (int64_t b = 0; b < blocks; ++b, in += BLOCK) {
        for (int64_t s = 0; s < STRIPES; ++s) {
            _mm_prefetch(reinterpret_cast<const char *>(in + STRIPE * s + 640), _MM_HINT_T0);
            low = step_avx2(low, in + STRIPE * s, SECRET + 8 * s);
            high = step_avx2(high, in + STRIPE * s + 32, SECRET + 8 * s + 32);
        }
        low = scramble_avx2(low, SECRET + SECRET_BYTES - STRIPE);
        high = scramble_avx2(high, SECRET + SECRET_BYTES - STRIPE + 32);
    }
    const int64_t rest = length - blocks * BLOCK;
    for (int64_t s = 0; s < (rest - 1) / STRIPE; ++s) {
        low = step_avx2(low, in + STRIPE * s, SECRET + 8 * s);
        high = step_avx2(high, in + STRIPE * s + 32, SECRET + 8 * s + 32);
    }
    const uint8_t *last_secret = SECRET + SECRET_BYTES - STRIPE - 7;
    low = step_avx2(low, in + rest - STRIPE, last_secret);
    high = step_avx2(high, in + rest - STRIPE + 32, last_secret + 32);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(acc), low);
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(acc + 4), high);
}

LMC_TARGET_AVX512 inline __m512i step_avx512(__m512i acc, const uint8_t *in, const uint8_t *secret) {
    const __m512i data = _mm512_loadu_si512(in);
    const __m512i keyed = _mm512_xor_si512(data, _mm512_loadu_si512(secret));
    const __m512i product = _mm512_mul_epu32(keyed, _mm512_srli_epi64(keyed, 32));
    return _mm512_add_epi64(acc, _mm512_add_epi64(product, _mm512_shuffle_epi32(data, _MM_PERM_BADC)));
}

LMC_TARGET_AVX512 void lanes_avx512(uint64_t *acc, const uint8_t *in, int64_t length) {
    __m512i lanes = _mm512_loadu_si512(acc);
    const __m512i scramble = _mm512_loadu_si512(SECRET + SECRET_BYTES - STRIPE);
    const __m512i prime = _mm512_set1_epi32(static_cast<int>(P32_1));
    const int64_t blocks = (length - 1) / BLOCK;
    for (int64_t b = 0; b < blocks; ++b, in += BLOCK) {
        for (int64_t s = 0; s < STRIPES; ++s) {
            _mm_prefetch(reinterpret_cast<const char *>(in + STRIPE * s + 640), _MM_HINT_T0);
            lanes = step_avx512(lanes, in + STRIPE * s, SECRET + 8 * s);
        }
        const __m512i keyed = _mm512_xor_si512(_mm512_xor_si512(lanes, _mm512_srli_epi64(lanes, 47)), scramble);
        const __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(keyed, 32), prime);
        lanes = _mm512_add_epi64(_mm512_mul_epu32(keyed, prime), _mm512_slli_epi64(high, 32));
    }
    const int64_t rest = length - blocks * BLOCK;
    for (int64_t s = 0; s < (rest - 1) / STRIPE; ++s) lanes = step_avx512(lanes, in + STRIPE * s, SECRET + 8 * s);
    lanes = step_avx512(lanes, in + rest - STRIPE, SECRET + SECRET_BYTES - STRIPE - 7);
    _mm512_storeu_si512(acc, lanes);
}

#endif

uint64_t hash_long(const uint8_t *in, int64_t length) {
    alignas(64) uint64_t acc[8];
    memcpy(acc, START, sizeof acc);
    switch (lmc::simd_level()) {
#if LMC_X86
        case LMC_AVX512: lanes_avx512(acc, in, length); break;
        case LMC_AVX2: lanes_avx2(acc, in, length); break;
#endif
        default: lanes_portable(acc, in, length);
    }
    uint64_t result = static_cast<uint64_t>(length) * P64_1;
    for (int i = 0; i < 4; ++i) {
        const uint8_t *secret = SECRET + 11 + 16 * i;
        result += fold(acc[2 * i] ^ read64(secret), acc[2 * i + 1] ^ read64(secret + 8));
    }
    return avalanche(result);
}

}  // namespace

extern "C" uint64_t lmc_xxh3_64(const void *data, int64_t length) {
    const auto *in = static_cast<const uint8_t *>(data);
    if (length <= 16) return hash_0_to_16(in, static_cast<uint64_t>(length));
    if (length <= 240) return hash_17_to_240(in, static_cast<uint64_t>(length));
    return hash_long(in, length);
}

extern "C" void lmc_xxh3_64_batch(const int64_t *addresses, const int64_t *lengths, int64_t count, uint64_t *out) {
    for (int64_t i = 0; i < count; ++i) out[i] = lmc_xxh3_64(reinterpret_cast<const void *>(addresses[i]), lengths[i]);
}
