// The codec's transform for each instruction set. Sums are of integers and exact; floats are computed one operation at
// a time, in the order docs/codec.md says, whatever the width.
#include "codec_transform.h"

#include <string.h>

#include "../cuda/transform.h"
#include "codec.h"

namespace lmc::codec {
namespace {

constexpr int TRANSFORM_TOKENS = 48, MOST_BLOCK = 256;

// What a kernel is told of a row.
struct Turning {
    int channels, heads, dim, pairs, blocks, block, size, highest;  // size: of a block, padded
    const float *cosine, *sine;  // of the first token
    const float *mean;           // of K; null for V, which is not turned either
    const int16_t *matrix;
    int16_t *fixed;
    int32_t *sums;
};

template <class T>
struct Half {
    using Element = uint16_t;
    static float load(uint16_t bits) { return T::load(bits); }
    static uint32_t store(float value) { return T::store(value); }
};
struct Whole {
    using Element = float;
    static float load(float value) { return value; }
    static float store(float value) { return value; }
};

struct TransformKernels {
    bool (*to_components[3])(const Turning &t, int tokens, const void *elements, float *x);
    void (*from_components[3])(const Turning &t, int tokens, const float *steps, float *x, int64_t stride, void *elements);
    void (*find_angles)(const uint64_t *turns, int pairs, uint64_t position, int tokens, float *cosine, float *sine);
};

namespace plain {
#define W 4
#if LMC_X86
#define LMC_DOT(sum, a, b) (sum + (V)_mm_madd_epi16((__m128i)a, (__m128i)b))
#else
#define LMC_DOT(sum, a, b) \
    (sum + (V)(((S)(a << 16) >> 16) * ((S)(b << 16) >> 16)) + (V)(((S)a >> 16) * ((S)b >> 16)))
#endif
#include "codec_transform.inl"
#undef LMC_DOT
#undef W
}  // namespace plain

#if LMC_X86
#pragma GCC push_options
#pragma GCC target("avx2,bmi2")
namespace wide {
#define W 8
#define LMC_DOT(sum, a, b) (sum + (V)_mm256_madd_epi16((__m256i)a, (__m256i)b))
#include "codec_transform.inl"
#undef LMC_DOT
#undef W
}  // namespace wide
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,bmi2,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
namespace wider {
#define W 16
#define LMC_DOT(sum, a, b) (sum + (V)_mm512_madd_epi16((__m512i)a, (__m512i)b))
#include "codec_transform.inl"
#undef LMC_DOT
}  // namespace wider
#pragma GCC target("avx512vnni")
namespace widest {
#define LMC_DOT(sum, a, b) ((V)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b))
#include "codec_transform.inl"
#undef LMC_DOT
#undef W
}  // namespace widest
#pragma GCC pop_options
#endif

const TransformKernels &transform_kernels() {
#if LMC_X86
    const int level = simd_level();
    if (level == LMC_AVX512) return __builtin_cpu_supports("avx512vnni") ? widest::kernels : wider::kernels;
    if (level == LMC_AVX2) return wide::kernels;
#endif
    return plain::kernels;
}

constexpr int HIGHEST[3] = {60, 13, 60};

int padded(const lmc_codec_profile &p) { return (p.block + GROUP - 1) / GROUP * GROUP; }

Turning turning_of(const lmc_codec &codec, int row, int first, const int16_t *matrices) {
    const lmc_codec_profile &p = *codec.profile;
    const Room room(codec);
    const int size = padded(p);
    return {codec.channels, p.heads, codec.channels / p.heads, p.pairs, p.blocks, p.block, size, HIGHEST[codec.dtype],
            room.cosine + int64_t{first} * p.pairs, room.sine + int64_t{first} * p.pairs,
            row % 2 ? nullptr : p.mean + int64_t{row / 2} * codec.channels,
            matrices + int64_t{row} * p.blocks * size * size, room.fixed, room.sums};
}

}  // namespace

Room::Room(const lmc_codec &codec) {
    const lmc_codec_profile &p = *codec.profile;
    const int64_t width = (codec.channels + GROUP - 1) / GROUP * GROUP, work = int64_t{TRANSFORM_TOKENS} * padded(p);
    auto *at = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(p.room) + 63) & ~uintptr_t{63});
    const auto take = [&](int64_t count) {
        uint8_t *found = at;
        at += (count + 63) / 64 * 64;
        return found;
    };
    components = reinterpret_cast<float *>(take(codec.tokens * width * 4));
    cosine = reinterpret_cast<float *>(take(int64_t{codec.tokens} * p.pairs * 4));
    sine = reinterpret_cast<float *>(take(int64_t{codec.tokens} * p.pairs * 4));
    fixed = reinterpret_cast<int16_t *>(take(work * 2));
    sums = reinterpret_cast<int32_t *>(take(work * 4));
    bytes = at - static_cast<uint8_t *>(p.room) + 64;
}

bool profile_fits(const lmc_codec &codec) {
    const lmc_codec_profile &p = *codec.profile;
    return codec.dtype <= LMC_F32 && codec.planes == 2 && p.block >= 1 && p.block <= MOST_BLOCK && p.blocks >= 1 &&
           int64_t{p.blocks} * p.block == codec.channels && (p.blocks == 1 || p.block % GROUP == 0) && p.heads >= 1 &&
           codec.channels % p.heads == 0 && p.block % (codec.channels / p.heads) == 0 && p.pairs >= 0 && p.pairs <= codec.channels / p.heads / 2;
}

void find_angles(const lmc_codec &codec, int64_t start) {
    const Room room(codec);
    transform_kernels().find_angles(codec.profile->turns, codec.profile->pairs, static_cast<uint64_t>(start), codec.tokens,
                                    room.cosine, room.sine);
}

bool to_components(const lmc_codec &codec, int row, int first, int tokens, const uint8_t *elements) {
    return transform_kernels().to_components[codec.dtype](
        turning_of(codec, row, first, codec.profile->there), tokens, elements,
        Room(codec).components + int64_t{first} * codec.channels);
}

void from_components(const lmc_codec &codec, int row, int first, int tokens, const float *steps, uint8_t *elements) {
    transform_kernels().from_components[codec.dtype](turning_of(codec, row, first, codec.profile->back), tokens, steps,
                                                     Room(codec).components, (codec.channels + GROUP - 1) / GROUP * GROUP,
                                                     elements);
}

}  // namespace lmc::codec

extern "C" int64_t lmc_codec_room_bytes(const lmc_codec *codec) {
    using namespace lmc::codec;
    return codec->profile && profile_fits(*codec) ? Room(*codec).bytes : static_cast<int64_t>(LMC_CODEC_ARGUMENT);
}
