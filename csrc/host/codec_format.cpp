// What encoder and decoder share: models, step sizes, sections, checks.
#include "codec.h"

namespace lmc::codec {
namespace {

constexpr uint32_t WIDE[] = {
#include "../../lmcache_serde/cachegen/tables.inc"
};
constexpr int COUNT = sizeof WIDE / sizeof *WIDE;
static_assert(WIDE[0] == LOSSY_TABLES && WIDE[1] == LOSSLESS_TABLES, "tables.inc has other tables");

// One table, symbols first, first + 1, ...
template <class Frequency>
void fill(int first, int count, const Frequency &frequency, uint32_t *decode, uint64_t *encode) {
    uint32_t cum = 0;
    for (int i = 0; i < count; ++i) {
        const uint32_t freq = frequency(i), symbol = static_cast<uint32_t>(first + i) & 255;
        for (int k = 0; k < static_cast<int>(freq); ++k) {
            // 17 is 1 modulo 8: of 8 numbers near k / 17 one leaves a rest with freq's bits below.
            int high = k / 17 - 4;
            high += (k - static_cast<int>(freq >> 8) - high) & 7;
            const auto low = static_cast<uint32_t>(k - 17 * high) & 255, middle = static_cast<uint32_t>(high) & 255;
            decode[cum + static_cast<uint32_t>(k)] = (freq & 255) | low << 8 | middle << 16 | symbol << 24;
        }
        // x / freq = (x * reciprocal >> 32) >> (shift - 1) for x < 2^31; for freq 1 it is x - 1, and the bias makes up.
        uint32_t shift = 1;
        while (freq > 1u << shift) ++shift;
        const bool one = freq == 1;
        const uint64_t reciprocal = one ? 0xffffffff : ((uint64_t{1} << (31 + shift)) + freq - 1) / freq;
        encode[symbol] = reciprocal | uint64_t{(one ? cum + SLOTS - 1 : cum) | (shift - 1) << 12 | freq << 20} << 32;
        cum += freq;
    }
}

// An 8-bit float's size as bfloat16 bits; the sign is apart.
uint16_t expand(int dtype, int code) {
    const int mantissa_bits = dtype == LMC_E4M3 ? 3 : 2, bias = dtype == LMC_E4M3 ? 7 : 15;
    int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
    if (dtype == LMC_E4M3 ? code == 0x7f : code > 0x7c) return 0x7fc0;
    if (dtype == LMC_E5M2 && code == 0x7c) return 0x7f80;
    if (!exponent) {
        if (!mantissa) return 0;
        for (exponent = 1; !(mantissa >> mantissa_bits); --exponent) mantissa <<= 1;
        mantissa &= (1 << mantissa_bits) - 1;
    }
    return static_cast<uint16_t>((exponent - bias + 127) << 7 | mantissa << (7 - mantissa_bits));
}

struct Tables {
    Models models;
    uint16_t fp8[2][256];
    Tables() {
        memset(&models, 0, sizeof models);
        const uint32_t *p = WIDE + 2;
        for (int i = 0; i < LOSSY_TABLES; ++i) {
            const int support = static_cast<int>(*p++);
            models.support[i] = support;
            const auto frequency = [=](int k) { return p[k < support ? support - k : k - support]; };
            fill(-support, 2 * support + 1, frequency, models.decode[i], models.encode[i]);
            p += support + 1;
        }
        for (int i = 0; i < LOSSLESS_TABLES; ++i) {
            const int length = static_cast<int>(*p++);
            models.length[i] = length;
            const auto frequency = [=](int k) { return p[k]; };
            fill(0, length, frequency, models.decode_lossless[i], models.encode_lossless[i]);
            p += length;
        }
        for (int64_t &threshold : models.variance) threshold = *p++;
        for (int64_t &threshold : models.mean) threshold = *p++;
        uint16_t low[COUNT];
        for (int i = 0; i < COUNT; ++i) low[i] = static_cast<uint16_t>(WIDE[i]);
        models.id = lmc_xxh3_64(low, sizeof low);
        for (int dtype = LMC_E4M3; dtype <= LMC_E5M2; ++dtype) {
            for (int code = 0; code < 256; ++code) {
                fp8[dtype - LMC_E4M3][code] = static_cast<uint16_t>(expand(dtype, code & 127) | (code >> 7) << 15);
            }
        }
    }
};
const Tables tables;

constexpr uint32_t STEP[8] = {0x3f800000, 0x3f8b95c2, 0x3f9837f0, 0x3fa5fed7, 0x3fb504f3, 0x3fc5672a, 0x3fd744fd, 0x3feac0c7};
constexpr uint32_t INVERSE[8] = {0x3f800000, 0x3f6ac0c7, 0x3f5744fd, 0x3f45672a, 0x3f3504f3, 0x3f25fed7, 0x3f1837f0, 0x3f0b95c2};

float scaled(uint32_t bits, int power) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value * power_of_two(power);
}

}  // namespace

