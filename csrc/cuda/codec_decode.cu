// The codec's decoder (docs/codec.md): one warp for a tile of 64 channels, one lane for two of them.
#include <errno.h>

#include "codec_device.h"

namespace lmc_cuda {
namespace {

constexpr uint32_t OPEN_THREADS = 256, DECODE_THREADS = 384, TURN_THREADS = 256, TURN_TOKENS = 16, MOST_BLOCK = 256;

struct Decode {
    int64_t blobs[MAX_BLOBS], outs[MAX_BLOBS];
    uint32_t lengths[MAX_BLOBS];
    Shape shape;
    uint64_t tables;
    Row *rows;  // [blob][row]
    int32_t *status;
    uint32_t first_row, row_count, count, items;
    Divisor groups, ranges, each_rows;
    lmc_codec_profile profile;  // number 0: none
    int16_t *steps;             // of components, [blob][row][token][64 G]
};

// Verifies a row, and copies what of it is stored as it is.
__global__ void __launch_bounds__(OPEN_THREADS) open_kernel(const __grid_constant__ Decode d) {
    const uint32_t index = blockIdx.y, number = d.first_row + blockIdx.x;
    const auto *blob = reinterpret_cast<const uint8_t *>(d.blobs[index]);
    Row *const out = d.rows + index * d.row_count + blockIdx.x;
    __shared__ Row shared;
    __shared__ int32_t wrong;
    if (threadIdx.x == 0) {
        shared.end = 0;
        wrong = LMC_CODEC_HEADER;
    }
    __syncthreads();
    const Header &header = *reinterpret_cast<const Header *>(blob);
    Shape shape = d.shape;
    const auto *ends = reinterpret_cast<const uint32_t *>(blob + 64);
    uint32_t start = 0, end = 0;
    const bool fits = d.lengths[index] >= 64 && header_fits(header, shape, d.tables, d.profile.number, d.lengths[index]) &&
                      row_span(ends, shape, number, d.lengths[index], start, end);
    if (fits) {
        const uint64_t head = block_check(blob, 56, 0) + block_check(blob + 64, shape.rows_at() - 64, 14);
        const uint64_t whole = block_check(blob + start + 8, end - start - 8, 0);
        if (threadIdx.x == 0) {
            Row row;
            if (head != header.check || whole != *reinterpret_cast<const uint64_t *>(blob + start)) {
                wrong = LMC_CODEC_CHECK;
            } else if (!open_row(blob, shape, header, number, start, end, row)) {
                wrong = LMC_CODEC_ROW;
            } else {
                shared = row;
                wrong = 0;
            }
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        *out = shared;
        if (wrong) d.status[index] = wrong;
    }
    if (wrong) return;
    const uint32_t bytes = shared.mode == RAW ? d.shape.row_bytes() : shared.n_raw * d.shape.channels * d.shape.item();
    copy_bytes(reinterpret_cast<uint8_t *>(d.outs[index]) + uint64_t{blockIdx.x} * d.shape.row_bytes(),
               blob + shared.raw, bytes, threadIdx.x, OPEN_THREADS);
}

// The next words for the lanes that ran low. CAREFUL: near the end, where there may be too few.
template <bool CAREFUL>
__device__ __forceinline__ void refill(uint32_t &x, const uint16_t *&words, const uint16_t *limit, uint32_t below) {
    const bool low = x < 1u << 15;
    const uint32_t mask = __ballot_sync(~0u, low);
    if (low) {
        const uint16_t *const mine = words + __popc(mask & below);
        x = x << 16 | (!CAREFUL || mine < limit ? __ldg(mine) : 0u);
    }
    words += __popc(mask);
}

// What tiles may be. Whole ones of bfloat16 have a path of their own: every lane has a pair of channels to store.
enum Kind { WHOLE_ANCHORED, WHOLE_PER_TOKEN, QUANTISED, EXACTLY, TURNED };

template <int KIND>
struct Tokens {
    const Decode &d;
    const Coder &coder;
    const uint8_t *codes, *remainder;  // codes: of the tokens' steps; null if all have one
    uint8_t *out;                      // of the lane's first channel
    uint32_t m, channel, below, step, stride;
    int32_t base;

    template <bool CAREFUL>
    __device__ __forceinline__ void one(uint32_t t, Lane &lane, const uint16_t *&words, const uint16_t *limit) const {
        uint32_t bits[2], symbols[2];
        symbols[0] = take_symbol(coder, lane, 0);
        refill<CAREFUL>(lane.x, words, limit, below);
        symbols[1] = take_symbol(coder, lane, 1);
        refill<CAREFUL>(lane.x, words, limit, below);
        uint8_t *const to = out + t * stride;
        if (KIND == TURNED) {
            const uint32_t low = component(lane, 0, symbols[0]), high = component(lane, 1, symbols[1]);
            *reinterpret_cast<uint32_t *>(to) = low | high << 16;
            return;
        }
        if (KIND == EXACTLY) {
            uint32_t rest[2];
            remainder_at(remainder, d.shape.mantissa(), m, t, channel % GROUP, rest);
            for (int k = 0; k < 2; ++k) bits[k] = exact(d.shape, lane, k, symbols[k], rest[k]);
        } else {
            const bool each = KIND == WHOLE_PER_TOKEN || (KIND == QUANTISED && codes);
            const uint32_t scale = each ? step_of(__ldg(codes + t), base) : step;
            constexpr bool PREDICTED = KIND != WHOLE_PER_TOKEN;
            const float low = quantised<PREDICTED>(lane, 0, symbols[0], scale);
            const float high = quantised<PREDICTED>(lane, 1, symbols[1], scale);
            if (KIND != QUANTISED) {
                *reinterpret_cast<__nv_bfloat162 *>(to) = __floats2bfloat162_rn(low, high);
                return;
            }
            bits[0] = store_element(low, d.shape.dtype);
            bits[1] = store_element(high, d.shape.dtype);
        }
        for (uint32_t k = 0; k < 2; ++k) {
            if (channel + k < d.shape.channels) put_element(to + k * d.shape.item(), d.shape.item(), bits[k]);
        }
    }
};

template <int KIND>
__device__ __forceinline__ bool decode_tile(const Decode &d, const Coder &coder, const Row &row, const uint8_t *blob,
                                            uint8_t *out, uint32_t range, uint32_t group) {
    const uint32_t l = threadIdx.x % LANES, first = range * row.tile_tokens, channel = group * GROUP + 2 * l;
    const uint32_t m = min(row.coded - first, row.tile_tokens);
    const uint32_t stride = KIND == TURNED ? 2 * GROUP * d.groups.d : d.shape.channels * d.shape.item();
    uint32_t start, end;
    Lane lane;
    bool good = tile_span(row, reinterpret_cast<const uint32_t *>(blob + row.table), range * d.groups.d + group, start, end);
    if (!good) return false;
    good = open_lane(coder, blob, row, channel, lane);
    lane.x = reinterpret_cast<const uint32_t *>(blob + start)[l];
    const uint8_t *const remainder = blob + start + 128;
    start += 128 + (KIND == EXACTLY ? d.shape.remainder_bytes(m) : 0);
    if (!__all_sync(~0u, good && start <= end && state_fits(lane.x))) return false;
    const auto *words = reinterpret_cast<const uint16_t *>(blob + start);
    const auto *const limit = reinterpret_cast<const uint16_t *>(blob + end);
    out += KIND == TURNED ? uint64_t{first} * stride + 2 * channel
                          : uint64_t{row.n_raw + first} * stride + channel * d.shape.item();
    const Tokens<KIND> tokens = {d, coder, row.mode == PER_TOKEN ? blob + row.side + first : nullptr, remainder, out,
                                 m, channel, (1u << l) - 1, step_of(row.code, row.base), stride, row.base};
    uint32_t t = 0;
    for (; t < m && limit - words >= 2 * LANES; ++t) tokens.template one<false>(t, lane, words, limit);
    for (; t < m; ++t) tokens.template one<true>(t, lane, words, limit);
    const int64_t left = limit - words;
    good = lane.x == 1u << 15 && left >= 0 && left < 8 && (l >= left || words[l] == 0);
    return __all_sync(~0u, good);
}

// WHOLE_ANCHORED stands for all kinds of quantised tiles of bfloat16.
template <int KIND>
__global__ void __launch_bounds__(DECODE_THREADS, KIND == WHOLE_ANCHORED ? 3 : 2) decode_kernel(const __grid_constant__ Decode d) {
    extern __shared__ __align__(16) uint8_t memory[];
    const auto mine = [](const Row &row) {
        if (KIND == TURNED || row.turned) return row.end && KIND == TURNED && row.turned;
        return row.end && (KIND == EXACTLY ? row.mode == EXACT : row.mode == ANCHORED || row.mode == PER_TOKEN);
    };
    bool any = false;
    for (uint32_t i = threadIdx.x; i < d.count * d.row_count; i += blockDim.x) any = any || mine(d.rows[i]);
    if (!__syncthreads_or(any)) return;
    const Coder coder = load_coder(memory, KIND == EXACTLY);
    const uint32_t warps = blockDim.x / LANES * gridDim.x;
    for (uint32_t item = blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES; item < d.items; item += warps) {
        uint32_t index = item;
        const uint32_t group = split(index, d.groups), part = split(index, d.ranges), number = split(index, d.each_rows);
        const Row &row = d.rows[index * d.row_count + number];
        if (!mine(row)) continue;
        const auto *blob = reinterpret_cast<const uint8_t *>(d.blobs[index]);
        uint8_t *out = KIND == TURNED ? reinterpret_cast<uint8_t *>(
                                            d.steps + uint64_t{index * d.row_count + number} * d.shape.tokens * GROUP * d.groups.d)
                                      : reinterpret_cast<uint8_t *>(d.outs[index]) + uint64_t{number} * d.shape.row_bytes();
        for (uint32_t range = part; range * row.tile_tokens < row.coded; range += d.ranges.d) {
            bool good;
            if (KIND == WHOLE_ANCHORED && d.shape.channels % 2 == 0 && (group + 1) * GROUP <= d.shape.channels) {
                good = row.mode == ANCHORED ? decode_tile<WHOLE_ANCHORED>(d, coder, row, blob, out, range, group)
                                            : decode_tile<WHOLE_PER_TOKEN>(d, coder, row, blob, out, range, group);
            } else {
                good = decode_tile<KIND == WHOLE_ANCHORED ? QUANTISED : KIND>(d, coder, row, blob, out, range, group);
            }
            if (!good && threadIdx.x % LANES == 0) d.status[index] = LMC_CODEC_TILE;
        }
    }
}

// Values of components: a block for TURN_TOKENS tokens of a row's block of channels. A row that was refused has
// unspecified values anyway.
__global__ void __launch_bounds__(TURN_THREADS) turn_kernel(const __grid_constant__ Decode d) {
    __shared__ uint32_t q[TURN_TOKENS][MOST_BLOCK / 2];
    __shared__ float x[TURN_TOKENS][MOST_BLOCK];
    const uint32_t index = blockIdx.z, number = blockIdx.y, block = blockIdx.x % d.profile.blocks;
    const Row &row = d.rows[index * d.row_count + number];
    const uint32_t first = blockIdx.x / d.profile.blocks * TURN_TOKENS;
    if (!row.end || !row.turned || first >= row.coded) return;
    const uint32_t count = min(row.coded - first, TURN_TOKENS), width = d.profile.block, size = (width + GROUP - 1) / GROUP * GROUP;
    const uint32_t plane = d.first_row + number, column = block * width, dim = d.shape.channels / d.profile.heads;
    const auto *steps = reinterpret_cast<const uint32_t *>(
        d.steps + (uint64_t{index * d.row_count + number} * d.shape.tokens + first) * GROUP * d.groups.d + column);
    for (uint32_t i = threadIdx.x; i < TURN_TOKENS * size / 2; i += TURN_THREADS) {
        const uint32_t t = i / (size / 2), k = i % (size / 2);
        q[t][k] = t < count ? steps[t * (GROUP / 2) * d.groups.d + k] : 0;
    }
    __syncthreads();
    const auto *blob = reinterpret_cast<const uint8_t *>(d.blobs[index]);
    const auto *matrix = reinterpret_cast<const uint32_t *>(d.profile.back) + uint64_t{plane * d.profile.blocks + block} * size * size / 2;
    const float *mean = d.profile.mean + uint64_t{plane / 2} * d.shape.channels + column;
    constexpr uint32_t EACH = 8;
    for (uint32_t i = threadIdx.x; i < width * (TURN_TOKENS / EACH); i += TURN_THREADS) {
        const uint32_t c = i % width, t = i / width * EACH;
        uint32_t sums[EACH] = {};
        for (uint32_t k = 0; k < size / 2; ++k) {
            const uint32_t m = __ldg(matrix + k * size + c);
#pragma unroll
            for (uint32_t j = 0; j < EACH; ++j) add_pair(sums[j], q[t + j][k], m);
        }
        for (uint32_t j = 0; j < EACH && t + j < count; ++j) {
            const int32_t code = row.mode == PER_TOKEN ? blob[row.side + first + t + j] : row.code;
            const float value = plain_value(sums[j], step_of(code, row.base));
            x[t + j][c] = plane % 2 ? value : value + mean[c];
        }
    }
    __syncthreads();
    if (plane % 2 == 0) {
        for (uint32_t i = threadIdx.x; i < count * d.profile.pairs; i += TURN_THREADS) {
            const uint32_t t = i / d.profile.pairs, pair = i % d.profile.pairs;
            float cosine, sine;
            angle_of(d.profile.turns[pair], row.start + row.n_raw + first + t, cosine, sine);
            for (uint32_t a = pair; a < width; a += dim) turn(x[t][a], x[t][a + d.profile.pairs], cosine, sine);
        }
        __syncthreads();
    }
    const uint32_t item = d.shape.item();
    uint8_t *out = reinterpret_cast<uint8_t *>(d.outs[index]) + uint64_t{number} * d.shape.row_bytes();
    for (uint32_t i = threadIdx.x; i < count * width; i += TURN_THREADS) {
        const uint32_t t = i / width, c = i % width;
        uint8_t *const to = out + (uint64_t{row.n_raw + first + t} * d.shape.channels + column + c) * item;
        put_element(to, item, store_element(x[t][c], d.shape.dtype));
    }
}

template <int KIND>
int64_t launch_decode(const Decode &d, int32_t ctas, cudaStream_t stream) {
    const uint32_t bytes = coder_bytes(KIND == EXACTLY);
    const auto kernel = decode_kernel<KIND>;
    int device, processors, fit;
    LMC_TRY(cudaGetDevice(&device));
    LMC_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    LMC_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
    // Few tiles: small blocks, so that every multiprocessor gets some.
    uint32_t threads = DECODE_THREADS;
    while (threads > 96 && d.items * LANES < threads * static_cast<uint32_t>(processors)) threads /= 2;
    LMC_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, static_cast<int>(threads), bytes));
    const uint32_t useful = (d.items * LANES + threads - 1) / threads;
    uint32_t grid = static_cast<uint32_t>(processors * (fit > 0 ? fit : 1));
    if (ctas > 0 && static_cast<uint32_t>(ctas) < grid) grid = static_cast<uint32_t>(ctas);
    kernel<<<grid < useful ? grid : useful, threads, bytes, stream>>>(d);
    return failed(cudaGetLastError());
}

}  // namespace
}  // namespace lmc_cuda

