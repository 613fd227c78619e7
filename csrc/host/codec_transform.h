// The codec's transform (docs/codec.md): what its kernels and the drivers share.
#pragma once

#include <lmcache_codec.h>

namespace lmc::codec {

constexpr int MOST_COMPONENT = 8191;
constexpr int64_t MOST_START = (int64_t{1} << 48) - 1;

// Where a profile's working memory holds what.
struct Room {
    float *components;      // [token][channel]; decoding: in steps, [token][64 G]
    float *cosine, *sine;   // [token][pair]
    int16_t *fixed;         // [TRANSFORM_TOKENS][padded block]
    int32_t *sums;          // the same
    int64_t bytes;
    explicit Room(const lmc_codec &codec);
};

// Whether the codec's profile fits its shape.
bool profile_fits(const lmc_codec &codec);

// Fills in the angles of the chunk's tokens.
void find_angles(const lmc_codec &codec, int64_t start);

// Components of `tokens` tokens of a row, the first of which is number `first` of the chunk, from their elements to
// the same tokens of the room. False where the row must stay raw.
bool to_components(const lmc_codec &codec, int row, int first, int tokens, const uint8_t *elements);

// Elements of tokens whose components the room holds, from its beginning on; token i's step is steps[i].
void from_components(const lmc_codec &codec, int row, int first, int tokens, const float *steps, uint8_t *elements);

}  // namespace lmc::codec
