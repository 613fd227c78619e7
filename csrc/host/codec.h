// The cachegen codec (docs/codec.md), inside: what the drivers share with the kernels of each instruction set.
#pragma once

#include <lmcache_codec.h>
#include <string.h>

#include "cpu.h"

namespace lmc::codec {

constexpr int GROUP = 64, LANES = 32, MAX_TOKENS = 1024, MAX_CHANNELS = 16384, MAX_LAYERS = 1024, MAX_RAW = 16;
constexpr int LOSSY_TABLES = 24, LOSSLESS_TABLES = 11, SLOTS = 2048;
constexpr uint32_t LOW = 1u << 15;
// Tokens whose symbols lie between the two halves of the work (values, entropy) at a time: two tiles fit in L1.
constexpr int BLOCK = 64;

inline int64_t align16(int64_t v) { return (v + 15) & ~int64_t{15}; }

// Decoding: [table][slot] = freq (11 bits) | symbol << 24, and slot - cum is byte 1 + 17 * byte 2, both signed: one
// instruction adds that to a sum, and the bits of freq within byte 1 do no harm.
// Encoding: [table][symbol & 255] = the reciprocal that replaces a division, and from bit 32 on
// bias | (shift - 1) << 12 | freq << 20.
struct Models {
    uint32_t decode[LOSSY_TABLES][SLOTS], decode_lossless[LOSSLESS_TABLES][SLOTS];
    uint64_t encode[LOSSY_TABLES][256], encode_lossless[LOSSLESS_TABLES][256];
    int32_t support[LOSSY_TABLES], length[LOSSLESS_TABLES];
    int64_t variance[LOSSY_TABLES - 1], mean[LOSSLESS_TABLES - 2];
    uint64_t id;
};
extern const Models &models;

// One tile being decoded or encoded; `words` moves.
struct DecodeTile {
    uint32_t x[LANES];
    uint32_t even[LANES], odd[LANES];  // first slot of each channel's table, in entries
    const uint16_t *words;
    int16_t symbols[BLOCK * GROUP];
};
struct EncodeTile {
    uint32_t x[LANES];
    uint16_t *words;                  // written downwards, and up to 8 more below are overwritten
    uint16_t entries[BLOCK * GROUP];  // table * 256 + (symbol & 255)
};

// Channels of a group, and what the encoder found out about them.
struct Measure {
    int64_t q1[GROUP], q2[GROUP];
    int32_t low[GROUP], high[GROUP];
    // Of neighbouring tokens: largest difference and sum of squared ones; and the first token.
    int32_t widest[GROUP], first[GROUP];
    uint32_t energy[GROUP];
};
struct Channels {
    int32_t top[GROUP];  // mode 3
    int32_t shift[GROUP];
    // anchor + ((gain * r + 1) >> 1) as (q + round) >> halve from q = r + anchor: anchor + 1 and 1 for gain 1, 0 and 0 for
    // gain 2; for gain 0, where q is within 127 of the anchor, 255 anchor + 128 and 8, which leave the anchor.
    int32_t round[GROUP], halve[GROUP];
    int32_t previous[GROUP];  // q of the token before a tile; decoding, of the token before
    float scale[GROUP];    // decoding: step * 2^shift, encoding: inverse * 2^-shift (mode 2: the power only)
    int32_t entry[GROUP];  // the table; for the kernels, where it begins
};

// Elements in the order [token][channel], `stride` elements from token to token; 64 channels unless `count` is given.
// `token_scale`: a factor for each token.
struct Values {
    uint32_t (*peak)(const void *in, int64_t count);  // largest |x|, as bits
    uint64_t (*energy)(const void *in, int64_t count, float scale);
    uint64_t (*spread)(const void *in, int64_t stride, int tokens, float scale);
    // The rest twice: without and with prediction from the token before. `begins`: the first token has none.
    void (*measure[2])(const void *in, int64_t stride, int tokens, const float *token_scale, Measure *out);
    void (*quantise[2])(const void *in, int64_t stride, int tokens, bool begins, const float *token_scale,
                        const Channels *channels, uint16_t *entries);
    void (*restore[2])(const int16_t *symbols, int tokens, const float *token_scale, Channels *channels, void *out,
                       int64_t stride);
};
// Lossless. `rest`: the tile's remainder section; `at`: first token of the block within the tile of `tile` tokens.
struct Bits {
    void (*scan)(const void *in, int64_t stride, int tokens, Measure *out);  // q1: sum; low, high: of exponent fields
    void (*split)(const void *in, int64_t stride, int tokens, const Channels *channels, uint16_t *entries,
                  uint8_t *rest, int at, int tile);
    void (*join)(const int16_t *symbols, int tokens, const Channels *channels, const uint8_t *rest, int at, int tile,
                 void *out, int64_t stride);
};
struct Kernels {
    Values values[3];  // bfloat16, float16, float32
    Bits bits[5];      // by dtype
    // Adds to plain and weighted the sums over `words` words that docs/codec.md calls A and B; the first is number `first`.
    void (*check)(const uint8_t *data, int64_t words, uint64_t first, uint64_t *plain, uint64_t *weighted);
    void (*decode)(DecodeTile *tiles, int count, int tokens, const uint32_t *table);
    void (*encode)(EncodeTile *tiles, int count, int tokens, const uint64_t *table);
    // `decode` and `restore` or `join` of whole tiles of bfloat16 in one, or nullptr. rests[i]: the remainder section (mode 3).
    void (*decode_bf16)(DecodeTile *tiles, int count, int tokens, const uint32_t *table, int mode,
                        const float *token_scale, const Channels *channels, const uint8_t *const *rests, uint16_t *const *outs,
                        int64_t stride);
};
extern const Kernels portable;
#if LMC_X86
extern const Kernels avx2, avx512;
#endif

inline const Kernels &kernels() {
#if LMC_X86
    const int level = simd_level();
    if (level == LMC_AVX512) return avx512;
    if (level == LMC_AVX2) return avx2;
#endif
    return portable;
}

// Of each dtype.
constexpr int REMAINDER_BITS[5] = {8, 11, 24, 4, 3}, ITEM_BYTES[5] = {2, 2, 4, 1, 1};
inline int64_t remainder_bytes(int dtype, int tokens) {
    return align16(static_cast<int64_t>(tokens) * (GROUP * (REMAINDER_BITS[dtype] >> 3) + 8 * (REMAINDER_BITS[dtype] & 7)));
}

// Tiles coded side by side.
constexpr int FLIGHT = 4;
inline int flight_of(int tiles_left) { return tiles_left < FLIGHT ? tiles_left : FLIGHT; }

struct alignas(64) Scratch {
    DecodeTile decode[FLIGHT];
    EncodeTile encode[FLIGHT];
    Channels channels[FLIGHT];
    Measure measure;
    float token_scale[MAX_TOKENS], ones[MAX_TOKENS];
    uint16_t words[FLIGHT][GROUP * MAX_TOKENS + GROUP];
    uint8_t rest[FLIGHT][GROUP * MAX_TOKENS * 3 + 16];
    uint32_t stage[FLIGHT][GROUP * MAX_TOKENS];  // a group that is padded or converted
    uint16_t token[MAX_CHANNELS];
};

// fp8 -> bfloat16 bits, [dtype - LMC_E4M3][element], and back.
extern const uint16_t (&fp8_to_bf16)[2][256];
uint8_t bf16_to_fp8(int dtype, uint16_t value);

struct Header {
    uint32_t magic;
    uint8_t version, dtype, level, planes;
    uint16_t layers, tokens;
    uint32_t channels;
    uint16_t tile_tokens;
    uint8_t n_raw, transform;
    uint32_t total;
    uint64_t tables, profile;
    uint32_t aux, reserved[3];
    uint64_t check;
};
static_assert(sizeof(Header) == 64, "the header is 64 bytes");
struct RowHeader {
    uint64_t check;
    uint16_t row;
    uint8_t mode, code;
    int16_t base;
    uint16_t reserved;
};
static_assert(sizeof(RowHeader) == 16, "a row's header is 16 bytes");
constexpr uint32_t MAGIC = 0x564b434c;
constexpr uint64_t WEIGHT = 0x9e3779b97f4a7c15;

// 2^power for -126 <= power <= 127.
inline float power_of_two(int power) {
    const uint32_t bits = static_cast<uint32_t>(power + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}
float step_of(int code, int base);
float inverse_of(int code, int base);

// Where a coded row's sections lie, as offsets from its first byte.
struct Sections {
    int coded, spans, groups;
    int64_t side, record, ends, tiles;
    Sections(const lmc_codec &codec, int n_raw, int tile_tokens, int mode);
};
inline int64_t row_bytes(const lmc_codec &codec) {
    return static_cast<int64_t>(codec.tokens) * codec.channels * ITEM_BYTES[codec.dtype];
}
inline int64_t rows_at(const lmc_codec &codec) { return 64 + align16(4LL * codec.layers * codec.planes); }
uint64_t check_of(const Kernels &kernel, const uint8_t *first, int64_t first_bytes, const uint8_t *second, int64_t second_bytes);
// Anchors, scales and tables of one group of a row, from the row's own sections. False: no such table.
bool read_channels(const uint8_t *row, const Sections &at, int mode, int group, float scale, Channels *out);

// Default rounding and denormals on this thread while it lives, whatever a caller has set.
class PlainFloats {
public:
#if LMC_X86
    PlainFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~PlainFloats() { _mm_setcsr(saved_); }

private:
    unsigned saved_;
#endif
};

}  // namespace lmc::codec
