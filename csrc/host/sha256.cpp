// SHA-256 (FIPS 180-4) over a chain of token chunks, with the x86 SHA instructions where the CPU has them.
#include <string.h>

#include "cpu.h"

namespace {

alignas(64) constexpr uint32_t K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

constexpr uint32_t INITIAL[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

using Compress = void (*)(uint32_t *state, const uint8_t *data, int64_t blocks);

inline uint32_t rotr(uint32_t v, int bits) { return v >> bits | v << (32 - bits); }

inline uint32_t read_be32(const uint8_t *p) {
    return static_cast<uint32_t>(p[0]) << 24 | static_cast<uint32_t>(p[1]) << 16 | static_cast<uint32_t>(p[2]) << 8 | p[3];
}

inline void write_be32(uint8_t *p, uint32_t v) {
    p[0] = static_cast<uint8_t>(v >> 24);
    p[1] = static_cast<uint8_t>(v >> 16);
    p[2] = static_cast<uint8_t>(v >> 8);
    p[3] = static_cast<uint8_t>(v);
}

void compress_portable(uint32_t *state, const uint8_t *data, int64_t blocks) {
    for (; blocks > 0; --blocks, data += 64) {
        uint32_t w[64];
        for (int t = 0; t < 16; ++t) w[t] = read_be32(data + 4 * t);
        for (int t = 16; t < 64; ++t) {
            const uint32_t s0 = rotr(w[t - 15], 7) ^ rotr(w[t - 15], 18) ^ w[t - 15] >> 3;
            const uint32_t s1 = rotr(w[t - 2], 17) ^ rotr(w[t - 2], 19) ^ w[t - 2] >> 10;
            w[t] = w[t - 16] + s0 + w[t - 7] + s1;
        }
        uint32_t a = state[0], b = state[1], c = state[2], d = state[3];
        uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
        for (int t = 0; t < 64; ++t) {
            const uint32_t t1 = h + (rotr(e, 6) ^ rotr(e, 11) ^ rotr(e, 25)) + ((e & f) ^ (~e & g)) + K[t] + w[t];
            const uint32_t t2 = (rotr(a, 2) ^ rotr(a, 13) ^ rotr(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            h = g;
            g = f;
            f = e;
            e = d + t1;
            d = c;
            c = b;
            b = a;
            a = t1 + t2;
        }
        state[0] += a;
        state[1] += b;
        state[2] += c;
        state[3] += d;
        state[4] += e;
        state[5] += f;
        state[6] += g;
        state[7] += h;
    }
}

#if LMC_X86

LMC_TARGET_SHA void compress_sha(uint32_t *state, const uint8_t *data, int64_t blocks) {
    const __m128i swap = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
    // The instructions want the state as (a, b, e, f) and (c, d, g, h).
    const __m128i badc = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(state)), 0xb1);
    const __m128i hgfe = _mm_shuffle_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(state + 4)), 0x1b);
    __m128i abef = _mm_alignr_epi8(badc, hgfe, 8);
    __m128i cdgh = _mm_blend_epi16(hgfe, badc, 0xf0);

    for (; blocks > 0; --blocks, data += 64) {
        const __m128i abef_before = abef, cdgh_before = cdgh;
        __m128i w[4];
        for (int i = 0; i < 4; ++i) {
            w[i] = _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i *>(data + 16 * i)), swap);
        }
#pragma GCC unroll 16
        for (int group = 0; group < 16; ++group) {  // four rounds each
            __m128i &now = w[group & 3];
            if (group >= 4) {
                // w[t-16] + s0(w[t-15]), + w[t-7], then + s1(w[t-2]).
                const __m128i &previous = w[(group + 3) & 3];
                now = _mm_sha256msg1_epu32(now, w[(group + 1) & 3]);
                now = _mm_add_epi32(now, _mm_alignr_epi8(previous, w[(group + 2) & 3], 4));
                now = _mm_sha256msg2_epu32(now, previous);
            }
            const __m128i wk = _mm_add_epi32(now, _mm_load_si128(reinterpret_cast<const __m128i *>(K + 4 * group)));
            cdgh = _mm_sha256rnds2_epu32(cdgh, abef, wk);
            abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(wk, 0x0e));
        }
        abef = _mm_add_epi32(abef, abef_before);
        cdgh = _mm_add_epi32(cdgh, cdgh_before);
    }
    const __m128i feba = _mm_shuffle_epi32(abef, 0x1b), dchg = _mm_shuffle_epi32(cdgh, 0xb1);
    _mm_storeu_si128(reinterpret_cast<__m128i *>(state), _mm_blend_epi16(feba, dchg, 0xf0));
    _mm_storeu_si128(reinterpret_cast<__m128i *>(state + 4), _mm_alignr_epi8(dchg, feba, 8));
}

#endif

}  // namespace

extern "C" void lmc_sha256_chain(const uint8_t *state, const int32_t *tokens, int64_t chunk_tokens, int64_t chunks,
                                 uint8_t *out) {
    Compress compress = compress_portable;
#if LMC_X86
    if (lmc::simd() & LMC_SHA) compress = compress_sha;
#endif
    const int64_t token_bytes = 4 * chunk_tokens;
    const uint64_t message_bits = 8 * static_cast<uint64_t>(32 + token_bytes);
    const uint8_t *in = reinterpret_cast<const uint8_t *>(tokens);
    const uint8_t *previous = state;
    for (int64_t chunk = 0; chunk < chunks; ++chunk, in += token_bytes, previous = out, out += 32) {
        uint32_t h[8];
        memcpy(h, INITIAL, sizeof h);
        // The message is previous digest || tokens || padding; whole blocks in the middle are read in place.
        uint8_t block[128];
        memcpy(block, previous, 32);
        const int64_t head = token_bytes < 32 ? token_bytes : 32;
        memcpy(block + 32, in, static_cast<size_t>(head));
        int64_t used = 32 + head, done = head;
        if (used == 64) {
            compress(h, block, 1);
            const int64_t whole = (token_bytes - done) / 64;
            compress(h, in + done, whole);
            done += 64 * whole;
            used = token_bytes - done;
            memcpy(block, in + done, static_cast<size_t>(used));
        }
        const int64_t total = used + 9 <= 64 ? 64 : 128;
        memset(block + used, 0, static_cast<size_t>(total - used));
        block[used] = 0x80;
        write_be32(block + total - 8, static_cast<uint32_t>(message_bits >> 32));
        write_be32(block + total - 4, static_cast<uint32_t>(message_bits));
        compress(h, block, total / 64);
        for (int i = 0; i < 8; ++i) write_be32(out + 4 * i, h[i]);
    }
}
