// Chunks -> blobs. The order of work within a row: its scale, then for each channel its range and spread (which give
// anchor, shift and table), then tile after tile values to symbols to words. A row that does not fit the space of its
// raw form, or that cannot be quantised within its bound, is stored raw.
#include "codec.h"
#include "codec_transform.h"

namespace lmc::codec {
namespace {

constexpr int64_t STAY_RAW = -1;
constexpr int NO_EXPONENT = -1000, HIGHEST[5] = {60, 13, 60, 7, 13}, CODE_BELOW = 40;

// ceil(2^(31 + k / 32)), k = 1..31.
constexpr uint32_t LOG[31] = {
    0x82cd8699, 0x85aac368, 0x88980e81, 0x8b95c1e4, 0x8ea4398c, 0x91c3d374, 0x94f4efa9, 0x9837f052,
    0x9b8d39ba, 0x9ef53261, 0xa2704304, 0xa5fed6aa, 0xa9a15ab5, 0xad583eeb, 0xb123f582, 0xb504f334,
    0xb8fbaf48, 0xbd08a3a0, 0xc12c4ccb, 0xc5672a12, 0xc9b9bd87, 0xce248c16, 0xd2a81d92, 0xd744fccb,
    0xdbfbb798, 0xe0ccdeed, 0xe5b906e8, 0xeac0c6e8, 0xefe4b99c, 0xf5257d16, 0xfa83b2dc};

int lg(uint64_t value) {
    const int power = 63 - __builtin_clzll(value);
    const auto scaled = static_cast<uint32_t>(power <= 31 ? value << (31 - power) : value >> (power - 31));
    int above = 0;
    for (const uint32_t threshold : LOG) above += scaled >= threshold;
    return 32 * power + above;
}

// floor(log2) of a size given as bits, NO_EXPONENT for none, or more than any limit for what is not finite.
int exponent_of(int value_type, uint32_t size) {
    if (value_type == LMC_F16) {
        if (size >= 0x400) return static_cast<int>(size >> 10) - 15 + (size >= 0x7c00 ? 1000 : 0);
        return size ? 31 - __builtin_clz(size) - 24 : NO_EXPONENT;
    }
    const int field = static_cast<int>(size >> (value_type == LMC_BF16 ? 7 : 23));
    return field ? field - 127 : NO_EXPONENT;
}

int step_code(int ratio, int offset, int exponent, int base) {
    const int rms = (ratio + 2) >> 2, code = ((rms + offset + 16 * (exponent - 13) + 1) >> 1) - 8 * base;
    return code < 0 ? 0 : code > 255 ? 255 : code;
}

int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// One row of a chunk.
struct Row {
    const Kernels &kernel;
    const lmc_codec &codec;
    Scratch &scratch;
    const uint8_t *data;
    int value_type;
    bool converted;  // fp8 is quantised as bfloat16
    int most;        // largest number of steps

    Row(const Kernels &kernel_, const lmc_codec &codec_, Scratch &scratch_, const uint8_t *data_, int most_ = 32767)
        : kernel(kernel_), codec(codec_), scratch(scratch_), data(data_),
          value_type(codec_.dtype >= LMC_E4M3 ? LMC_BF16 : codec_.dtype), converted(codec_.dtype >= LMC_E4M3), most(most_) {}

