// The codec's kernels as loops: what a warp does is one loop over its lanes per step.
#pragma once

#include <vector>

#include "../csrc/cuda/codec_encode.h"

namespace lmc_cuda {

static constexpr Models MODELS_HERE = make_models();

static const std::vector<uint8_t> &luts() {
    static const std::vector<uint8_t> table = [] {
        std::vector<uint8_t> out(MODELS * SLOTS);
        for (int m = 0; m < MODELS; ++m) {
            for (uint32_t s = MODELS_HERE.first[m]; s < MODELS_HERE.first[m + 1]; ++s) {
                const uint32_t f = MODELS_HERE.fc[s];
                for (uint32_t i = 0; i < (f & 0xfff); ++i) {
                    out[m * SLOTS + (f >> 16) + i] = static_cast<uint8_t>(s - MODELS_HERE.first[m]);
                }
            }
        }
        return out;
    }();
    return table;
}

static Coder coder(bool exact) {
    const uint32_t skip = exact ? LOSSY : 0;
    return {luts().data() + skip * SLOTS, MODELS_HERE.fc + MODELS_HERE.first[skip], &MODELS_HERE};
}

static uint64_t check_of(const uint8_t *data, uint64_t bytes, uint64_t first = 0) {
    uint64_t plain = 0, weighted = 0;
    for (uint64_t i = 0; i < bytes / 4; ++i) {
        uint32_t word;
        memcpy(&word, data + 4 * i, 4);
        plain += word;
        weighted += (first + i + 1) * word;
    }
    return plain + weighted * WEIGHT;
}

// `shape.aux` decides what belongs to it.
static uint64_t header_check(const uint8_t *blob, const Shape &shape) {
    return check_of(blob, 56) + check_of(blob + 64, shape.rows_at() - 64, 14);
}

// The tile's elements; of components, `steps` [token][64 G].
static bool decode_tile(const uint8_t *blob, const Shape &shape, const Row &row, uint32_t range, uint32_t group,
                        uint8_t *out, std::vector<uint16_t> &steps) {
    const uint32_t tile = range * shape.groups() + group, first = range * row.tile_tokens;
    const uint32_t m = row.coded - first < row.tile_tokens ? row.coded - first : row.tile_tokens;
    const auto *ends = reinterpret_cast<const uint32_t *>(blob + row.table);
    uint32_t start, end;
    if (!tile_span(row, ends, tile, start, end)) return false;
    const Coder models = coder(row.mode == EXACT);
    Lane lanes[LANES];
    bool good = true;
    for (uint32_t l = 0; l < LANES; ++l) {
        good = open_lane(models, blob, row, group * GROUP + 2 * l, lanes[l]) && good;
        memcpy(&lanes[l].x, blob + start + 4 * l, 4);
        good = good && state_fits(lanes[l].x);
    }
    const uint8_t *const remainder = blob + start + 128;
    start += 128 + (row.mode == EXACT ? shape.remainder_bytes(m) : 0);
    if (!good || start > end) return false;
    const auto *words = reinterpret_cast<const uint16_t *>(blob + start);
    const auto *const limit = reinterpret_cast<const uint16_t *>(blob + end);
    for (uint32_t t = 0; t < m; ++t) {
        uint32_t symbols[LANES][2];
        for (uint32_t k = 0; k < 2; ++k) {
            for (uint32_t l = 0; l < LANES; ++l) symbols[l][k] = take_symbol(models, lanes[l], k);
            for (uint32_t l = 0; l < LANES; ++l) {
                if (lanes[l].x >= 1u << 15) continue;
                lanes[l].x = lanes[l].x << 16 | (words < limit ? *words : 0u);
                ++words;
            }
        }
        const uint32_t token = row.n_raw + first + t;
        const int32_t code = row.mode == PER_TOKEN ? blob[row.side + first + t] : row.code;
        for (uint32_t l = 0; l < LANES; ++l) {
            uint32_t rest[2];
            if (row.mode == EXACT) remainder_at(remainder, shape.mantissa(), m, t, 2 * l, rest);
            for (uint32_t k = 0; k < 2; ++k) {
                const uint32_t channel = group * GROUP + 2 * l + k;
                if (row.turned) {
                    const uint32_t at = (first + t) * GROUP * shape.groups() + channel;
                    steps[at] = static_cast<uint16_t>(component(lanes[l], k, symbols[l][k]));
                    continue;
                }
                if (channel >= shape.channels) continue;
                const uint32_t bits =
                    row.mode == EXACT
                        ? exact(shape, lanes[l], k, symbols[l][k], rest[k])
                        : store_element(quantised<true>(lanes[l], k, symbols[l][k], step_of(code, row.base)), shape.dtype);
                put_element(out + (token * shape.channels + channel) * shape.item(), shape.item(), bits);
            }
        }
    }
    for (const Lane &lane : lanes) good = good && lane.x == 1u << 15;
    good = good && words <= limit && limit - words < 8;
    for (; good && words < limit; ++words) good = *words == 0;
    return good;
}

// Values of a row's components, as the kernel finds them.
static void turn_row(const uint8_t *blob, const Shape &shape, const Row &row, const lmc_codec_profile &p, uint32_t number,
                     const std::vector<uint16_t> &steps, uint8_t *out) {
    const uint32_t width = p.block, size = (width + GROUP - 1) / GROUP * GROUP, dim = shape.channels / p.heads;
    const auto *matrices = reinterpret_cast<const uint32_t *>(p.back) + uint64_t{number * p.blocks} * size * size / 2;
    for (uint32_t t = 0; t < row.coded; ++t) {
        std::vector<float> x(shape.channels);
        const int32_t code = row.mode == PER_TOKEN ? blob[row.side + t] : row.code;
        for (uint32_t c = 0; c < shape.channels; ++c) {
            const uint16_t *q = &steps[t * GROUP * shape.groups() + c / width * width];
            const uint32_t *matrix = matrices + uint64_t{c / width} * size * size / 2 + c % width;
            uint32_t sum = 0;
            for (uint32_t k = 0; k < size / 2; ++k) {
                add_pair(sum, q[2 * k] | uint32_t{q[2 * k + 1]} << 16, matrix[k * size]);
            }
            x[c] = plain_value(sum, step_of(code, row.base));
            if (number % 2 == 0) x[c] += p.mean[number / 2 * shape.channels + c];
        }
        for (uint32_t i = 0; i < uint32_t(p.pairs) && number % 2 == 0; ++i) {
            float cosine, sine;
            angle_of(p.turns[i], row.start + row.n_raw + t, cosine, sine);
            for (uint32_t a = i; a < shape.channels; a += dim) turn(x[a], x[a + p.pairs], cosine, sine);
        }
        for (uint32_t c = 0; c < shape.channels; ++c) {
            put_element(out + ((row.n_raw + t) * shape.channels + c) * shape.item(), shape.item(), store_element(x[c], shape.dtype));
        }
    }
}

// 0, or what is wrong: 1 the header, 2 a row, 3 a tile.
static int32_t decode(const uint8_t *blob, uint64_t length, Shape shape, uint64_t tables, const lmc_codec_profile *profile,
                      uint8_t *out) {
    Header header;
    if (length < sizeof header) return 1;
    memcpy(&header, blob, sizeof header);
    if (!header_fits(header, shape, tables, profile ? profile->number : 0, length) || header.check != header_check(blob, shape)) return 1;
    const auto *ends = reinterpret_cast<const uint32_t *>(blob + 64);
    for (uint32_t number = 0; number < shape.rows(); ++number, out += shape.row_bytes()) {
        uint32_t start, end;
        Row row;
        if (!row_span(ends, shape, number, static_cast<uint32_t>(length), start, end)) return 1;
        uint64_t check;
        memcpy(&check, blob + start, 8);
        if (check != check_of(blob + start + 8, end - start - 8)) return 2;
        if (!open_row(blob, shape, header, number, start, end, row)) return 2;
        if (row.mode == RAW) {
            memcpy(out, blob + row.raw, shape.row_bytes());
            continue;
        }
        memcpy(out, blob + row.raw, row.n_raw * shape.channels * shape.item());
        std::vector<uint16_t> steps(row.turned ? row.coded * GROUP * shape.groups() : 0);
        for (uint32_t first = 0, range = 0; first < row.coded; first += row.tile_tokens, ++range) {
            for (uint32_t group = 0; group < shape.groups(); ++group) {
                if (!decode_tile(blob, shape, row, range, group, out, steps)) return 3;
            }
        }
        if (row.turned) turn_row(blob, shape, row, *profile, number, steps, out);
    }
    return 0;
}

// -- encoder --

struct Input {
    const Shape &shape;
    const uint8_t *row;
    uint32_t bits(uint32_t token, uint32_t channel) const {
        if (channel >= shape.channels) return 0;
        return element_at(row + (token * shape.channels + channel) * shape.item(), shape.item());
    }
    float value(uint32_t token, uint32_t channel) const { return load_element(bits(token, channel), shape.dtype); }
};

struct Stats {
    std::vector<int32_t> exponent;
    std::vector<uint64_t> sum;  // of squares, in units of the token's exponent
};

static Stats token_stats(const Input &in) {
    Stats out;
    for (uint32_t t = 0; t < in.shape.tokens; ++t) {
        int32_t most = NO_EXPONENT;
        uint64_t sum = 0;
        for (uint32_t c = 0; c < in.shape.channels; ++c) most = std::max(most, exponent_of(in.value(t, c)));
        for (uint32_t c = 0; c < in.shape.channels && most > NO_EXPONENT && most < NOT_FINITE; ++c) {
            const int64_t f = fixed_of(in.value(t, c), most);
            sum += static_cast<uint64_t>(f * f);
        }
        out.exponent.push_back(most);
        out.sum.push_back(sum);
    }
    return out;
}

static std::vector<uint8_t> encode_tile(const Input &in, const std::vector<Channel> &channels, uint32_t mode,
                                        uint32_t group, uint32_t token, uint32_t m, const std::vector<uint32_t> &inverse) {
    const Shape &shape = in.shape;
    const bool lossless = mode == EXACT;
    std::vector<uint16_t> words(2 * m * LANES);
    uint32_t at = static_cast<uint32_t>(words.size()), x[LANES];
    for (uint32_t &state : x) state = 1u << 15;
    for (uint32_t step = 2 * m; step-- > 0;) {
        const uint32_t t = token + step / 2, k = step % 2;
        uint32_t symbols[LANES];
        Model models[LANES];
        for (uint32_t l = 0; l < LANES; ++l) {
            const uint32_t c = group * GROUP + 2 * l + k;
            models[l] = model_of(MODELS_HERE, MODELS_HERE.fc, MODELS_HERE.multiplier, channels[c], lossless);
            const auto residual = [&](uint32_t at) {
                if (lossless) return models[l].anchor - static_cast<int32_t>(field_of(shape, in.bits(at, c)));
                return residual_of(models[l], in.value(at, c), inverse[at]);
            };
            symbols[l] = symbol_of(models[l], residual(t), step / 2 ? residual(t - 1) : 0);
        }
        for (uint32_t l = LANES; l-- > 0;) {
            if (!must_emit(models[l], symbols[l], x[l])) continue;
            words[--at] = static_cast<uint16_t>(x[l]);
            x[l] >>= 16;
        }
        for (uint32_t l = 0; l < LANES; ++l) x[l] = put_symbol(models[l], symbols[l], x[l]);
    }
    std::vector<uint8_t> out(128 + (lossless ? shape.remainder_bytes(m) : 0));
    memcpy(out.data(), x, 128);
    for (uint32_t t = 0; t < m && lossless; ++t) {
        for (uint32_t c = 0; c < GROUP; ++c) {
            const uint32_t rest = remainder_of(shape, in.bits(token + t, group * GROUP + c));
            put_remainder(out.data() + 128, shape.mantissa(), m, t, c, rest);
        }
    }
    const auto *first = reinterpret_cast<const uint8_t *>(words.data() + at);
    out.insert(out.end(), first, reinterpret_cast<const uint8_t *>(words.data() + words.size()));
    out.resize(align16(static_cast<uint32_t>(out.size())));
    return out;
}

// `plain`: the elements, where `in` is of components.
static std::vector<uint8_t> encode_row(const Input &in, const Input &plain_in, uint32_t number, uint32_t mode, int32_t offset, uint32_t n_raw,
                                       uint32_t tile_tokens) {
    const Shape &shape = in.shape;
    const uint32_t n = shape.tokens - n_raw, width = shape.groups() * GROUP;
    std::vector<uint32_t> inverse(shape.tokens);
    std::vector<uint8_t> codes;
    int32_t base = 0;
    RowHeader head{};
    head.row = static_cast<uint16_t>(number);
    bool raw = n == 0 || mode == RAW;
    const Stats stats = token_stats(in);
    if (!raw && mode != EXACT) {
        int32_t exponent, largest = NO_EXPONENT;
        for (uint32_t t = n_raw; t < shape.tokens; ++t) largest = std::max(largest, stats.exponent[t]);
        raw = !row_exponent(largest, shape.dtype, exponent);
        base = exponent - 28;
        uint64_t total = 0;
        for (uint32_t c = 0; c < shape.channels && !raw && mode == ANCHORED; ++c) {
            int64_t s1 = 0, s2 = 0;
            for (uint32_t t = n_raw; t < shape.tokens; ++t) {
                const int64_t f = fixed_of(in.value(t, c), exponent);
                s1 += f;
                s2 += f * f;
            }
            total += static_cast<uint64_t>(n * s2 - s1 * s1);
        }
        for (uint32_t t = n_raw; t < shape.tokens && !raw; ++t) {
            const int32_t code = mode == ANCHORED ? anchored_code(total, n, shape, offset, exponent)
                                                  : token_code(stats.sum[t], stats.exponent[t], shape, offset, base);
            codes.push_back(static_cast<uint8_t>(code));
            inverse[t] = inverse_of(code, base);
        }
    }
    std::vector<Channel> channels(width);
    for (uint32_t c = 0; c < shape.channels && !raw; ++c) {
        Sums sums = no_sums();
        uint64_t fields = 0;
        uint32_t top = 0, lowest = 255;
        for (uint32_t t = n_raw; t < shape.tokens; ++t) {
            const uint32_t field = field_of(shape, in.bits(t, c));
            if (mode != EXACT) add(sums, rint_of(in.value(t, c) * float_of(inverse[t])), t == n_raw);
            fields += field;
            top = std::max(top, field);
            lowest = std::min(lowest, field);
        }
        channels[c] = mode == EXACT ? exact_channel(MODELS_HERE, top, lowest, fields, n)
                                    : quantised_channel(MODELS_HERE, sums, n, mode == ANCHORED, n > tile_tokens,
                                                        &in == &plain_in ? MOST_STEPS : MOST_COMPONENT);
        raw = channels[c].raw;
    }
    std::vector<uint8_t> row;
    const uint32_t plain = 16 + align16(plain_in.shape.row_bytes());
    if (!raw) {
        const uint32_t tiles = (n + tile_tokens - 1) / tile_tokens * shape.groups();
        uint32_t at[4], tile = 0;
        row.resize(row_sections(plain_in.shape, mode, n_raw, tiles, at));
        memcpy(&row[at[0]], plain_in.row, n_raw * shape.channels * plain_in.shape.item());
        if (mode == PER_TOKEN) memcpy(&row[at[1]], codes.data(), n);
        for (uint32_t c = 0; c < width; ++c) {
            if (mode == ANCHORED) memcpy(&row[at[1] + 2 * c], &channels[c].anchor, 2);
            if (mode == EXACT) row[at[1] + c] = static_cast<uint8_t>(channels[c].anchor);
            row[at[2] + c] = channels[c].record;
        }
        for (uint32_t first = n_raw; first < shape.tokens; first += tile_tokens) {
            for (uint32_t group = 0; group < shape.groups(); ++group, ++tile) {
                const uint32_t m = std::min(tile_tokens, shape.tokens - first);
                const auto coded = encode_tile(in, channels, mode, group, first, m, inverse);
                row.insert(row.end(), coded.begin(), coded.end());
                const auto end = static_cast<uint32_t>(row.size());
                memcpy(&row[at[3] + 4 * tile], &end, 4);
            }
        }
        raw = row.size() > plain;
        head.mode = static_cast<uint8_t>(mode);
        head.code = mode == ANCHORED ? codes[0] : 0;
        head.base = static_cast<int16_t>(base);
    }
    if (raw) {
        row.assign(plain, 0);
        memcpy(&row[16], plain_in.row, plain_in.shape.row_bytes());
        head.mode = RAW;
        head.code = 0;
        head.base = 0;
    }
    memcpy(row.data(), &head, sizeof head);
    head.check = check_of(row.data() + 8, row.size() - 8);
    memcpy(row.data(), &head, sizeof head);
    return row;
}

static uint32_t sink_tokens(const uint8_t *chunk, const Shape &shape, const uint8_t *modes) {
    if (shape.planes != 2 || shape.tokens < 32) return 0;
    uint32_t votes[VOTED] = {}, n_raw = 0;
    for (uint32_t number = 1; number < shape.rows(); number += 2) {
        if (modes[number] != PER_TOKEN) continue;
        const Stats stats = token_stats({shape, chunk + uint64_t{number} * shape.row_bytes()});
        const uint32_t row = sink_votes(stats.exponent.data(), stats.sum.data(), shape);
        for (uint32_t t = 0; t < VOTED; ++t) votes[t] += row >> t & 1;
    }
    for (uint32_t t = 0; t < VOTED; ++t) n_raw = 2 * votes[t] >= shape.layers ? t + 1 : n_raw;
    return n_raw;
}

// Components of a row, as the kernels find them.
static std::vector<float> components_of(const Input &in, const lmc_codec_profile &p, uint32_t number, uint64_t start) {
    const uint32_t channels = in.shape.channels, dim = channels / p.heads, width = p.block;
    const uint32_t size = (width + GROUP - 1) / GROUP * GROUP;
    const auto *matrices = reinterpret_cast<const uint32_t *>(p.there) + uint64_t{number * p.blocks} * size * size / 2;
    std::vector<float> out(in.shape.tokens * channels), x(channels);
    for (uint32_t t = 0; t < in.shape.tokens; ++t) {
        uint32_t most = 0;
        for (uint32_t c = 0; c < channels; ++c) {
            const auto value = [&](uint32_t at) { return in.value(t, c / dim * dim + at); };
            x[c] = number % 2 ? in.value(t, c) : turned_back(value, c % dim, p.turns, p.pairs, start + t);
            if (number % 2 == 0) x[c] -= p.mean[number / 2 * channels + c];
            most = std::max(most, bits_of(x[c]) & 0x7fffffffu);
        }
        int32_t exponent;
        const bool good = token_exponent(most, in.shape.dtype == D_FP16 ? 13 : 60, exponent);
        for (uint32_t c = 0; c < channels; ++c) {
            const uint32_t first = c / width * width;
            const uint32_t *matrix = matrices + uint64_t{c / width} * size * size / 2 + c % width;
            uint32_t sum = 0;
            for (uint32_t k = 0; 2 * k < width && good; ++k) {
                const uint32_t high = 2 * k + 1 < width ? fixed_point(x[first + 2 * k + 1], exponent) : 0;
                add_pair(sum, fixed_point(x[first + 2 * k], exponent) | high << 16, matrix[k * size]);
            }
            out[t * channels + c] = good ? component_of(sum, exponent) : float_of(0x7fc00000u);
        }
    }
    return out;
}

static int64_t encode(const uint8_t *chunk, Shape shape, uint64_t tables, const lmc_codec_profile *profile, uint64_t start,
                      const uint8_t *modes, const int16_t *offsets, int32_t n_raw, uint32_t tile_tokens, uint8_t level,
                      uint8_t *out) {
    shape.aux = profile ? AUX : 0;
    Shape inner = shape;
    inner.dtype = D_FP32;
    if (n_raw < 0) n_raw = static_cast<int32_t>(sink_tokens(chunk, shape, modes));
    if (n_raw > static_cast<int32_t>(shape.tokens)) n_raw = static_cast<int32_t>(shape.tokens);
    uint32_t at = shape.rows_at();
    memset(out, 0, at);
    if (profile) memcpy(out + shape.table_end(), &start, sizeof start);
    for (uint32_t number = 0; number < shape.rows(); ++number) {
        const Input in = {shape, chunk + uint64_t{number} * shape.row_bytes()};
        std::vector<float> components;
        if (profile) components = components_of(in, *profile, number, start);
        const Input turned = {inner, reinterpret_cast<const uint8_t *>(components.data())};
        const auto row = encode_row(profile ? turned : in, in, number, modes[number], offsets[number], n_raw, tile_tokens);
        memcpy(out + at, row.data(), row.size());
        at += static_cast<uint32_t>(row.size());
        memcpy(out + 64 + 4 * number, &at, 4);
    }
    Header header = header_of(shape, level, tile_tokens, n_raw, at, tables, profile ? profile->number : 0);
    memcpy(out, &header, sizeof header);
    header.check = header_check(out, shape);
    memcpy(out, &header, sizeof header);
    return at;
}

}  // namespace lmc_cuda
