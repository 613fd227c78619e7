// The codec's encoder (docs/codec.md): statistics, models, tiles, then everything into its place.
#include <errno.h>

#include "codec_device.h"

namespace lmc_cuda {
namespace {

constexpr uint32_t BLOCK = 256, WARPS = BLOCK / LANES;

// What becomes of a row.
struct Plan {
    uint32_t mode, raw;
    int32_t code, base;
    uint32_t length, start;
};

struct Encode {
    int64_t chunks[MAX_BLOBS], outs[MAX_BLOBS], plain[MAX_BLOBS];
    uint64_t starts[MAX_BLOBS];
    // `shape` and `chunks` are of what is quantised; with a profile components as float32. What is stored as it is has
    // `stored` and `plain`.
    Shape shape, stored;
    lmc_codec_profile profile;  // number 0: none
    float *components;
    uint64_t tables;
    int64_t *sizes;
    int32_t *raw_rows;
    uint32_t count, level, tile_tokens, stride;  // stride: of tiles in scratch memory
    int32_t n_raw;
    Divisor rows, tokens, groups, each_tiles;
    // Scratch memory. Of every row, whatever the blob:
    uint8_t *modes;
    int16_t *offsets;
    // Of every blob and row:
    uint64_t *sums, *totals;        // [token]; of an ANCHORED row
    Plan *plans;
    int32_t *exponents;             // [token]
    uint32_t *inverses, *tile_bytes;  // [token]; [tile]
    Channel *channels;              // [64 G]
    uint32_t *sinks;                // n_raw of each blob
    uint8_t *coded;                 // [tile][stride]: states, remainders, and words at the very end
};

struct Place {
    uint32_t blob, row, at;  // at: of both
    const uint8_t *elements, *plain;
};

__device__ __forceinline__ Place place_of(const Encode &e, uint32_t index) {
    Place p;
    p.at = index;
    p.row = split(index, e.rows);
    p.blob = index;
    p.elements = reinterpret_cast<const uint8_t *>(e.chunks[p.blob]) + uint64_t{p.row} * e.shape.row_bytes();
    p.plain = reinterpret_cast<const uint8_t *>(e.plain[p.blob]) + uint64_t{p.row} * e.stored.row_bytes();
    return p;
}

template <int DTYPE>
__device__ __forceinline__ float value_of(const Encode &e, uint32_t bits) {
    return load_element(bits, DTYPE < 0 ? e.shape.dtype : DTYPE);
}

// Channels c and c + 1 of a token; 0 beyond the last.
template <int DTYPE>
__device__ __forceinline__ void load_pair(const Encode &e, const uint8_t *row, uint32_t token, uint32_t c,
                                          uint32_t (&bits)[2]) {
    const uint32_t item = DTYPE == D_BF16 ? 2 : e.shape.item();
    const uint8_t *at = row + (token * e.shape.channels + c) * item;
    bits[0] = bits[1] = 0;
    if (DTYPE == D_BF16 && e.shape.channels % 2 == 0) {
        if (c < e.shape.channels) bits[0] = __ldg(reinterpret_cast<const uint32_t *>(at));
        bits[1] = bits[0] >> 16;
        bits[0] &= 0xffff;
        return;
    }
    for (uint32_t k = 0; k < 2; ++k) {
        if (c + k < e.shape.channels) bits[k] = element_at(at + k * item, item);
    }
}

// A warp for a token: K without rotation and mean, V as it is, and its exponent. Tokens of a row that must stay raw
// become NaN.
__global__ void __launch_bounds__(BLOCK) straighten_kernel(const __grid_constant__ Encode e) {
    uint32_t index = blockIdx.x * WARPS + threadIdx.x / LANES;
    const uint32_t token = split(index, e.tokens), l = threadIdx.x % LANES;
    if (index >= e.count * e.rows.d) return;
    const Place p = place_of(e, index);
    const uint32_t channels = e.shape.channels, dim = channels / e.profile.heads, item = e.stored.item();
    float *const out = e.components + (uint64_t{p.at} * e.shape.tokens + token) * channels;
    uint32_t most = 0;
    for (uint32_t c = l; c < channels; c += LANES) {
        const auto value = [&](uint32_t at) {
            const uint8_t *from = p.plain + (uint64_t{token} * channels + c / dim * dim + at) * item;
            return load_element(element_at(from, item), e.stored.dtype);
        };
        float x;
        if (p.row % 2) {
            x = value(c % dim);
        } else {
            x = turned_back(value, c % dim, e.profile.turns, e.profile.pairs, e.starts[p.blob] + token);
            x -= e.profile.mean[p.row / 2 * channels + c];
        }
        out[c] = x;
        most = max(most, bits_of(x) & 0x7fffffffu);
    }
    most = __reduce_max_sync(~0u, most);
    int32_t exponent;
    const bool good = token_exponent(most, e.stored.dtype == D_FP16 ? 13 : 60, exponent);
    if (!good) {
        for (uint32_t c = l; c < channels; c += LANES) out[c] = float_of(0x7fc00000u);
    }
    if (l == 0) e.exponents[p.at * e.shape.tokens + token] = good ? exponent : NOT_FINITE;
}

// A block for TURN_TOKENS tokens of a row's block of channels: its components, in place.
constexpr uint32_t TURN_TOKENS = 16, MOST_BLOCK = 256;
__global__ void __launch_bounds__(BLOCK) components_kernel(const __grid_constant__ Encode e) {
    __shared__ uint32_t f[TURN_TOKENS][MOST_BLOCK / 2];
    const Place p = place_of(e, blockIdx.y);
    const uint32_t block = blockIdx.x % e.profile.blocks, first = blockIdx.x / e.profile.blocks * TURN_TOKENS;
    const uint32_t width = e.profile.block, size = (width + GROUP - 1) / GROUP * GROUP, channels = e.shape.channels;
    const uint32_t count = min(e.shape.tokens - first, TURN_TOKENS);
    float *const x = e.components + (uint64_t{p.at} * e.shape.tokens + first) * channels + block * width;
    const int32_t *const exponents = e.exponents + p.at * e.shape.tokens + first;
    for (uint32_t i = threadIdx.x; i < TURN_TOKENS * size / 2; i += BLOCK) {
        const uint32_t t = i / (size / 2), k = i % (size / 2);
        uint32_t both = 0;
        for (uint32_t j = 0; j < 2; ++j) {
            if (t < count && exponents[t] != NOT_FINITE && 2 * k + j < width) {
                both |= fixed_point(x[t * channels + 2 * k + j], exponents[t]) << 16 * j;
            }
        }
        f[t][k] = both;
    }
    __syncthreads();
    const auto *matrix = reinterpret_cast<const uint32_t *>(e.profile.there) + uint64_t{p.row * e.profile.blocks + block} * size * size / 2;
    constexpr uint32_t EACH = 8;
    for (uint32_t i = threadIdx.x; i < width * (TURN_TOKENS / EACH); i += BLOCK) {
        const uint32_t c = i % width, t = i / width * EACH;
        uint32_t sums[EACH] = {};
        for (uint32_t k = 0; k < size / 2; ++k) {
            const uint32_t m = __ldg(matrix + k * size + c);
#pragma unroll
            for (uint32_t j = 0; j < EACH; ++j) add_pair(sums[j], f[t + j][k], m);
        }
        for (uint32_t j = 0; j < EACH && t + j < count; ++j) {
            if (exponents[t + j] != NOT_FINITE) x[(t + j) * channels + c] = component_of(sums[j], exponents[t + j]);
        }
    }
}

// A warp for a token: its largest exponent, and the sum of squares in units of it.
template <int DTYPE>
__global__ void __launch_bounds__(BLOCK) tokens_kernel(const __grid_constant__ Encode e) {
    uint32_t index = blockIdx.x * WARPS + threadIdx.x / LANES;
    const uint32_t token = split(index, e.tokens), l = threadIdx.x % LANES;
    if (index >= e.count * e.rows.d) return;
    const Place p = place_of(e, index);
    if (e.modes[p.row] == RAW || e.modes[p.row] == EXACT) return;
    uint32_t largest = 0, bits[2];
    for (uint32_t c = 2 * l; c < e.shape.channels; c += GROUP) {
        load_pair<DTYPE>(e, p.elements, token, c, bits);
        for (uint32_t k = 0; k < 2; ++k) largest = max(largest, bits_of(value_of<DTYPE>(e, bits[k])) & 0x7fffffffu);
    }
    largest = __reduce_max_sync(~0u, largest);
    const int32_t exponent = exponent_of(float_of(largest));
    uint64_t sum = 0;
    if (e.modes[p.row] == PER_TOKEN && exponent != NO_EXPONENT && exponent != NOT_FINITE) {
        for (uint32_t c = 2 * l; c < e.shape.channels; c += GROUP) {
            load_pair<DTYPE>(e, p.elements, token, c, bits);
            for (uint32_t k = 0; k < 2; ++k) {
                const int32_t f = fixed_of(value_of<DTYPE>(e, bits[k]), exponent);
                sum += static_cast<uint32_t>(f * f);
            }
        }
    }
    sum = warp_sum(sum);
    if (l == 0) {
        e.exponents[p.at * e.shape.tokens + token] = exponent;
        e.sums[p.at * e.shape.tokens + token] = sum;
    }
}

// A block for a blob: how many tokens at its start stay as they are.
__global__ void __launch_bounds__(BLOCK) sinks_kernel(const __grid_constant__ Encode e) {
    uint32_t n_raw = static_cast<uint32_t>(e.n_raw);
    if (e.n_raw < 0) {
        uint64_t votes = 0;  // 16 bits for each token
        if (e.shape.planes == 2 && e.shape.tokens >= 32) {
            for (uint32_t layer = threadIdx.x; layer < e.shape.layers; layer += BLOCK) {
                const uint32_t row = 2 * layer + 1, at = (blockIdx.x * e.rows.d + row) * e.shape.tokens;
                if (e.modes[row] != PER_TOKEN) continue;
                const uint32_t found = sink_votes(e.exponents + at, e.sums + at, e.shape);
                for (uint32_t t = 0; t < VOTED; ++t) votes += uint64_t{found >> t & 1} << 16 * t;
            }
        }
        votes = block_sum(votes);
        n_raw = 0;
        for (uint32_t t = 0; t < VOTED; ++t) {
            if (2 * (votes >> 16 * t & 0xffff) >= e.shape.layers) n_raw = t + 1;
        }
    }
    if (threadIdx.x == 0) e.sinks[blockIdx.x] = min(n_raw, e.shape.tokens);
}

__device__ __forceinline__ bool exponent_at(const Encode &e, const Place &p, uint32_t n_raw, int32_t &exponent) {
    int32_t largest = NO_EXPONENT;
    for (uint32_t t = n_raw + threadIdx.x % LANES; t < e.shape.tokens; t += LANES) {
        largest = max(largest, e.exponents[p.at * e.shape.tokens + t]);
    }
    return row_exponent(__reduce_max_sync(~0u, largest), e.shape.dtype, exponent);
}

// A warp for a group of an ANCHORED row: its part of the row's variance.
template <int DTYPE>
__global__ void __launch_bounds__(BLOCK) totals_kernel(const __grid_constant__ Encode e) {
    uint32_t index = blockIdx.x * WARPS + threadIdx.x / LANES;
    const uint32_t group = split(index, e.groups), c = group * GROUP + 2 * (threadIdx.x % LANES);
    if (index >= e.count * e.rows.d) return;
    const Place p = place_of(e, index);
    const uint32_t n_raw = e.sinks[p.blob];
    int32_t exponent;
    if (e.modes[p.row] != ANCHORED || !exponent_at(e, p, n_raw, exponent)) return;
    int32_t s1[2] = {};
    uint64_t s2[2] = {};
#pragma unroll 4
    for (uint32_t t = n_raw; t < e.shape.tokens; ++t) {
        uint32_t bits[2];
        load_pair<DTYPE>(e, p.elements, t, c, bits);
        for (uint32_t k = 0; k < 2; ++k) {
            const int32_t f = fixed_of(value_of<DTYPE>(e, bits[k]), exponent);
            s1[k] += f;
            s2[k] += static_cast<uint32_t>(f * f);
        }
    }
    uint64_t total = 0;
    for (uint32_t k = 0; k < 2; ++k) {
        total += (e.shape.tokens - n_raw) * s2[k] - static_cast<uint64_t>(static_cast<int64_t>(s1[k]) * s1[k]);
    }
    total = warp_sum(total);
    if (threadIdx.x % LANES == 0) atomicAdd(reinterpret_cast<unsigned long long *>(e.totals + p.at), total);
}

// A warp for a row: its plan, and the inverse step of every token.
__global__ void __launch_bounds__(BLOCK) plans_kernel(const __grid_constant__ Encode e) {
    const uint32_t index = blockIdx.x * WARPS + threadIdx.x / LANES, l = threadIdx.x % LANES;
    if (index >= e.count * e.rows.d) return;
    const Place p = place_of(e, index);
    const uint32_t n_raw = e.sinks[p.blob], n = e.shape.tokens - n_raw;
    Plan plan = {e.modes[p.row], n == 0 || e.modes[p.row] == RAW, 0, 0, 0, 0};
    if (!plan.raw && plan.mode != EXACT) {
        int32_t exponent;
        plan.raw = !exponent_at(e, p, n_raw, exponent);
        plan.base = exponent - 28;
        const int32_t offset = e.offsets[p.row];
        if (plan.mode == ANCHORED) plan.code = anchored_code(e.totals[p.at], n, e.shape, offset, exponent);
        for (uint32_t t = n_raw + l; t < e.shape.tokens && !plan.raw; t += LANES) {
            const uint32_t at = p.at * e.shape.tokens + t;
            const int32_t code = plan.mode == ANCHORED
                                     ? plan.code
                                     : token_code(e.sums[at], e.exponents[at], e.shape, offset, plan.base);
            e.inverses[at] = inverse_of(code, plan.base);
            if (plan.mode == PER_TOKEN) e.exponents[at] = code;  // what it was for is over
        }
    }
    if (l == 0) e.plans[p.at] = plan;
}

// A warp for a group of a row: anchors and models of its channels.
template <int DTYPE>
__global__ void __launch_bounds__(BLOCK) channels_kernel(const __grid_constant__ Encode e) {
    uint32_t index = blockIdx.x * WARPS + threadIdx.x / LANES;
    const uint32_t group = split(index, e.groups), c = group * GROUP + 2 * (threadIdx.x % LANES);
    if (index >= e.count * e.rows.d) return;
    const Place p = place_of(e, index);
    const uint32_t mode = e.plans[p.at].mode, n_raw = e.sinks[p.blob], n = e.shape.tokens - n_raw;
    if (e.plans[p.at].raw) return;
    Sums sums[2] = {no_sums(), no_sums()};
    uint32_t top[2] = {}, lowest[2] = {255, 255}, fields[2] = {};
    const uint32_t *const inverses = e.inverses + p.at * e.shape.tokens;
#pragma unroll 4
    for (uint32_t t = n_raw; t < e.shape.tokens; ++t) {
        uint32_t bits[2];
        load_pair<DTYPE>(e, p.elements, t, c, bits);
        const float inverse = mode == EXACT ? 0 : float_of(inverses[t]);
        for (uint32_t k = 0; k < 2; ++k) {
            if (mode != EXACT) {
                add(sums[k], rint_of(value_of<DTYPE>(e, bits[k]) * inverse), t == n_raw);
            } else {
                const uint32_t field = field_of(e.shape, bits[k]);
                top[k] = max(top[k], field);
                lowest[k] = min(lowest[k], field);
                fields[k] += field;
            }
        }
    }
    for (uint32_t k = 0; k < 2; ++k) {
        Channel channel = {0, 0, 0};
        if (c + k < e.shape.channels) {
            channel = mode == EXACT ? exact_channel(DEVICE_MODELS, top[k], lowest[k], fields[k], n)
                                    : quantised_channel(DEVICE_MODELS, sums[k], n, mode == ANCHORED, n > e.tile_tokens,
                                                        e.profile.number ? MOST_COMPONENT : MOST_STEPS);
        }
        e.channels[p.at * e.groups.d * GROUP + c + k] = channel;
        if (channel.raw) e.plans[p.at].raw = 1;
    }
}

// A warp for a tile, from its last token to its first.
template <int DTYPE>
__global__ void __launch_bounds__(BLOCK) tiles_kernel(const __grid_constant__ Encode e) {
    __shared__ uint32_t fc[SYMBOLS], multiplier[SYMBOLS];
    for (uint32_t i = threadIdx.x; i < SYMBOLS; i += BLOCK) {
        fc[i] = DEVICE_MODELS.fc[i];
        multiplier[i] = DEVICE_MODELS.multiplier[i];
    }
    __syncthreads();
    uint32_t index = blockIdx.x * WARPS + threadIdx.x / LANES;
    const uint32_t tile = split(index, e.each_tiles), l = threadIdx.x % LANES;
    if (index >= e.count * e.rows.d) return;
    const Place p = place_of(e, index);
    const uint32_t mode = e.plans[p.at].mode, group = tile % e.groups.d, c = group * GROUP + 2 * l;
    const uint32_t first = e.sinks[p.blob] + tile / e.groups.d * e.tile_tokens;
    if (e.plans[p.at].raw || first >= e.shape.tokens) return;
    const bool lossless = mode == EXACT;
    const uint32_t m = min(e.tile_tokens, e.shape.tokens - first), below = (1u << l) - 1;
    uint8_t *const out = e.coded + uint64_t{p.at * e.each_tiles.d + tile} * e.stride;
    auto *const words = reinterpret_cast<uint16_t *>(out);
    Model models[2];
    for (uint32_t k = 0; k < 2; ++k) {
        const Channel channel = e.channels[p.at * e.groups.d * GROUP + c + k];
        models[k] = model_of(DEVICE_MODELS, fc, multiplier, channel, lossless);
    }
    const uint32_t *const inverses = e.inverses + p.at * e.shape.tokens + first;
    const auto load = [&](uint32_t t, int32_t (&r)[2]) {
        uint32_t bits[2];
        load_pair<DTYPE>(e, p.elements, first + t, c, bits);
        const uint32_t inverse = lossless ? 0 : __ldg(inverses + t);
        for (int k = 0; k < 2; ++k) {
            r[k] = lossless ? models[k].anchor - static_cast<int32_t>(field_of(e.shape, bits[k]))
                            : residual_of(models[k], value_of<DTYPE>(e, bits[k]), inverse);
        }
    };
    uint32_t x = 1u << 15, at = e.stride / 2;
    int32_t r[2], before[2] = {};
    load(m - 1, r);
#pragma unroll 4
    for (uint32_t t = m; t-- > 0;) {
        if (t) {
            load(t - 1, before);
        } else {
            before[0] = before[1] = 0;
        }
#pragma unroll
        for (int k = 1; k >= 0; --k) {
            const uint32_t symbol = symbol_of(models[k], r[k], before[k]);
            const bool emit = must_emit(models[k], symbol, x);
            const uint32_t mask = __ballot_sync(~0u, emit);
            at -= __popc(mask);
            if (emit) {
                words[at + __popc(mask & below)] = static_cast<uint16_t>(x);
                x >>= 16;
            }
            x = put_symbol(models[k], symbol, x);
            r[k] = before[k];
        }
    }
    reinterpret_cast<uint32_t *>(out)[l] = x;
    const uint32_t rest = lossless ? e.shape.remainder_bytes(m) : 0;
    if (lossless) {
        for (uint32_t i = l; i < rest / 4; i += LANES) reinterpret_cast<uint32_t *>(out + 128)[i] = 0;
        __syncwarp();
        // Eight channels of a token share bytes of the bit planes: a lane does eight.
        for (uint32_t i = l; i < m * 8; i += LANES) {
            for (uint32_t k = 0; k < 8; ++k) {
                const uint32_t t = i / 8, inner = i % 8 * 8 + k, channel = group * GROUP + inner;
                if (channel >= e.shape.channels) break;
                const uint32_t item = e.shape.item();
                const uint8_t *const from = p.elements + ((first + t) * e.shape.channels + channel) * item;
                put_remainder(out + 128, e.shape.mantissa(), m, t, inner, remainder_of(e.shape, element_at(from, item)));
            }
        }
    }
    if (l == 0) e.tile_bytes[p.at * e.each_tiles.d + tile] = 128 + rest + (e.stride - 2 * at);
}

// Sum of values[0..count) before each, by the block; returns the sum of all. `count` may be anything.
template <typename Get, typename Put>
__device__ uint32_t block_scan(uint32_t count, Get get, Put put) {
    __shared__ uint32_t parts[WARPS];
    uint32_t before = 0;
    for (uint32_t first = 0; first < count; first += BLOCK) {
        const uint32_t i = first + threadIdx.x, mine = i < count ? get(i) : 0;
        uint32_t sum = mine;
        for (uint32_t step = 1; step < LANES; step *= 2) {
            const uint32_t other = __shfl_up_sync(~0u, sum, step);
            if (threadIdx.x % LANES >= step) sum += other;
        }
        __syncthreads();
        if (threadIdx.x % LANES == LANES - 1) parts[threadIdx.x / LANES] = sum;
        __syncthreads();
        uint32_t all = 0, earlier = 0;
        for (uint32_t w = 0; w < WARPS; ++w) {
            if (w < threadIdx.x / LANES) earlier += parts[w];
            all += parts[w];
        }
        if (i < count) put(i, before + earlier + sum - mine);
        before += all;
    }
    return before;
}

// A block for a row: where its tiles begin, and its length.
__global__ void __launch_bounds__(BLOCK) rows_kernel(const __grid_constant__ Encode e) {
    const Place p = place_of(e, blockIdx.x);
    Plan &plan = e.plans[p.at];
    const uint32_t plain = 16 + align16(e.stored.row_bytes()), n_raw = e.sinks[p.blob];
    bool raw = plan.raw;
    uint32_t length = plain;
    if (!raw) {
        const uint32_t tiles = (e.shape.tokens - n_raw + e.tile_tokens - 1) / e.tile_tokens * e.groups.d;
        const uint32_t *const lengths = e.tile_bytes + p.at * e.each_tiles.d;
        uint32_t sections[4];
        length = row_sections(e.stored, plan.mode, n_raw, tiles, sections);
        length += block_scan(tiles, [&](uint32_t i) { return align16(lengths[i]); }, [](uint32_t, uint32_t) {});
        raw = length > plain;
    }
    if (threadIdx.x == 0) {
        plan.raw = raw;
        plan.length = raw ? plain : length;
    }
}

// A block for a blob: header and row table.
__global__ void __launch_bounds__(BLOCK) headers_kernel(const __grid_constant__ Encode e) {
    auto *const out = reinterpret_cast<uint8_t *>(e.outs[blockIdx.x]);
    auto *const ends = reinterpret_cast<uint32_t *>(out + 64);
    Plan *const plans = e.plans + blockIdx.x * e.rows.d;
    const uint32_t begin = e.stored.rows_at(), table_end = e.stored.table_end();
    const uint32_t total = begin + block_scan(
        e.rows.d, [&](uint32_t i) { return plans[i].length; },
        [&](uint32_t i, uint32_t before) {
            plans[i].start = begin + before;
            ends[i] = begin + before + plans[i].length;
        });
    for (uint32_t i = e.rows.d + threadIdx.x; i < (table_end - 64) / 4; i += BLOCK) ends[i] = 0;
    if (e.stored.aux && threadIdx.x < 2) {
        reinterpret_cast<uint64_t *>(out + table_end)[threadIdx.x] = threadIdx.x ? 0 : e.starts[blockIdx.x];
    }
    uint64_t unasked = 0;
    for (uint32_t i = threadIdx.x; i < e.rows.d; i += BLOCK) unasked += plans[i].raw && e.modes[i] != RAW;
    unasked = block_sum(unasked);
    auto *const header = reinterpret_cast<Header *>(out);
    if (threadIdx.x == 0) {
        *header = header_of(e.stored, e.level, e.tile_tokens, e.sinks[blockIdx.x], total, e.tables, e.profile.number);
        e.sizes[blockIdx.x] = total;
        e.raw_rows[blockIdx.x] = static_cast<int32_t>(unasked);
    }
    __syncthreads();
    const uint64_t check = block_check(out, 56, 0) + block_check(out + 64, begin - 64, 14);
    if (threadIdx.x == 0) header->check = check;
}

__device__ void pad(uint8_t *out, uint32_t from) {
    const uint32_t i = from + threadIdx.x;
    if (threadIdx.x < 16 && i < align16(from)) out[i] = 0;
}

// A block for a row: everything into its place, then the check.
__global__ void __launch_bounds__(BLOCK) pack_kernel(const __grid_constant__ Encode e) {
    const Place p = place_of(e, blockIdx.x);
    const Plan plan = e.plans[p.at];
    const Shape &shape = e.stored;
    uint8_t *const out = reinterpret_cast<uint8_t *>(e.outs[p.blob]) + plan.start;
    if (threadIdx.x == 0) {
        const bool raw = plan.raw;
        *reinterpret_cast<RowHeader *>(out) = {0, static_cast<uint16_t>(p.row), static_cast<uint8_t>(raw ? RAW : plan.mode),
                                               static_cast<uint8_t>(raw ? 0 : plan.code),
                                               static_cast<int16_t>(raw ? 0 : plan.base), 0};
    }
    if (plan.raw) {
        copy_bytes(out + 16, p.plain, shape.row_bytes(), threadIdx.x, BLOCK);
        pad(out, 16 + shape.row_bytes());
    } else {
        const uint32_t n_raw = e.sinks[p.blob], n = shape.tokens - n_raw, width = e.groups.d * GROUP;
        const uint32_t tiles = (n + e.tile_tokens - 1) / e.tile_tokens * e.groups.d;
        uint32_t at[4];
        const uint32_t first = row_sections(shape, plan.mode, n_raw, tiles, at);
        const uint32_t raw_bytes = n_raw * shape.channels * shape.item();
        copy_bytes(out + at[0], p.plain, raw_bytes, threadIdx.x, BLOCK);
        pad(out, at[0] + raw_bytes);
        if (plan.mode == PER_TOKEN) {
            const int32_t *const codes = e.exponents + p.at * shape.tokens + n_raw;
            for (uint32_t t = threadIdx.x; t < n; t += BLOCK) out[at[1] + t] = static_cast<uint8_t>(codes[t]);
            pad(out, at[1] + n);
        }
        for (uint32_t c = threadIdx.x; c < width; c += BLOCK) {
            const Channel channel = e.channels[p.at * width + c];
            if (plan.mode == ANCHORED) reinterpret_cast<int16_t *>(out + at[1])[c] = channel.anchor;
            if (plan.mode == EXACT) out[at[1] + c] = static_cast<uint8_t>(channel.anchor);
            out[at[2] + c] = channel.record;
        }
        uint32_t *const lengths = e.tile_bytes + p.at * e.each_tiles.d;
        auto *const ends = reinterpret_cast<uint32_t *>(out + at[3]);
        block_scan(tiles, [&](uint32_t i) { return align16(lengths[i]); },
                   [&](uint32_t i, uint32_t before) { ends[i] = first + before + align16(lengths[i]); });
        pad(out, at[3] + 4 * tiles);
        __syncthreads();
        for (uint32_t tile = threadIdx.x / LANES; tile < tiles; tile += WARPS) {
            const uint32_t length = lengths[tile], l = threadIdx.x % LANES;
            uint8_t *const to = out + (ends[tile] - align16(length));
            const uint8_t *const from = e.coded + uint64_t{p.at * e.each_tiles.d + tile} * e.stride;
            const uint32_t m = min(e.tile_tokens, n - tile / e.groups.d * e.tile_tokens);
            const uint32_t fixed = 128 + (plan.mode == EXACT ? shape.remainder_bytes(m) : 0), words = length - fixed;
            for (uint32_t i = l; i < fixed / 16; i += LANES) {
                reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(from)[i];
            }
            const auto *source = reinterpret_cast<const uint16_t *>(from + e.stride - words);
            for (uint32_t i = l; i < (align16(length) - fixed) / 2; i += LANES) {
                reinterpret_cast<uint16_t *>(to + fixed)[i] = i < words / 2 ? source[i] : uint16_t{0};
            }
        }
    }
    __syncthreads();
    const uint64_t check = block_check(out + 8, plan.length - 8, 0);
    if (threadIdx.x == 0) reinterpret_cast<RowHeader *>(out)->check = check;
}

uint32_t blocks(uint64_t warps) { return static_cast<uint32_t>((warps + WARPS - 1) / WARPS); }

template <int DTYPE>
int64_t launch_encode(const Encode &e, cudaStream_t stream) {
    const uint64_t rows = uint64_t{e.count} * e.rows.d;
    LMC_TRY(cudaMemsetAsync(e.totals, 0, rows * sizeof(uint64_t), stream));
    if (e.profile.number) {
        straighten_kernel<<<blocks(rows * e.tokens.d), BLOCK, 0, stream>>>(e);
        const uint32_t parts = (e.tokens.d + TURN_TOKENS - 1) / TURN_TOKENS * static_cast<uint32_t>(e.profile.blocks);
        components_kernel<<<dim3(parts, static_cast<uint32_t>(rows)), BLOCK, 0, stream>>>(e);
    }
    tokens_kernel<DTYPE><<<blocks(rows * e.tokens.d), BLOCK, 0, stream>>>(e);
    sinks_kernel<<<e.count, BLOCK, 0, stream>>>(e);
    totals_kernel<DTYPE><<<blocks(rows * e.groups.d), BLOCK, 0, stream>>>(e);
    plans_kernel<<<blocks(rows), BLOCK, 0, stream>>>(e);
    channels_kernel<DTYPE><<<blocks(rows * e.groups.d), BLOCK, 0, stream>>>(e);
    tiles_kernel<DTYPE><<<blocks(rows * e.each_tiles.d), BLOCK, 0, stream>>>(e);
    rows_kernel<<<static_cast<uint32_t>(rows), BLOCK, 0, stream>>>(e);
    headers_kernel<<<e.count, BLOCK, 0, stream>>>(e);
    pack_kernel<<<static_cast<uint32_t>(rows), BLOCK, 0, stream>>>(e);
    return failed(cudaGetLastError());
}

// Cuts scratch memory into its parts, and returns how much of it they take.
uint64_t lay_out(Encode &e, uint64_t scratch) {
    uint64_t at = scratch;
    const auto part = [&](auto *&out, uint64_t count) {
        out = reinterpret_cast<decltype(&*out)>(at);
        at += (count * sizeof(*out) + 255) & ~255ull;
    };
    const uint64_t rows = uint64_t{e.count} * e.rows.d, tokens = rows * e.tokens.d;
    part(e.modes, e.rows.d);
    part(e.offsets, e.rows.d);
    part(e.sums, tokens);
    part(e.totals, rows);
    part(e.plans, rows);
    part(e.exponents, tokens);
    part(e.inverses, tokens);
    part(e.tile_bytes, rows * e.each_tiles.d);
    part(e.channels, rows * e.groups.d * GROUP);
    part(e.sinks, e.count);
    part(e.coded, rows * e.each_tiles.d * e.stride);
    if (e.profile.number) part(e.components, tokens * e.shape.channels);
    return at - scratch;
}

Encode encode_of(const Shape &stored, int64_t count, const lmc_codec &codec) {
    const int32_t tile_tokens = codec.tile_tokens;
    Encode e{};
    Shape shape = stored;
    e.stored = stored;
    if (codec.profile) {
        e.profile = *codec.profile;
        e.stored.aux = AUX;
        shape.dtype = D_FP32;
    }
    e.shape = shape;
    e.count = static_cast<uint32_t>(count < MAX_BLOBS ? count : MAX_BLOBS);
    e.tile_tokens = static_cast<uint32_t>(tile_tokens);
    e.rows = divisor(shape.rows());
    e.tokens = divisor(shape.tokens);
    e.groups = divisor(shape.groups());
    e.each_tiles = divisor((shape.tokens + e.tile_tokens - 1) / e.tile_tokens * shape.groups());
    const uint32_t m = e.tile_tokens < shape.tokens ? e.tile_tokens : shape.tokens;
    // A symbol takes 11 bits at most; 4 in 3 words of 16 is more.
    e.stride = align16(256 + shape.remainder_bytes(m) + 96 * m);
    return e;
}

}  // namespace
}  // namespace lmc_cuda