    const uint8_t *token(int t) const {
        return data + static_cast<int64_t>(t) * codec.channels * ITEM_BYTES[codec.dtype];
    }
    const void *values_of_token(int t) const {
        const uint8_t *at = token(t);
        if (!converted) return at;
        for (int c = 0; c < codec.channels; ++c) scratch.token[c] = fp8_to_bf16[codec.dtype - LMC_E4M3][at[c]];
        return scratch.token;
    }
    int exponent_of_token(int t) const {
        return exponent_of(value_type, kernel.values[value_type].peak(values_of_token(t), codec.channels));
    }
    int exponent(int first, int tokens) const {
        if (!converted) {
            return exponent_of(value_type, kernel.values[value_type].peak(token(first), int64_t{tokens} * codec.channels));
        }
        int most = NO_EXPONENT;
        for (int t = first; t < first + tokens; ++t) {
            const int found = exponent_of_token(t);
            most = found > most ? found : most;
        }
        return most;
    }
    int token_code(int t, int offset, int exponent, int base) const {
        const int own = exponent_of_token(t);
        if (own < exponent - CODE_BELOW) return 0;
        const void *values = values_of_token(t);
        const uint64_t sum = kernel.values[value_type].energy(values, codec.channels, power_of_two(13 - own));
        return step_code(lg(sum) - lg(static_cast<uint64_t>(codec.channels)), offset, own, base);
    }
    // 64 channels of `tokens` tokens as the kernels want them, and how far apart the tokens are.
    const void *group(int slot, int number, int first, int tokens, bool convert, int64_t *stride) const {
        const int item = ITEM_BYTES[codec.dtype], left = codec.channels - GROUP * number;
        const uint8_t *from = token(first) + GROUP * number * item;
        *stride = codec.channels;
        if (left >= GROUP && !convert) return from;
        *stride = GROUP;
        const int width = left < GROUP ? left : GROUP;
        auto *stage = reinterpret_cast<uint8_t *>(scratch.stage[slot]);
        const int staged = convert ? 2 : item;
        for (int t = 0; t < tokens; ++t, from += static_cast<int64_t>(codec.channels) * item, stage += GROUP * staged) {
            if (convert) {
                auto *to = reinterpret_cast<uint16_t *>(stage);
                for (int c = 0; c < width; ++c) to[c] = fp8_to_bf16[codec.dtype - LMC_E4M3][from[c]];
            } else {
                memcpy(stage, from, static_cast<size_t>(width) * item);
            }
            memset(stage + width * staged, 0, static_cast<size_t>((GROUP - width) * staged));
        }
        return scratch.stage[slot];
    }
};

// Fills side, record and head. Returns false when the row must stay raw.
bool measure_lossy(const Row &row, const Sections &at, int n_raw, int mode, int offset, uint8_t *out, RowHeader *head) {
    const lmc_codec &codec = row.codec;
    Scratch &scratch = row.scratch;
    const Values &kernel = row.kernel.values[row.value_type];
    const int n = at.coded;
    int exponent = row.exponent(n_raw, n);
    if (exponent == NO_EXPONENT) exponent = 0;
    if (exponent < -60 || exponent > HIGHEST[codec.dtype]) return false;
    const int base = exponent - 28;
    head->base = static_cast<int16_t>(base);
    uint8_t *side = out + at.side, *record = out + at.record;
    int64_t stride;
    if (mode == LMC_ROW_ANCHORED) {
        uint64_t sum = 0;
        for (int g = 0; g < at.groups; ++g) {
            const void *in = row.group(0, g, n_raw, n, row.converted, &stride);
            sum += kernel.spread(in, stride, n, power_of_two(13 - exponent));
        }
        const uint64_t size = static_cast<uint64_t>(n) * static_cast<uint64_t>(n) * static_cast<uint64_t>(codec.channels);
        head->code = static_cast<uint8_t>(sum ? step_code(lg(sum) - lg(size), offset, exponent, base) : 0);
        const float inverse = inverse_of(head->code, base);
        for (int t = 0; t < n; ++t) scratch.token_scale[t] = inverse;
    } else {
        for (int t = 0; t < n; ++t) {
            side[t] = static_cast<uint8_t>(row.token_code(n_raw + t, offset, exponent, base));
            scratch.token_scale[t] = inverse_of(side[t], base);
        }
        memset(side + n, 0, static_cast<size_t>(at.record - at.side - n));
    }
    Measure &found = scratch.measure;
    for (int g = 0; g < at.groups; ++g) {
        const void *in = row.group(0, g, n_raw, n, row.converted, &stride);
        kernel.measure[mode == LMC_ROW_ANCHORED](in, stride, n, scratch.token_scale, &found);
        for (int c = 0; c < GROUP; ++c) {
            const int channel = GROUP * g + c;
            int16_t anchor = 0;
            record[channel] = 0;
            if (channel < codec.channels) {
                if (found.low[c] < -row.most || found.high[c] > row.most) return false;
                int64_t a = 0, moment = n * found.q2[c];
                if (mode == LMC_ROW_ANCHORED) {
                    const int64_t twice = 2 * found.q1[c] + n;
                    a = twice / (2 * n) - (twice % (2 * n) < 0);
                    moment -= found.q1[c] * found.q1[c];
                }
                const int64_t up = found.high[c] - a, down = a - found.low[c], reach = up > down ? up : down;
                int shift = 0;
                if (reach > 127) {
                    for (shift = 1; shift < 4 && reach > 125 << shift; ++shift) {
                    }
                    if (shift == 4) return false;
                }
                const int64_t unit = static_cast<int64_t>(n) * n;
                int64_t needed = shift ? (reach >> shift) + 2 : reach;
                int gain = 0;
                if (mode == LMC_ROW_ANCHORED && !shift) {
                    const int64_t energy = static_cast<int64_t>(n) * found.energy[c], widest = found.widest[c];
                    const int64_t start = found.first[c] > a ? found.first[c] - a : a - found.first[c];
                    const int64_t least = at.spans > 1 ? reach : start;
                    const int64_t moments[2] = {(2 * moment + 4 * energy + unit) >> 3, energy};
                    const int64_t needs[2] = {larger(least, (reach + widest + 1) >> 1), larger(least, widest)};
                    for (int g = 1; g < 3; ++g) {
                        if (needs[g - 1] > 127 || moments[g - 1] >= moment) continue;
                        gain = g;
                        moment = moments[g - 1];
                        needed = needs[g - 1];
                    }
                }
                int table = 0;
                for (const int64_t threshold : models.variance) table += (moment << 8) > (threshold * unit) << 2 * shift;
                while (models.support[table] < needed) ++table;
                anchor = static_cast<int16_t>(shift ? (a + (1 << (shift - 1))) >> shift : a);
                record[channel] = static_cast<uint8_t>(table | (shift ? shift + 2 : gain) << 5);
            }
            if (mode == LMC_ROW_ANCHORED) memcpy(side + 2 * channel, &anchor, 2);
        }
    }
    return true;
}

void measure_lossless(const Row &row, const Sections &at, int n_raw, uint8_t *out) {
    const lmc_codec &codec = row.codec;
    Measure &found = row.scratch.measure;
    int64_t stride;
    for (int g = 0; g < at.groups; ++g) {
        const void *in = row.group(0, g, n_raw, at.coded, false, &stride);
        row.kernel.bits[codec.dtype].scan(in, stride, at.coded, &found);
        for (int c = 0; c < GROUP; ++c) {
            const int channel = GROUP * g + c;
            int table = 0;
            if (channel < codec.channels) {
                const int64_t sum = int64_t{at.coded} * found.high[c] - found.q1[c];
                for (const int64_t threshold : models.mean) table += 16 * sum > threshold * at.coded;
                if (models.length[table] <= found.high[c] - found.low[c]) table = LOSSLESS_TABLES - 1;
            }
            out[at.side + channel] = static_cast<uint8_t>(found.high[c]);
            out[at.record + channel] = static_cast<uint8_t>(table);
        }
    }
}

// A coded row's bytes, or STAY_RAW. `plain`: the row's elements, where `row` is of components. `room` is the size of the
// raw form.
int64_t encode_row(const Row &row, const Row &plain, int n_raw, int mode, int offset, uint8_t *out, int64_t room, RowHeader *head) {
    const lmc_codec &codec = row.codec;
    Scratch &scratch = row.scratch;
    const Sections at(plain.codec, n_raw, codec.tile_tokens, mode);
    if (!at.coded || at.tiles > room) return STAY_RAW;
    const bool lossless = mode == LMC_ROW_LOSSLESS;
    if (lossless) {
        measure_lossless(row, at, n_raw, out);
    } else if (!measure_lossy(row, at, n_raw, mode, offset, out, head)) {
        return STAY_RAW;
    }
    const int64_t raw = plain.token(n_raw) - plain.token(0);
    memcpy(out + 16, plain.data, static_cast<size_t>(raw));
    memset(out + 16 + raw, 0, static_cast<size_t>(at.side - 16 - raw));
    const float scale = mode == LMC_ROW_ANCHORED ? inverse_of(head->code, head->base) : 1.0f;
    const float *token_scale = mode == LMC_ROW_ANCHORED ? scratch.ones : scratch.token_scale;
    const uint64_t *table = lossless ? models.encode_lossless[0] : models.encode[0];
    const bool converted = row.converted && !lossless;

    const int tiles = at.spans * at.groups;
    int64_t end = at.tiles;
    for (int tile = 0, flight; tile < tiles; tile += flight) {
        const int group = tile % at.groups, first = tile / at.groups * codec.tile_tokens;
        flight = flight_of(at.groups - group);
        const int tokens = at.coded - first < codec.tile_tokens ? at.coded - first : codec.tile_tokens;
        const int64_t rest = lossless ? remainder_bytes(codec.dtype, tokens) : 0;
        const uint8_t *in[FLIGHT];
        int64_t stride[FLIGHT];
        uint16_t *words_end[FLIGHT];
        for (int i = 0; i < flight; ++i) {
            in[i] = static_cast<const uint8_t *>(row.group(i, group + i, n_raw + first, tokens, converted, &stride[i]));
            Channels &channels = scratch.channels[i];
            read_channels(out, at, mode, group + i, scale, &channels);
            for (int c = 0; c < GROUP; ++c) {
                channels.entry[c] *= 256;
                channels.scale[c] *= power_of_two(-channels.shift[c]);
            }
            for (uint32_t &x : scratch.encode[i].x) x = LOW;
            words_end[i] = scratch.encode[i].words = scratch.words[i] + GROUP * (tokens + 1);  // kernels write some below
            if (lossless) memset(scratch.rest[i] + rest - 16, 0, 16);
        }
        const int item = converted ? 2 : ITEM_BYTES[codec.dtype];
        for (int t = (tokens - 1) / BLOCK * BLOCK; t >= 0; t -= BLOCK) {
            const int block = tokens - t < BLOCK ? tokens - t : BLOCK;
            for (int i = 0; i < flight; ++i) {
                const uint8_t *from = in[i] + t * stride[i] * item;
                EncodeTile &into = scratch.encode[i];
                if (lossless) {
                    row.kernel.bits[codec.dtype].split(from, stride[i], block, &scratch.channels[i], into.entries,
                                                       scratch.rest[i], t, tokens);
                } else {
                    row.kernel.values[row.value_type].quantise[mode == LMC_ROW_ANCHORED](
                        from, stride[i], block, t == 0, token_scale + first + t, &scratch.channels[i], into.entries);
                }
            }
            row.kernel.encode(scratch.encode, flight, block, table);
        }
        for (int i = 0; i < flight; ++i) {
            const EncodeTile &done = scratch.encode[i];
            const int64_t words = 2 * (words_end[i] - done.words), size = align16(128 + rest + words);
            if (end + size > room) return STAY_RAW;
            uint8_t *to = out + end;
            memcpy(to, done.x, 128);
            memcpy(to + 128, scratch.rest[i], static_cast<size_t>(rest));
            memcpy(to + 128 + rest, done.words, static_cast<size_t>(words));
            memset(to + 128 + rest + words, 0, static_cast<size_t>(size - 128 - rest - words));
            end += size;
            const auto value = static_cast<uint32_t>(end);
            memcpy(out + at.ends + 4 * (tile + i), &value, 4);
        }
    }
    memset(out + at.ends + 4 * tiles, 0, static_cast<size_t>(at.tiles - at.ends - 4 * tiles));
    return end;
}

// How many tokens at the chunk's start are attention sinks, judged by how small their V is (docs/codec.md).
int sink_tokens(const Kernels &kernel, const lmc_codec &codec, const uint8_t *chunk, Scratch &scratch) {
    if (codec.planes != 2 || codec.tokens < 32) return 0;
    int votes[4] = {};
    for (int layer = 0; layer < codec.layers; ++layer) {
        const int number = 2 * layer + 1;
        if (codec.modes[number] != LMC_ROW_PER_TOKEN) continue;
        const Row row(kernel, codec, scratch, chunk + number * row_bytes(codec));
        int exponent = row.exponent(0, codec.tokens);
        if (exponent == NO_EXPONENT) exponent = 0;
        const bool usable = exponent >= -60 && exponent <= HIGHEST[codec.dtype];
        int later = 0;
        for (int t = 8; usable && t < 24; ++t) later += row.token_code(t, 0, exponent, exponent - 28);
        for (int t = 0; t < 4; ++t) {
            votes[t] += row.exponent_of_token(t) == NO_EXPONENT ||
                        (usable && 16 * row.token_code(t, 0, exponent, exponent - 28) + 16 * 8 <= later);
        }
    }
    int sinks = 0;
    for (int t = 0; t < 4; ++t) sinks = 2 * votes[t] >= codec.layers ? t + 1 : sinks;
    return sinks;
}

bool valid(const lmc_codec &codec) {
    if (lmc_codec_bound(&codec) < 0 || codec.n_raw < -1 || codec.n_raw > MAX_RAW || codec.tile_tokens < 1 ||
        codec.tile_tokens > MAX_TOKENS || codec.level < 0 || codec.level > 255) {
        return false;
    }
    for (int row = 0; row < codec.layers * codec.planes; ++row) {
        if (codec.modes[row] > LMC_ROW_LOSSLESS || codec.offsets[row] < -160 || codec.offsets[row] > 32) return false;
    }
    return !codec.profile || profile_fits(codec);
}

// start: the first token's position, or -1 for no transform.
int64_t encode_chunk(const Kernels &kernel, const lmc_codec &codec, const uint8_t *chunk, int64_t start, uint8_t *out,
                     Scratch &scratch, int32_t *raw_rows) {
    const int64_t plain = row_bytes(codec);
    const int rows = codec.layers * codec.planes;
    int n_raw = codec.n_raw < 0 ? sink_tokens(kernel, codec, chunk, scratch) : codec.n_raw;
    if (n_raw > codec.tokens) n_raw = codec.tokens;
    const bool turned = start >= 0;
    const int64_t first = rows_at(codec) + (turned ? LMC_CODEC_AUX : 0);
    int64_t end = first;
    memset(out, 0, static_cast<size_t>(end));
    *raw_rows = 0;
    lmc_codec inner = codec;  // of components
    inner.dtype = LMC_F32;
    const uint8_t *components = nullptr;
    if (turned) {
        memcpy(out + rows_at(codec), &start, sizeof start);
        find_angles(codec, start);
        components = reinterpret_cast<const uint8_t *>(Room(codec).components);
    }
    for (int number = 0; number < rows; ++number) {
        uint8_t *to = out + end;
        const Row row(kernel, codec, scratch, chunk + number * plain);
        RowHeader head{0, static_cast<uint16_t>(number), codec.modes[number], 0, 0, 0};
        int64_t size = STAY_RAW;
        const bool inside = turned && (head.mode == LMC_ROW_ANCHORED || head.mode == LMC_ROW_PER_TOKEN);
        if (head.mode && (!inside || to_components(codec, number, n_raw, codec.tokens - n_raw, row.token(n_raw)))) {
            const Row values = inside ? Row(kernel, inner, scratch, components, MOST_COMPONENT) : row;
            size = encode_row(values, row, n_raw, head.mode, codec.offsets[number], to, 16 + align16(plain), &head);
        }
        if (size == STAY_RAW) {
            *raw_rows += head.mode != LMC_ROW_RAW;
            head = {0, static_cast<uint16_t>(number), LMC_ROW_RAW, 0, 0, 0};
            size = 16 + align16(plain);
            memcpy(to + 16, row.data, static_cast<size_t>(plain));
            memset(to + 16 + plain, 0, static_cast<size_t>(size - 16 - plain));
        }
        memcpy(to, &head, sizeof head);
        head.check = check_of(kernel, to + 8, size - 8, to, 0);
        memcpy(to, &head, sizeof head);
        end += size;
        const auto value = static_cast<uint32_t>(end);
        memcpy(out + 64 + 4 * number, &value, 4);
    }
    Header head{};
    head.magic = MAGIC;
    head.version = 1;
    head.dtype = static_cast<uint8_t>(codec.dtype);
    head.level = static_cast<uint8_t>(codec.level);
    head.planes = static_cast<uint8_t>(codec.planes);
    head.layers = static_cast<uint16_t>(codec.layers);
    head.tokens = static_cast<uint16_t>(codec.tokens);
    head.channels = static_cast<uint32_t>(codec.channels);
    head.tile_tokens = static_cast<uint16_t>(codec.tile_tokens);
    head.n_raw = static_cast<uint8_t>(n_raw);
    head.total = static_cast<uint32_t>(end);
    head.tables = models.id;
    if (turned) {
        head.transform = 1;
        head.profile = codec.profile->number;
        head.aux = LMC_CODEC_AUX;
    }
    memcpy(out, &head, sizeof head);
    head.check = check_of(kernel, out, 56, out + 64, first - 64);
    memcpy(out, &head, sizeof head);
    return end;
}

}  // namespace
}  // namespace lmc::codec

extern "C" int32_t lmc_codec_encode(const lmc_codec *codec, const int64_t *chunks, const int64_t *outs, int64_t count,
                                    void *memory, int64_t *sizes, int32_t *raw_rows) {
    using namespace lmc::codec;
    if (!valid(*codec)) return LMC_CODEC_ARGUMENT;
    const PlainFloats plain;
    const Kernels &kernel = kernels();
    auto &scratch = *reinterpret_cast<Scratch *>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t{63});
    for (float &one : scratch.ones) one = 1.0f;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t start = codec->profile && codec->starts[i] <= MOST_START ? codec->starts[i] : -1;
        sizes[i] = encode_chunk(kernel, *codec, reinterpret_cast<const uint8_t *>(chunks[i]), start,
                                reinterpret_cast<uint8_t *>(outs[i]), scratch, raw_rows + i);
    }
    return 0;
}
