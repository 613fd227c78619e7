// The encoder's arithmetic (docs/codec.md, "Encoder"), for the kernels and for tests without a GPU.
#pragma once

#include "codec.h"

#if !defined(__CUDA_ARCH__)
#include <math.h>
#endif

namespace lmc_cuda {

constexpr int32_t NO_EXPONENT = -1000, NOT_FINITE = 1000;

LMC_HD int32_t exponent_of(float x) {
    const int32_t field = bits_of(x) >> 23 & 255;
    return field == 0 ? NO_EXPONENT : field == 255 ? NOT_FINITE : field - 127;
}

LMC_HD int32_t rint_of(float x) {
#if defined(__CUDA_ARCH__)
    return __float2int_rn(x);
#else
    return static_cast<int32_t>(lrintf(x));
#endif
}

LMC_HD float power_of_two(int32_t k) { return float_of(static_cast<uint32_t>(k + 127) << 23); }

// x in units of 2^(exponent - 13). Exponents below -100 are those of tokens that are coded as zeros.
LMC_HD int32_t fixed_of(float x, int32_t exponent) {
    return rint_of(x * power_of_two(13 - (exponent < -100 ? -100 : exponent)));
}

// 32 log2 v, rounded down.
LMC_HD int32_t lg(uint64_t v) {
    constexpr uint32_t LOG[31] = {
        0x82cd8699u, 0x85aac368u, 0x88980e81u, 0x8b95c1e4u, 0x8ea4398cu, 0x91c3d374u, 0x94f4efa9u, 0x9837f052u,
        0x9b8d39bau, 0x9ef53261u, 0xa2704304u, 0xa5fed6aau, 0xa9a15ab5u, 0xad583eebu, 0xb123f582u, 0xb504f334u,
        0xb8fbaf48u, 0xbd08a3a0u, 0xc12c4ccbu, 0xc5672a12u, 0xc9b9bd87u, 0xce248c16u, 0xd2a81d92u, 0xd744fccbu,
        0xdbfbb798u, 0xe0ccdeedu, 0xe5b906e8u, 0xeac0c6e8u, 0xefe4b99cu, 0xf5257d16u, 0xfa83b2dcu};
#if defined(__CUDA_ARCH__)
    const int32_t power = 63 - __clzll(static_cast<long long>(v));
#else
    const int32_t power = v ? 63 - __builtin_clzll(v) : -1;
#endif
    const auto u = static_cast<uint32_t>(power <= 31 ? v << (31 - power) : v >> (power - 31));
    int32_t above = 0;
    LMC_UNROLL
    for (int32_t k = 0; k < 31; ++k) above += u >= LOG[k];
    return 32 * power + above;
}

LMC_HD int32_t step_code(int32_t ratio, int32_t offset, int32_t exponent, int32_t base) {
    const int32_t rms = (ratio + 2) >> 2;
    const int32_t code = ((rms + offset + 16 * (exponent - 13) + 1) >> 1) - 8 * base;
    return code < 0 ? 0 : code > 255 ? 255 : code;
}

// E of a row whose elements' largest exponent this is; false if the row must stay raw.
LMC_HD bool row_exponent(int32_t largest, int32_t dtype, int32_t &exponent) {
    const int32_t most = dtype == D_FP16 || dtype == D_E5M2 ? 13 : dtype == D_E4M3 ? 7 : 60;
    exponent = largest == NO_EXPONENT ? 0 : largest;
    return exponent >= -60 && exponent <= most;
}

LMC_HD int32_t anchored_code(uint64_t total, uint32_t n, const Shape &shape, int32_t offset, int32_t exponent) {
    if (!total) return 0;
    return step_code(lg(total) - lg(uint64_t{n} * n * shape.channels), offset, exponent, exponent - 28);
}

LMC_HD int32_t token_code(uint64_t sum, int32_t token_exponent, const Shape &shape, int32_t offset, int32_t base) {
    if (token_exponent < base + 28 - 40) return 0;
    return step_code(lg(sum) - lg(shape.channels), offset, token_exponent, base);
}

// What is known of a channel of n tokens before it is coded.
struct Sums {
    int64_t q1, q2, energy;                     // energy: of the differences between neighbours
    int32_t low, high, widest, first, before;  // widest: largest difference
};

LMC_HD Sums no_sums() { return {0, 0, 0, INT32_MAX, INT32_MIN, 0, 0, 0}; }

LMC_HD void add(Sums &sums, int32_t q, bool first) {
    const int32_t step = first ? 0 : q - sums.before, size = step < 0 ? -step : step;
    sums.q1 += q;
    sums.q2 += static_cast<int64_t>(q) * q;
    sums.energy += static_cast<int64_t>(step) * step;
    sums.low = q < sums.low ? q : sums.low;
    sums.high = q > sums.high ? q : sums.high;
    sums.widest = size > sums.widest ? size : sums.widest;
    sums.first = first ? q : sums.first;
    sums.before = q;
}

// A channel as it will be coded: `anchor` is the largest exponent field where the row is EXACT.
struct Channel {
    int16_t anchor;
    uint8_t record, raw;
};

LMC_HD int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// `several`: the row has more than one range of tokens.
LMC_HD Channel quantised_channel(const Models &models, const Sums &sums, uint32_t n, bool anchored, bool several,
                                 int32_t most) {
    if (sums.low < -most || sums.high > most) return {0, 0, 1};
    const int64_t twice = 2 * sums.q1 + n, whole = 2 * static_cast<int64_t>(n);
    const auto a = static_cast<int32_t>(!anchored ? 0 : twice >= 0 ? twice / whole : -((whole - 1 - twice) / whole));
    const int32_t reach = larger(sums.high - a, a - sums.low);
    if (reach > 125 << 3) return {0, 0, 1};
    const int32_t shift = reach <= 127 ? 0 : 1 + (reach > 250) + (reach > 500);
    const int64_t square = static_cast<int64_t>(n) * n, energy = n * sums.energy;
    int64_t moment = n * sums.q2 - (anchored ? sums.q1 * sums.q1 : 0);
    int32_t needed = shift ? (reach >> shift) + 2 : reach;
    uint32_t gain = 0;
    if (anchored && !shift) {
        const int32_t first = several ? reach : larger(sums.first - a, a - sums.first);
        const int64_t moments[2] = {(2 * moment + 4 * energy + square) >> 3, energy};
        const int32_t needs[2] = {larger(first, (reach + sums.widest + 1) >> 1), larger(first, sums.widest)};
        LMC_UNROLL
        for (int g = 0; g < 2; ++g) {
            if (needs[g] > 127 || moments[g] >= moment) continue;
            moment = moments[g];
            needed = needs[g];
            gain = g + 1;
        }
    }
    int32_t model = 0;
    for (int32_t k = 0; k < LOSSY - 1; ++k) model += moment << 8 > (models.variance[k] * square) << 2 * shift;
    while (models.support[model] < needed) ++model;
    const int32_t anchor = shift ? (a + (1 << (shift - 1))) >> shift : a;
    return {static_cast<int16_t>(anchor), static_cast<uint8_t>(record_of(model, gain, shift)), 0};
}

LMC_HD Channel exact_channel(const Models &models, uint32_t top, uint32_t lowest, uint64_t fields, uint32_t n) {
    const uint64_t sum = uint64_t{top} * n - fields;
    int32_t model = 0;
    for (int32_t k = 0; k < LOSSLESS - 2; ++k) model += 16 * sum > uint64_t{models.mean[k]} * n;
    if (models.support[LOSSY + model] <= top - lowest) model = LOSSLESS - 1;
    return {static_cast<int16_t>(top), static_cast<uint8_t>(model), 0};
}

LMC_HD uint32_t field_of(const Shape &shape, uint32_t bits) {
    const uint32_t mantissa = shape.mantissa();
    return bits >> mantissa & ((1u << (shape.sign_at() - mantissa)) - 1);
}

LMC_HD uint32_t remainder_of(const Shape &shape, uint32_t bits) {
    const uint32_t mantissa = shape.mantissa();
    return bits >> shape.sign_at() << mantissa | (bits & ((1u << mantissa) - 1));
}

// Where the reciprocals of a channel's model are, and what makes a symbol's number of a quantised value.
struct Model {
    const uint32_t *fc, *multiplier;
    int32_t less;     // S; of EXACT rows nothing
    int32_t anchor;   // of EXACT rows, the largest exponent field
    int32_t gain;
    uint32_t narrow;  // shift << 23, taken off the inverse step
};

// `fc` and `multiplier` are those of `models`, in fast memory perhaps.
LMC_HD Model model_of(const Models &models, const uint32_t *fc, const uint32_t *multiplier, const Channel &channel,
                      bool exact) {
    const uint32_t model = record_model(channel.record) + (exact ? LOSSY : 0), first = models.first[model];
    return {fc + first,     multiplier + first,          exact ? 0 : models.support[model],
            channel.anchor, record_gain(channel.record), record_shift(channel.record) << 23};
}

LMC_HD int32_t residual_of(const Model &model, float x, uint32_t inverse) {
    return rint_of(x * float_of(inverse - model.narrow)) - model.anchor;
}

// Number of the symbol of r in its model, `before` the one before it in its tile.
LMC_HD uint32_t symbol_of(const Model &model, int32_t r, int32_t before) {
    return static_cast<uint32_t>(r - share(model.gain, before) + model.less);
}

LMC_HD bool must_emit(const Model &model, uint32_t symbol, uint32_t x) { return x >= (model.fc[symbol] & 0xfff) << 20; }

LMC_HD uint32_t put_symbol(const Model &model, uint32_t symbol, uint32_t x) {
    const uint32_t f = model.fc[symbol], freq = f & 0xfff;
    const uint32_t quotient = divide(x, {freq, model.multiplier[symbol], f >> 12 & 15});
    return (quotient << 11) + (x - quotient * freq) + (f >> 16);
}

// The remainder of channel c of token t into a section of zeros.
LMC_HD void put_remainder(uint8_t *section, uint32_t mantissa, uint32_t m, uint32_t t, uint32_t c, uint32_t rest) {
    const uint32_t width = mantissa + 1;
    for (uint32_t k = 0; k < width >> 3; ++k, section += m * GROUP) section[t * GROUP + c] = static_cast<uint8_t>(rest >> 8 * k);
    for (uint32_t k = width & ~7u; k < width; ++k, section += m * 8) {
        section[t * 8 + c / 8] |= static_cast<uint8_t>((rest >> k & 1) << c % 8);
    }
}

constexpr uint32_t VOTED = 4;

// Which of the first tokens are sinks, says a row of plane 1: bit i for token i, from what is known of all its tokens.
LMC_HD uint32_t sink_votes(const int32_t *exponents, const uint64_t *sums, const Shape &shape) {
    int32_t largest = NO_EXPONENT, exponent, others = 0;
    for (uint32_t t = 0; t < shape.tokens; ++t) largest = larger(largest, exponents[t]);
    const bool known = row_exponent(largest, shape.dtype, exponent);
    const int32_t base = exponent - 28;
    for (uint32_t t = 8; t < 24 && known; ++t) others += token_code(sums[t], exponents[t], shape, 0, base);
    uint32_t votes = 0;
    for (uint32_t t = 0; t < VOTED; ++t) {
        const bool sink = exponents[t] == NO_EXPONENT ||
                          (known && 16 * token_code(sums[t], exponents[t], shape, 0, base) + 16 * 8 <= others);
        votes |= static_cast<uint32_t>(sink) << t;
    }
    return votes;
}

// Sections of a coded row: bytes before its first tile.
LMC_HD uint32_t row_sections(const Shape &shape, uint32_t mode, uint32_t n_raw, uint32_t tiles, uint32_t (&at)[4]) {
    const uint32_t width = shape.groups() * GROUP;
    at[0] = 16;
    at[1] = at[0] + align16(n_raw * shape.channels * shape.item());
    at[2] = at[1] + align16(mode == ANCHORED ? 2 * width : mode == PER_TOKEN ? shape.tokens - n_raw : width);
    at[3] = at[2] + align16(width);
    return at[3] + align16(4 * tiles);
}

}  // namespace lmc_cuda