const Models &models = tables.models;
const uint16_t (&fp8_to_bf16)[2][256] = tables.fp8;

uint8_t bf16_to_fp8(int dtype, uint16_t value) {
    const uint16_t *grid = fp8_to_bf16[dtype - LMC_E4M3];
    const int largest = dtype == LMC_E4M3 ? 0x7e : 0x7b, size = value & 0x7fff;
    int low = 0, high = largest;
    while (low < high) {  // the first code that is not smaller
        const int middle = (low + high) / 2;
        if (grid[middle] < size) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    if (low && size < grid[largest]) {
        const auto number = [](uint32_t bits) {
            bits <<= 16;
            float out;
            memcpy(&out, &bits, sizeof out);
            return out;
        };
        const float below = number(static_cast<uint32_t>(size)) - number(grid[low - 1]);
        const float above = number(grid[low]) - number(static_cast<uint32_t>(size));
        if (below < above || (below == above && low % 2)) --low;
    }
    return static_cast<uint8_t>(low | (value >> 15) << 7);
}

float step_of(int code, int base) { return scaled(STEP[code & 7], (code >> 3) + base); }
float inverse_of(int code, int base) { return scaled(INVERSE[code & 7], -((code >> 3) + base)); }

Sections::Sections(const lmc_codec &codec, int n_raw, int tile_tokens, int mode) {
    coded = codec.tokens - n_raw;
    spans = (coded + tile_tokens - 1) / tile_tokens;
    groups = (codec.channels + GROUP - 1) / GROUP;
    const int64_t width = int64_t{GROUP} * groups;
    side = 16 + align16(static_cast<int64_t>(n_raw) * codec.channels * ITEM_BYTES[codec.dtype]);
    record = side + (mode == LMC_ROW_ANCHORED ? 2 * width : mode == LMC_ROW_PER_TOKEN ? align16(coded) : width);
    ends = record + width;
    tiles = ends + align16(int64_t{4} * spans * groups);
}

uint64_t check_of(const Kernels &kernel, const uint8_t *first, int64_t first_bytes, const uint8_t *second,
                  int64_t second_bytes) {
    uint64_t plain = 0, weighted = 0;
    kernel.check(first, first_bytes / 4, 0, &plain, &weighted);
    kernel.check(second, second_bytes / 4, static_cast<uint64_t>(first_bytes / 4), &plain, &weighted);
    return plain + weighted * WEIGHT;
}

bool read_channels(const uint8_t *row, const Sections &at, int mode, int group, float scale, Channels *out) {
    const uint8_t *side = row + at.side, *record = row + at.record + GROUP * group;
    const bool lossless = mode == LMC_ROW_LOSSLESS, anchored = mode == LMC_ROW_ANCHORED;
    const int tables_there = lossless ? LOSSLESS_TABLES : LOSSY_TABLES;
    const unsigned kinds_there = lossless ? 0x01 : anchored ? 0x3f : 0x39;
    unsigned wrong = 0;
    int16_t anchors[GROUP] = {};
    if (anchored) memcpy(anchors, side + 2 * GROUP * group, sizeof anchors);
    for (int c = 0; c < GROUP; ++c) {
        const int table = record[c] & 31, kind = record[c] >> 5;
        wrong |= (table >= tables_there) | (~kinds_there >> kind & 1);
        out->top[c] = lossless ? side[GROUP * group + c] : 0;
        out->shift[c] = kind > 2 ? kind - 2 : 0;
        out->round[c] = kind == 1 ? anchors[c] + 1 : kind == 2 ? 0 : 255 * anchors[c] + 128;
        out->halve[c] = kind == 1 ? 1 : kind == 2 ? 0 : 8;
        out->previous[c] = anchors[c];
        out->scale[c] = scale;
        out->entry[c] = table;
    }
    return !wrong;
}

}  // namespace lmc::codec

extern "C" uint64_t lmc_codec_table_set(void) { return lmc::codec::models.id; }

extern "C" int64_t lmc_codec_scratch_bytes(void) { return sizeof(lmc::codec::Scratch) + 64; }

extern "C" int64_t lmc_codec_bound(const lmc_codec *codec) {
    using namespace lmc::codec;
    if (codec->dtype < 0 || codec->dtype > LMC_E5M2 || codec->layers < 1 || codec->layers > MAX_LAYERS || codec->planes < 1 ||
        codec->planes > 2 || codec->tokens < 1 || codec->tokens > MAX_TOKENS || codec->channels < 1 ||
        codec->channels > MAX_CHANNELS) {
        return LMC_CODEC_ARGUMENT;
    }
    const int64_t bound = rows_at(*codec) + codec->layers * codec->planes * (16 + align16(row_bytes(*codec)));
    return bound < int64_t{1} << 32 ? bound : static_cast<int64_t>(LMC_CODEC_ARGUMENT);
}