using namespace lmc_cuda;

extern "C" int64_t lmc_cuda_codec_decode(int32_t device, const lmc_codec *codec, uint64_t tables,
                                         const int64_t *blobs, const int64_t *lengths, const int64_t *outs,
                                         int64_t count, int32_t first_layer, int32_t layers, int64_t scratch,
                                         int64_t scratch_bytes, int64_t status, int32_t ctas, uint64_t stream) {
    Shape shape;
    if (!shape_of(codec, shape) || count < 0 || first_layer < 0 || layers < 1 || layers > codec->layers - first_layer) {
        return -EINVAL;
    }
    const uint32_t rows = static_cast<uint32_t>(layers) * shape.planes;
    const uint64_t row_bytes = (sizeof(Row) * rows * static_cast<uint64_t>(count) + 255) & ~255ull;
    if (scratch % 16 || scratch_bytes < static_cast<int64_t>(row_bytes + steps_bytes(*codec, rows, count))) return -EINVAL;
    if (codec->profile && !profile_fits(*codec)) return -EINVAL;
    for (int64_t i = 0; i < count; ++i) {
        if (blobs[i] % 16 || outs[i] % 16 || lengths[i] < 0 || lengths[i] > UINT32_MAX) return -EINVAL;
    }
    const OnDevice on(device);
    if (on.error) return on.error;
    const cudaStream_t queue = stream_of(stream);
    if (count) LMC_TRY(cudaMemsetAsync(reinterpret_cast<void *>(status), 0, static_cast<size_t>(count) * 4, queue));
    Decode d{};
    d.shape = shape;
    d.tables = tables;
    d.first_row = static_cast<uint32_t>(first_layer) * shape.planes;
    d.row_count = rows;
    d.groups = divisor(shape.groups());
    d.ranges = divisor((shape.tokens + 255) / 256);
    d.each_rows = divisor(rows);
    if (codec->profile) d.profile = *codec->profile;
    for (int64_t first = 0; first < count; first += MAX_BLOBS) {
        d.count = static_cast<uint32_t>(count - first < MAX_BLOBS ? count - first : MAX_BLOBS);
        for (uint32_t i = 0; i < d.count; ++i) {
            d.blobs[i] = blobs[first + i];
            d.outs[i] = outs[first + i];
            d.lengths[i] = static_cast<uint32_t>(lengths[first + i]);
        }
        d.rows = reinterpret_cast<Row *>(scratch) + first * rows;
        d.steps = reinterpret_cast<int16_t *>(scratch + static_cast<int64_t>(row_bytes + steps_bytes(*codec, rows, first)));
        d.status = reinterpret_cast<int32_t *>(status) + first;
        d.items = d.count * rows * d.ranges.d * d.groups.d;
        open_kernel<<<dim3(rows, d.count), OPEN_THREADS, 0, queue>>>(d);
        LMC_TRY(cudaGetLastError());
        const int64_t bad = shape.dtype == D_BF16 ? launch_decode<WHOLE_ANCHORED>(d, ctas, queue)
                                                  : launch_decode<QUANTISED>(d, ctas, queue);
        if (bad) return bad;
        if (const int64_t worse = launch_decode<EXACTLY>(d, ctas, queue)) return worse;
        if (codec->profile) {
            if (const int64_t worse = launch_decode<TURNED>(d, ctas, queue)) return worse;
            const uint32_t tiles = (shape.tokens + TURN_TOKENS - 1) / TURN_TOKENS * static_cast<uint32_t>(d.profile.blocks);
            turn_kernel<<<dim3(tiles, rows, d.count), TURN_THREADS, 0, queue>>>(d);
            LMC_TRY(cudaGetLastError());
        }
    }
    return 0;
}