using namespace lmc_cuda;

extern "C" {

int64_t lmc_cuda_codec_numbers(int32_t *out, int64_t room) {
    constexpr int64_t COUNT = sizeof(NUMBERS) / sizeof(NUMBERS[0]);
    for (int64_t i = 0; i < COUNT && i < room; ++i) out[i] = NUMBERS[i];
    return COUNT;
}

int64_t lmc_cuda_codec_scratch(const lmc_codec *codec, int64_t count, int32_t encode) {
    Shape shape;
    if (!shape_of(codec, shape) || count < 0) return -EINVAL;
    if (!encode) {
        const uint64_t rows = (sizeof(Row) * shape.rows() * static_cast<uint64_t>(count) + 255) & ~255ull;
        return static_cast<int64_t>(rows + steps_bytes(*codec, shape.rows(), count));
    }
    if (codec->tile_tokens < 1 || codec->tile_tokens > int32_t{MAX_TOKENS}) return -EINVAL;
    if (codec->profile && !profile_fits(*codec)) return -EINVAL;
    Encode e = encode_of(shape, count, *codec);
    return static_cast<int64_t>(lay_out(e, 0));
}

int64_t lmc_cuda_codec_encode(int32_t device, const lmc_codec *codec, uint64_t tables, const int64_t *chunks,
                              const int64_t *outs, int64_t count, int64_t scratch, int64_t scratch_bytes,
                              int64_t sizes, int64_t raw_rows, uint64_t stream) {
    Shape shape;
    if (!shape_of(codec, shape) || count < 0 || codec->tile_tokens < 1 || codec->tile_tokens > int32_t{MAX_TOKENS} ||
        codec->n_raw < -1 || codec->n_raw > int32_t{MAX_RAW} || codec->level < 0 || codec->level > 255) {
        return -EINVAL;
    }
    for (uint32_t i = 0; i < shape.rows(); ++i) {
        if (codec->modes[i] > EXACT || codec->offsets[i] < -160 || codec->offsets[i] > 32) return -EINVAL;
    }
    for (int64_t i = 0; i < count; ++i) {
        if (chunks[i] % 16 || outs[i] % 16) return -EINVAL;
        if (codec->profile && (codec->starts[i] < 0 || static_cast<uint64_t>(codec->starts[i]) > MOST_START)) return -EINVAL;
    }
    // With a profile everything is components: the caller says how many tokens are sinks, and no row is lossless.
    if (codec->profile && (!profile_fits(*codec) || codec->n_raw < 0)) return -EINVAL;
    for (uint32_t i = 0; codec->profile && i < shape.rows(); ++i) {
        if (codec->modes[i] == EXACT) return -EINVAL;
    }
    Encode e = encode_of(shape, count, *codec);
    const uint64_t most = e.tokens.d > e.each_tiles.d ? e.tokens.d : e.each_tiles.d;
    if (scratch % 256 || scratch_bytes < 0 || uint64_t{e.count} * e.rows.d * most >= uint64_t{1} << 31 ||
        lay_out(e, static_cast<uint64_t>(scratch)) > static_cast<uint64_t>(scratch_bytes)) {
        return -EINVAL;
    }
    if (!count) return 0;
    const OnDevice on(device);
    if (on.error) return on.error;
    const cudaStream_t queue = stream_of(stream);
    // Pageable memory is read before such a copy returns.
    LMC_TRY(cudaMemcpyAsync(e.modes, codec->modes, shape.rows(), cudaMemcpyHostToDevice, queue));
    LMC_TRY(cudaMemcpyAsync(e.offsets, codec->offsets, shape.rows() * sizeof(int16_t), cudaMemcpyHostToDevice, queue));
    e.tables = tables;
    e.level = static_cast<uint32_t>(codec->level);
    e.n_raw = codec->n_raw;
    for (int64_t first = 0; first < count; first += MAX_BLOBS) {
        e.count = static_cast<uint32_t>(count - first < MAX_BLOBS ? count - first : MAX_BLOBS);
        for (uint32_t i = 0; i < e.count; ++i) {
            e.plain[i] = chunks[first + i];
            e.outs[i] = outs[first + i];
            e.chunks[i] = chunks[first + i];
            if (codec->profile) {
                e.starts[i] = static_cast<uint64_t>(codec->starts[first + i]);
                e.chunks[i] = reinterpret_cast<int64_t>(e.components) + int64_t{i} * shape.rows() * e.shape.row_bytes();
            }
        }
        e.sizes = reinterpret_cast<int64_t *>(sizes) + first;
        e.raw_rows = reinterpret_cast<int32_t *>(raw_rows) + first;
        const int64_t bad = e.shape.dtype == D_BF16 ? launch_encode<D_BF16>(e, queue) : launch_encode<-1>(e, queue);
        if (bad) return bad;
    }
    return 0;
}

}  // extern "C"
