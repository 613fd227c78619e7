// Blobs -> chunks. Nothing read from a blob is trusted: every length is checked before use, the number of steps follows
// from the shape alone, and words are read from memory that is long enough for any stream of that many steps.
#include "codec.h"
#include "codec_transform.h"

namespace lmc::codec {
namespace {

struct Blob {
    const lmc_codec &codec;
    const uint8_t *data;
    int64_t length;
    int n_raw, tile_tokens;
    bool turned;
    int64_t first;  // of the rows
};

uint32_t read32(const uint8_t *p) {
    uint32_t value;
    memcpy(&value, p, sizeof value);
    return value;
}

bool zeros(const uint8_t *p, int64_t count) {
    uint8_t any = 0;
    for (int64_t i = 0; i < count; ++i) any |= p[i];
    return !any;
}

int32_t open_blob(const Kernels &kernel, Blob *blob) {
    const lmc_codec &codec = blob->codec;
    const int64_t rows = static_cast<int64_t>(codec.layers) * codec.planes;
    if (blob->length < rows_at(codec) + 16 * rows) return LMC_CODEC_HEADER;
    Header head;
    memcpy(&head, blob->data, sizeof head);
    blob->turned = codec.profile && head.transform == 1;
    blob->first = rows_at(codec) + (blob->turned ? LMC_CODEC_AUX : 0);
    const int64_t first = blob->first;
    if (head.magic != MAGIC || head.version != 1 || head.dtype != codec.dtype || head.planes != codec.planes ||
        head.layers != codec.layers || head.tokens != codec.tokens ||
        head.channels != static_cast<uint32_t>(codec.channels) || head.transform != blob->turned ||
        head.total != blob->length || head.tables != models.id || blob->length < first + 16 * rows ||
        head.profile != (blob->turned ? codec.profile->number : 0) || head.aux != (blob->turned ? LMC_CODEC_AUX : 0)) {
        return LMC_CODEC_HEADER;
    }
    if (head.check != check_of(kernel, blob->data, 56, blob->data + 64, first - 64)) return LMC_CODEC_CHECK;
    if (head.reserved[0] || head.reserved[1] || head.reserved[2] || !head.tile_tokens || head.tile_tokens > MAX_TOKENS ||
        head.n_raw > MAX_RAW || head.n_raw > codec.tokens || !zeros(blob->data + 64 + 4 * rows, rows_at(codec) - 64 - 4 * rows)) {
        return LMC_CODEC_HEADER;
    }
    if (blob->turned) {
        int64_t start;
        memcpy(&start, blob->data + rows_at(codec), sizeof start);
        if (start < 0 || start > MOST_START || !zeros(blob->data + rows_at(codec) + 8, 8)) return LMC_CODEC_HEADER;
        find_angles(codec, start);
    }
    blob->n_raw = head.n_raw;
    blob->tile_tokens = head.tile_tokens;
    int64_t at = first;
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t end = read32(blob->data + 64 + 4 * i);
        if (end < at + 16 || end % 16) return LMC_CODEC_HEADER;
        at = end;
    }
    return at == blob->length ? 0 : LMC_CODEC_HEADER;
}

// A group's elements from where the kernels left them (padded, perhaps bfloat16 for fp8) to the row.
void unstage(const lmc_codec &codec, bool converted, const uint32_t *stage, int tokens, int group, uint8_t *out) {
    const int item = ITEM_BYTES[codec.dtype], first = GROUP * group;
    const int width = codec.channels - first < GROUP ? codec.channels - first : GROUP;
    for (int t = 0; t < tokens; ++t) {
        uint8_t *to = out + (static_cast<int64_t>(t) * codec.channels + first) * item;
        if (converted) {
            const uint16_t *from = reinterpret_cast<const uint16_t *>(stage) + t * GROUP;
            for (int c = 0; c < width; ++c) to[c] = bf16_to_fp8(codec.dtype, from[c]);
        } else {
            memcpy(to, reinterpret_cast<const uint8_t *>(stage) + t * GROUP * item, static_cast<size_t>(width) * item);
        }
    }
}

int32_t decode_row(const Kernels &kernel, const Blob &blob, int number, const uint8_t *row, int64_t length, uint8_t *out,
                   Scratch &scratch) {
    const lmc_codec &codec = blob.codec;
    RowHeader head;
    memcpy(&head, row, sizeof head);
    if (head.check != check_of(kernel, row + 8, length - 8, row, 0)) return LMC_CODEC_CHECK;
    const int mode = head.mode;
    const bool quantised = mode == LMC_ROW_ANCHORED || mode == LMC_ROW_PER_TOKEN;
    if (head.row != number || mode > LMC_ROW_LOSSLESS || head.reserved || (head.code && mode != LMC_ROW_ANCHORED) ||
        (head.base && !quantised) || head.base < -88 || head.base > 32) {
        return LMC_CODEC_ROW;
    }
    const int64_t plain = row_bytes(codec);
    if (mode == LMC_ROW_RAW) {
        if (length != 16 + align16(plain) || !zeros(row + 16 + plain, length - 16 - plain)) return LMC_CODEC_ROW;
        memcpy(out, row + 16, static_cast<size_t>(plain));
        return 0;
    }
    const Sections at(codec, blob.n_raw, blob.tile_tokens, mode);
    const int64_t raw = static_cast<int64_t>(blob.n_raw) * codec.channels * ITEM_BYTES[codec.dtype];
    const int tiles = at.spans * at.groups;
    if (!at.coded || at.tiles > length || !zeros(row + 16 + raw, at.side - 16 - raw) ||
        !zeros(row + at.ends + 4 * tiles, at.tiles - at.ends - 4 * tiles)) {
        return LMC_CODEC_ROW;
    }
    if (mode == LMC_ROW_PER_TOKEN && !zeros(row + at.side + at.coded, at.record - at.side - at.coded)) return LMC_CODEC_ROW;
    memcpy(out, row + 16, static_cast<size_t>(raw));
    out += raw;
    // Components are restored as numbers of steps, in floats.
    const bool turned = blob.turned && quantised, converted = quantised && codec.dtype >= LMC_E4M3;
    const int value_type = converted ? LMC_BF16 : turned ? LMC_F32 : codec.dtype, item = ITEM_BYTES[value_type];
    float steps[MAX_TOKENS];
    for (int t = 0; t < at.coded; ++t) {
        steps[t] = step_of(mode == LMC_ROW_PER_TOKEN ? row[at.side + t] : head.code, quantised ? head.base : 0);
        scratch.token_scale[t] = mode == LMC_ROW_PER_TOKEN && !turned ? steps[t] : 1.0f;
    }
    const float scale = mode == LMC_ROW_ANCHORED && !turned ? steps[0] : 1.0f;
    auto *const components = turned ? reinterpret_cast<uint8_t *>(Room(codec).components) : nullptr;
    const uint32_t *table = mode == LMC_ROW_LOSSLESS ? models.decode_lossless[0] : models.decode[0];

    int64_t begin = at.tiles;
    for (int tile = 0, flight; tile < tiles; tile += flight) {
        // Tiles side by side must be of one length, so they are taken from one span.
        const int span = tile / at.groups, group = tile % at.groups;
        flight = flight_of(at.groups - group);
        const int first = span * blob.tile_tokens;
        const int tokens = at.coded - first < blob.tile_tokens ? at.coded - first : blob.tile_tokens;
        const int64_t rest = mode == LMC_ROW_LOSSLESS ? remainder_bytes(codec.dtype, tokens) : 0;
        const int64_t most = 2LL * GROUP * tokens;  // bytes of words that many steps can use
        const uint8_t *remainder[FLIGHT];
        const uint16_t *words_end[FLIGHT];
        for (int i = 0; i < flight; ++i) {
            const int64_t end = read32(row + at.ends + 4 * (tile + i)), size = end - begin;
            if (end > length || size < 128 + rest || end % 16 || size > 128 + rest + align16(most)) return LMC_CODEC_ROW;
            DecodeTile &into = scratch.decode[i];
            memcpy(into.x, row + begin, 128);
            remainder[i] = row + begin + 128;
            const uint8_t *words = remainder[i] + rest;
            // Where the blob ends too soon for the kernels to read on freely, they read a copy.
            if (blob.data + blob.length - words < most + 128) {
                memcpy(scratch.words[i], words, static_cast<size_t>(row + end - words));
                words_end[i] = scratch.words[i] + (row + end - words) / 2;
                into.words = scratch.words[i];
            } else {
                words_end[i] = reinterpret_cast<const uint16_t *>(row + end);
                into.words = reinterpret_cast<const uint16_t *>(words);
            }
            Channels &channels = scratch.channels[i];
            if (!read_channels(row, at, mode, group + i, scale, &channels)) return LMC_CODEC_ROW;
            for (int c = 0; c < GROUP; ++c) {
                uint32_t *first_slot = c & 1 ? into.odd : into.even;
                first_slot[c / 2] = static_cast<uint32_t>(channels.entry[c]) * SLOTS;
                channels.scale[c] *= power_of_two(channels.shift[c]);
            }
            uint32_t outside = 0;
            for (uint32_t x : into.x) outside |= (x < LOW) | x >> 31;
            if (outside) return LMC_CODEC_TILE;
            begin = end;
        }
        const bool fused = kernel.decode_bf16 && !turned && codec.dtype == LMC_BF16 && GROUP * (group + flight) <= codec.channels;
        if (fused) {
            uint16_t *outs[FLIGHT];
            for (int i = 0; i < flight; ++i) {
                outs[i] = reinterpret_cast<uint16_t *>(out) + int64_t{first} * codec.channels + GROUP * (group + i);
            }
            kernel.decode_bf16(scratch.decode, flight, tokens, table, mode, scratch.token_scale + first, scratch.channels,
                               remainder, outs, codec.channels);
        }
        for (int t = 0; t < tokens && !fused; t += BLOCK) {
            const int block = tokens - t < BLOCK ? tokens - t : BLOCK;
            kernel.decode(scratch.decode, flight, block, table);
            for (int i = 0; i < flight; ++i) {
                const bool staged = !turned && (converted || GROUP * (group + i + 1) > codec.channels);
                const int64_t stride = staged ? GROUP : turned ? int64_t{GROUP} * at.groups : codec.channels;
                const int64_t token = turned ? t : first + t;
                const int64_t skip = staged ? int64_t{t} * GROUP : token * stride + GROUP * (group + i);
                uint8_t *to = (staged ? reinterpret_cast<uint8_t *>(scratch.stage[i]) : turned ? components : out) + skip * item;
                if (quantised) {
                    kernel.values[value_type].restore[mode == LMC_ROW_ANCHORED](scratch.decode[i].symbols, block,
                                                      scratch.token_scale + first + t, &scratch.channels[i], to, stride);
                } else {
                    kernel.bits[codec.dtype].join(scratch.decode[i].symbols, block, &scratch.channels[i], remainder[i], t,
                                                  tokens, to, stride);
                }
            }
        }
        for (int i = 0; i < flight; ++i) {
            const DecodeTile &done = scratch.decode[i];
            uint32_t wrong = 0;
            for (uint32_t x : done.x) wrong |= x ^ LOW;
            const int64_t left = words_end[i] - done.words;
            if (wrong || left < 0 || left >= 8 || !zeros(reinterpret_cast<const uint8_t *>(done.words), 2 * left)) {
                return LMC_CODEC_TILE;
            }
            if (!turned && (converted || GROUP * (group + i + 1) > codec.channels)) {
                unstage(codec, converted, scratch.stage[i], tokens, group + i,
                        out + static_cast<int64_t>(first) * codec.channels * ITEM_BYTES[codec.dtype]);
            }
        }
        if (turned && group + flight == at.groups) {
            from_components(codec, number, blob.n_raw + first, tokens, steps + first,
                            out + static_cast<int64_t>(first) * codec.channels * ITEM_BYTES[codec.dtype]);
        }
    }
    return begin == length ? 0 : LMC_CODEC_ROW;
}

}  // namespace
}  // namespace lmc::codec

