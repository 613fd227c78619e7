// The codec's arithmetic (docs/codec.md), for the kernels and for tests without a GPU. What a warp does together is
// cut into steps of one lane each; the kernel and the tests walk through them in the same order.
#pragma once

#include "transform.h"

namespace lmc_cuda {

// -- static models --

constexpr int32_t NUMBERS[] = {
#include "../../lmcache_serde/cachegen/tables.inc"
};
constexpr int32_t LOSSY = NUMBERS[0], LOSSLESS = NUMBERS[1], MODELS = LOSSY + LOSSLESS;
constexpr uint32_t SLOTS = 2048;

// Numbers of a model's symbols, and where its frequencies begin.
constexpr int32_t symbols_of(int32_t model, int32_t at) { return model < LOSSY ? 2 * NUMBERS[at] + 1 : NUMBERS[at]; }
constexpr int32_t numbers_of(int32_t model, int32_t at) { return NUMBERS[at] + (model < LOSSY ? 2 : 1); }

constexpr int32_t all_symbols() {
    int32_t at = 2, total = 0;
    for (int32_t m = 0; m < MODELS; ++m) {
        total += symbols_of(m, at);
        at += numbers_of(m, at);
    }
    return total;
}
constexpr int32_t SYMBOLS = all_symbols();

// Lossy models first, then lossless ones. A coded symbol is numbered from 0 in its model: lossy ones are shifted by S.
struct Models {
    uint32_t fc[SYMBOLS];         // freq | shift of its reciprocal << 12 | cumulative frequency << 16
    uint32_t multiplier[SYMBOLS];  // of a division by freq, as in numbers.h
    uint16_t first[MODELS + 1];
    uint16_t support[MODELS];  // S, or N
    uint32_t variance[LOSSY - 1], mean[LOSSLESS - 2];
};

constexpr Models make_models() {
    Models out{};
    int32_t at = 2, symbol = 0;
    for (int32_t m = 0; m < MODELS; ++m) {
        const int32_t support = NUMBERS[at], count = symbols_of(m, at);
        out.first[m] = static_cast<uint16_t>(symbol);
        out.support[m] = static_cast<uint16_t>(support);
        uint32_t cumulative = 0;
        for (int32_t s = 0; s < count; ++s, ++symbol) {
            const int32_t offset = m < LOSSY ? (s < support ? support - s : s - support) : s;
            const auto freq = static_cast<uint32_t>(NUMBERS[at + 1 + offset]);
            uint32_t shift = 0;
            while ((1u << shift) < freq) ++shift;
            out.fc[symbol] = freq | shift << 12 | cumulative << 16;
            out.multiplier[symbol] = static_cast<uint32_t>((((uint64_t{1} << shift) - freq) << 32) / freq + 1);
            cumulative += freq;
        }
        at += numbers_of(m, at);
    }
    out.first[MODELS] = static_cast<uint16_t>(symbol);
    for (int32_t i = 0; i < LOSSY - 1; ++i) out.variance[i] = static_cast<uint32_t>(NUMBERS[at++]);
    for (int32_t i = 0; i < LOSSLESS - 2; ++i) out.mean[i] = static_cast<uint32_t>(NUMBERS[at++]);
    return out;
}

// -- shapes, headers --

enum Mode { RAW = 0, ANCHORED = 1, PER_TOKEN = 2, EXACT = 3 };
enum Dtype { D_BF16 = 0, D_FP16 = 1, D_FP32 = 2, D_E4M3 = 3, D_E5M2 = 4 };
constexpr uint32_t MAGIC = 0x564b434c, MAX_TOKENS = 1024, MAX_RAW = 16, GROUP = 64, LANES = 32;
constexpr uint64_t WEIGHT = 0x9e3779b97f4a7c15ull;
constexpr int32_t LEAST_BASE = -88, MOST_BASE = 32;
constexpr uint32_t AUX = 16;

LMC_HD uint32_t align16(uint32_t n) { return (n + 15) & ~15u; }

struct Shape {
    int32_t dtype;
    uint32_t layers, planes, tokens, channels;
    uint32_t aux = 0;  // bytes of the auxiliary section
    LMC_HD uint32_t item() const { return dtype <= D_FP16 ? 2 : dtype == D_FP32 ? 4 : 1; }
    LMC_HD uint32_t mantissa() const {
        return dtype == D_BF16 ? 7 : dtype == D_FP16 ? 10 : dtype == D_FP32 ? 23 : dtype == D_E4M3 ? 3 : 2;
    }
    LMC_HD uint32_t sign_at() const { return 8 * item() - 1; }
    LMC_HD uint32_t rows() const { return layers * planes; }
    LMC_HD uint32_t groups() const { return (channels + GROUP - 1) / GROUP; }
    LMC_HD uint32_t row_bytes() const { return tokens * channels * item(); }
    LMC_HD uint32_t table_end() const { return 64 + align16(4 * rows()); }
    LMC_HD uint32_t rows_at() const { return table_end() + aux; }
    // Bytes of the remainder section of a lossless tile of `m` tokens.
    LMC_HD uint32_t remainder_bytes(uint32_t m) const {
        const uint32_t width = mantissa() + 1;
        return align16(m * (GROUP * (width >> 3) + 8 * (width & 7)));
    }
};

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
static_assert(sizeof(Header) == 64, "as in docs/codec.md");

struct RowHeader {
    uint64_t check;
    uint16_t row;
    uint8_t mode, code;
    int16_t base;
    uint16_t reserved;
};
static_assert(sizeof(RowHeader) == 16, "as in docs/codec.md");

// `profile`: number of the profile there is, or 0; whether this blob is of it decides `shape.aux`.
LMC_HD bool header_fits(const Header &h, Shape &shape, uint64_t tables, uint64_t profile, uint64_t length) {
    shape.aux = profile && h.transform == 1 ? AUX : 0;
    return length >= shape.rows_at() && h.magic == MAGIC && h.version == 1 && h.dtype == shape.dtype && h.planes == shape.planes &&
           h.layers == shape.layers && h.tokens == shape.tokens && h.channels == shape.channels &&
           h.transform == (shape.aux != 0) && h.total == length && h.tables == tables &&
           h.profile == (shape.aux ? profile : 0) && h.aux == shape.aux && !h.reserved[0] && !h.reserved[1] &&
           !h.reserved[2] && h.tile_tokens >= 1 && h.tile_tokens <= MAX_TOKENS && h.n_raw <= MAX_RAW &&
           h.n_raw <= shape.tokens;
}

LMC_HD Header header_of(const Shape &shape, uint32_t level, uint32_t tile_tokens, uint32_t n_raw, uint32_t total,
                        uint64_t tables, uint64_t profile) {
    return {MAGIC, 1, static_cast<uint8_t>(shape.dtype), static_cast<uint8_t>(level), static_cast<uint8_t>(shape.planes),
            static_cast<uint16_t>(shape.layers), static_cast<uint16_t>(shape.tokens), shape.channels,
            static_cast<uint16_t>(tile_tokens), static_cast<uint8_t>(n_raw), static_cast<uint8_t>(shape.aux != 0), total,
            tables, profile, shape.aux, {0, 0, 0}, 0};
}

// Where a row begins and ends in a blob of `total` bytes; false where the row table cannot be.
LMC_HD bool row_span(const uint32_t *ends, const Shape &shape, uint32_t number, uint32_t total, uint32_t &start,
                     uint32_t &end) {
    start = number ? ends[number - 1] : shape.rows_at();
    end = ends[number];
    for (uint32_t i = shape.rows(); 4 * i < shape.table_end() - 64; ++i) {
        if (ends[i]) return false;
    }
    return start >= shape.rows_at() && start % 16 == 0 && end % 16 == 0 && start < end && end <= total &&
           ends[shape.rows() - 1] == total;
}

// A row that was found valid: its sections as offsets in the blob.
struct Row {
    uint32_t mode, end;  // end 0: not valid, leave it alone
    int32_t code, base;
    uint32_t n_raw, coded, tile_tokens, tile_count;
    uint32_t raw, side, record, table, tiles;  // of the raw tokens, ..., of the tile_end table, of the first tile
    uint32_t turned;                            // its symbols are of components
    uint64_t start;                             // position of the chunk's first token
};

// The position in the auxiliary section, if there is one; false where it cannot be.
LMC_HD bool start_of(const uint8_t *blob, const Shape &shape, uint64_t &start) {
    uint64_t words[2] = {};
    if (shape.aux) memcpy(words, blob + shape.table_end(), sizeof words);
    start = words[0];
    return start <= MOST_START && !words[1];
}

LMC_HD bool zero_between(const uint8_t *blob, uint32_t from, uint32_t to) {
    uint32_t any = 0;
    for (uint32_t i = from; i < to; ++i) any |= blob[i];
    return any == 0;
}

// Reads the head of the row at blob[start..end); its check is somebody else's business.
LMC_HD bool open_row(const uint8_t *blob, const Shape &shape, const Header &h, uint32_t number, uint32_t start,
                     uint32_t end, Row &row) {
    RowHeader head;
    memcpy(&head, blob + start, sizeof head);
    row = {head.mode, end, head.code, head.base, h.n_raw, shape.tokens - h.n_raw, h.tile_tokens, 0, start + 16, 0, 0, 0, 0, 0, 0};
    const bool quantised = head.mode == ANCHORED || head.mode == PER_TOKEN;
    row.turned = quantised && shape.aux;
    if (!start_of(blob, shape, row.start)) return false;
    if (head.row != number || head.mode > EXACT || head.reserved || (head.code && head.mode != ANCHORED) ||
        (head.base && !quantised) || head.base < LEAST_BASE || head.base > MOST_BASE) {
        return false;
    }
    if (head.mode == RAW) {
        const uint64_t whole = uint64_t{row.raw} + shape.row_bytes();
        return whole <= end && align16(static_cast<uint32_t>(whole)) == end &&
               zero_between(blob, static_cast<uint32_t>(whole), end);
    }
    if (!row.coded) return false;
    const uint32_t width = shape.groups() * GROUP;
    const uint32_t ranges = (row.coded + row.tile_tokens - 1) / row.tile_tokens;
    row.tile_count = ranges * shape.groups();
    const uint32_t sizes[4] = {row.n_raw * shape.channels * shape.item(),
                               head.mode == ANCHORED ? 2 * width : head.mode == PER_TOKEN ? row.coded : width, width,
                               4 * row.tile_count};
    uint32_t at[4], next = row.raw;
    for (int i = 0; i < 4; ++i) {
        at[i] = next;
        if (sizes[i] > end - next || align16(sizes[i]) > end - next) return false;
        next += align16(sizes[i]);
        if (!zero_between(blob, at[i] + sizes[i], next)) return false;
    }
    row.side = at[1];
    row.record = at[2];
    row.table = at[3];
    row.tiles = next;
    return true;
}

// Where a tile begins and ends in the blob.
LMC_HD bool tile_span(const Row &row, const uint32_t *ends, uint32_t tile, uint32_t &start, uint32_t &end) {
    const uint32_t origin = row.raw - 16;
    start = tile ? origin + ends[tile - 1] : row.tiles;
    end = origin + ends[tile];
    // What is added to the origin may wrap around: then it is not between the first tile and the end.
    return start >= row.tiles && start <= row.end && end <= row.end && start + 128 <= end && start % 16 == 0 &&
           end % 16 == 0 && (tile + 1 < row.tile_count || end == row.end);
}

// -- elements --

// fp32 to `mantissa` bits and an exponent of bias `bias`, nearest even, never above `most`.
LMC_HD uint32_t store_small(float value, uint32_t mantissa, uint32_t bias, uint32_t most) {
    const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu, drop = 23 - mantissa;
    uint32_t code;
    if (magnitude >> 23 < 128 - bias) {  // a denormal: units in the last places of a number this large
        const uint32_t unit = (128 - bias + drop) << 23;
        code = bits_of(float_of(magnitude) + float_of(unit)) - unit;
    } else {
        code = (magnitude + (1u << (drop - 1)) - 1 + (magnitude >> drop & 1u)) >> drop;
        code -= (127 - bias) << mantissa;
    }
    return (code < most ? code : most) | bits >> 31 << 7;
}

LMC_HD float load_element(uint32_t bits, int32_t dtype) {
    if (dtype == D_BF16) return Bf16::load(bits);
    if (dtype == D_FP16) return Fp16::load(bits);
    if (dtype == D_FP32) return float_of(bits);
    if (dtype == D_E5M2) return Fp16::load(bits << 8);
    if ((bits & 0x7f) == 0x7f) return float_of(0x7fc00000u);
    return float_of(bits_of(float_of((bits & 0x7f) << 20) * float_of(0x7b800000u)) | (bits & 0x80) << 24);
}

LMC_HD uint32_t store_element(float value, int32_t dtype) {
    if (dtype == D_BF16) return Bf16::store(value);
    if (dtype == D_FP16) return Fp16::store(value);
    if (dtype == D_FP32) return bits_of(value);
    const float rounded = Bf16::load(Bf16::store(value));
    return dtype == D_E4M3 ? store_small(rounded, 3, 7, 0x7e) : store_small(rounded, 2, 15, 0x7b);
}

LMC_HD uint32_t element_at(const uint8_t *at, uint32_t item) {
    if (item == 2) return *reinterpret_cast<const uint16_t *>(at);
    return item == 4 ? *reinterpret_cast<const uint32_t *>(at) : *at;
}

LMC_HD void put_element(uint8_t *at, uint32_t item, uint32_t bits) {
    if (item == 2) {
        *reinterpret_cast<uint16_t *>(at) = static_cast<uint16_t>(bits);
    } else if (item == 4) {
        *reinterpret_cast<uint32_t *>(at) = bits;
    } else {
        *at = static_cast<uint8_t>(bits);
    }
}

// -- steps of the quantiser --

// 2^(k/8) and 2^(-k/8), as bits; times a power of two by adding to the exponent field.
LMC_HD uint32_t step_bits(uint32_t k) {
    static constexpr uint32_t bits[8] = {0x3f800000, 0x3f8b95c2, 0x3f9837f0, 0x3fa5fed7, 0x3fb504f3, 0x3fc5672a, 0x3fd744fd, 0x3feac0c7};
    return bits[k];
}
LMC_HD uint32_t inverse_bits(uint32_t k) {
    static constexpr uint32_t bits[8] = {0x3f800000, 0x3f6ac0c7, 0x3f5744fd, 0x3f45672a, 0x3f3504f3, 0x3f25fed7, 0x3f1837f0, 0x3f0b95c2};
    return bits[k];
}
LMC_HD uint32_t step_of(int32_t code, int32_t base) {
    return step_bits(code & 7) + (static_cast<uint32_t>((code >> 3) + base) << 23);
}
LMC_HD uint32_t inverse_of(int32_t code, int32_t base) {
    return inverse_bits(code & 7) - (static_cast<uint32_t>((code >> 3) + base) << 23);
}

// -- one lane of a tile: channels 2 l and 2 l + 1 of the group --

struct Lane {
    uint32_t x;
    uint32_t lut[2], fc[2];  // where those of the channel's model begin
    int32_t less[2];         // what makes a symbol of its number
    int32_t anchor[2];       // of EXACT, the largest exponent field
    int32_t gain[2], before[2];
    uint32_t widen[2];  // shift << 23
};

// A channel's record: number of its model, gain, shift.
LMC_HD uint32_t record_model(uint32_t record) { return record & 31; }
LMC_HD int32_t record_gain(uint32_t record) { return record >> 5 < 3 ? record >> 5 : 0; }
LMC_HD uint32_t record_shift(uint32_t record) { return record >> 5 > 2 ? (record >> 5) - 2 : 0; }
LMC_HD uint32_t record_of(uint32_t model, uint32_t gain, uint32_t shift) {
    return model | (shift ? shift + 2 : gain) << 5;
}

// The lossy models, or the lossless ones.
struct Coder {
    const uint8_t *luts;  // [model][SLOTS]: symbol of each slot
    const uint32_t *fc;
    const Models *models;
};

LMC_HD bool open_lane(const Coder &coder, const uint8_t *blob, const Row &row, uint32_t channel, Lane &lane) {
    const uint32_t most = row.mode == EXACT ? LOSSLESS : LOSSY;
    bool known = true;
    for (uint32_t k = 0; k < 2; ++k) {
        const uint32_t record = blob[row.record + channel + k];
        uint32_t model = record_model(record);
        const uint32_t kind = record >> 5;
        known = known && model < most && kind < 6 && (row.mode == ANCHORED || kind == 0 || (kind > 2 && row.mode != EXACT));
        if (model >= most) model = 0;
        lane.gain[k] = record_gain(record);
        lane.before[k] = 0;
        lane.widen[k] = record_shift(record) << 23;
        lane.lut[k] = model * SLOTS;
        const uint32_t origin = row.mode == EXACT ? LOSSY : 0;
        lane.fc[k] = coder.models->first[origin + model] - coder.models->first[origin];
        lane.less[k] = row.mode == EXACT ? 0 : coder.models->support[model];
        lane.anchor[k] = row.mode == EXACT      ? blob[row.side + channel + k]
                         : row.mode == ANCHORED ? reinterpret_cast<const int16_t *>(blob + row.side)[channel + k]
                                                : 0;
    }
    return known;
}

LMC_HD bool state_fits(uint32_t x) { return x >= 1u << 15 && x < 1u << 31; }

LMC_HD uint32_t take_symbol(const Coder &coder, Lane &lane, uint32_t k) {
    const uint32_t slot = lane.x & (SLOTS - 1), symbol = coder.luts[lane.lut[k] + slot];
    const uint32_t f = coder.fc[lane.fc[k] + symbol];
    lane.x = (f & 0xfff) * (lane.x >> 11) + slot - (f >> 16);
    return symbol;
}

// The part of a value that is predicted from the one before it.
LMC_HD int32_t share(int32_t gain, int32_t before) { return (gain * before + 1) >> 1; }

// PREDICTED: in a row that may have gains.
template <bool PREDICTED>
LMC_HD int32_t steps_of(Lane &lane, uint32_t k, uint32_t symbol) {
    int32_t r = static_cast<int32_t>(symbol) - lane.less[k];
    if (PREDICTED) {
        r += share(lane.gain[k], lane.before[k]);
        lane.before[k] = r;
        r += lane.anchor[k];
    }
    return r;
}

template <bool PREDICTED>
LMC_HD float quantised(Lane &lane, uint32_t k, uint32_t symbol, uint32_t step) {
    return static_cast<float>(steps_of<PREDICTED>(lane, k, symbol)) * float_of(step + lane.widen[k]);
}

// A component in steps, modulo 2^16.
LMC_HD uint32_t component(Lane &lane, uint32_t k, uint32_t symbol) {
    return static_cast<uint32_t>(steps_of<true>(lane, k, symbol)) << (lane.widen[k] >> 23) & 0xffff;
}

// The bits below the exponent, sign on top, of channels c and c + 1 of token t.
LMC_HD void remainder_at(const uint8_t *section, uint32_t mantissa, uint32_t m, uint32_t t, uint32_t c,
                         uint32_t (&out)[2]) {
    const uint32_t width = mantissa + 1;
    out[0] = out[1] = 0;
    for (uint32_t k = 0; k < width >> 3; ++k, section += m * GROUP) {
        out[0] |= uint32_t{section[t * GROUP + c]} << 8 * k;
        out[1] |= uint32_t{section[t * GROUP + c + 1]} << 8 * k;
    }
    for (uint32_t k = width & ~7u; k < width; ++k, section += m * 8) {
        const uint32_t bits = section[t * 8 + c / 8] >> c % 8;
        out[0] |= (bits & 1) << k;
        out[1] |= (bits >> 1 & 1) << k;
    }
}

LMC_HD uint32_t exact(const Shape &shape, const Lane &lane, uint32_t k, uint32_t symbol, uint32_t remainder) {
    const uint32_t mantissa = shape.mantissa(), sign_at = shape.sign_at();
    const uint32_t field = (lane.anchor[k] - symbol) & ((1u << (sign_at - mantissa)) - 1);
    return remainder >> mantissa << sign_at | field << mantissa | (remainder & ((1u << mantissa) - 1));
}

}  // namespace lmc_cuda