extern "C" int32_t lmc_codec_decode(const lmc_codec *codec, const int64_t *blobs, const int64_t *lengths,
                                    const int64_t *outs, int64_t count, int32_t first_layer, int32_t layers, void *memory,
                                    int32_t *status) {
    using namespace lmc::codec;
    if (lmc_codec_bound(codec) < 0 || (codec->profile && !profile_fits(*codec)) || first_layer < 0 || layers < 0 || first_layer > codec->layers - layers) {
        return LMC_CODEC_ARGUMENT;
    }
    const PlainFloats plain;
    const Kernels &kernel = kernels();
    auto &scratch = *reinterpret_cast<Scratch *>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t{63});
    int32_t worst = 0;
    for (int64_t i = 0; i < count; ++i) {
        Blob blob{*codec, reinterpret_cast<const uint8_t *>(blobs[i]), lengths[i], 0, 0, false, 0};
        int32_t result = open_blob(kernel, &blob);
        for (int32_t k = 0; !result && k < layers * codec->planes; ++k) {
            const int64_t number = static_cast<int64_t>(first_layer) * codec->planes + k;
            const int64_t begin = number ? read32(blob.data + 60 + 4 * number) : blob.first;
            const int64_t end = read32(blob.data + 64 + 4 * number);
            result = decode_row(kernel, blob, static_cast<int>(number), blob.data + begin, end - begin,
                                reinterpret_cast<uint8_t *>(outs[i]) + k * row_bytes(*codec), scratch);
        }
        status[i] = result;
        if (!worst) worst = result;
    }
    return worst;
}
