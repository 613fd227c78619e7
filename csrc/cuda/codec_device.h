// What the codec's kernels share.
#pragma once

#include <cuda_bf16.h>

#include "codec_encode.h"
#include "runtime.h"

namespace lmc_cuda {

constexpr int64_t MAX_BLOBS = 64;  // of one launch

static __device__ const Models DEVICE_MODELS = make_models();

// The shape as the kernels have it; false if it cannot be coded, or is too large.
inline bool shape_of(const lmc_codec *given, Shape &shape) {
    shape = {given->dtype, static_cast<uint32_t>(given->layers), static_cast<uint32_t>(given->planes),
             static_cast<uint32_t>(given->tokens), static_cast<uint32_t>(given->channels)};
    if (given->dtype < D_BF16 || given->dtype > D_E5M2 || given->layers < 1 || given->layers > 1024 ||
        given->planes < 1 || given->planes > 2 || given->tokens < 1 || given->tokens > int32_t{MAX_TOKENS} ||
        given->channels < 1 || given->channels > 16384) {
        return false;
    }
    const uint64_t row = 16 + ((uint64_t{shape.row_bytes()} + 15) & ~15ull);
    return shape.rows_at() + shape.rows() * row < uint64_t{1} << 32;
}

// Whether a profile, its arrays in device memory, fits the shape.
inline bool profile_fits(const lmc_codec &codec) {
    const lmc_codec_profile &p = *codec.profile;
    return p.number && codec.dtype <= D_FP32 && codec.planes == 2 && p.block >= 1 && p.block <= 256 && p.blocks >= 1 &&
           int64_t{p.blocks} * p.block == codec.channels && (p.blocks == 1 || p.block % int32_t{GROUP} == 0) &&
           p.heads >= 1 && codec.channels % p.heads == 0 && p.block % (codec.channels / p.heads) == 0 && p.pairs >= 0 &&
           p.pairs <= codec.channels / p.heads / 2;
}

// Scratch memory for the components of `count` chunks of `rows` rows.
inline uint64_t steps_bytes(const lmc_codec &codec, uint64_t rows, int64_t count) {
    if (!codec.profile) return 0;
    return rows * static_cast<uint64_t>(count) * codec.tokens * 2 * ((codec.channels + GROUP - 1) / GROUP * GROUP);
}

// The models of one kind in shared memory: symbols of all slots, then what is known of each symbol.
constexpr uint32_t coder_bytes(bool exact) {
    constexpr Models models = make_models();
    return exact ? LOSSLESS * SLOTS + 4 * (models.first[MODELS] - models.first[LOSSY])
                 : LOSSY * SLOTS + 4 * models.first[LOSSY];
}

static __device__ Coder load_coder(uint8_t *memory, bool exact) {
    const uint32_t origin = exact ? LOSSY : 0, count = exact ? LOSSLESS : LOSSY;
    const uint32_t first = DEVICE_MODELS.first[origin], last = DEVICE_MODELS.first[origin + count];
    auto *fc = reinterpret_cast<uint32_t *>(memory + count * SLOTS);
    const uint32_t warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
    uint32_t model = 0;
    for (uint32_t s = first + warp; s < last; s += warps) {
        while (DEVICE_MODELS.first[origin + model + 1] <= s) ++model;
        const uint32_t f = DEVICE_MODELS.fc[s];
        uint8_t *const slots = memory + model * SLOTS + (f >> 16);
        const auto symbol = static_cast<uint8_t>(s - DEVICE_MODELS.first[origin + model]);
        for (uint32_t i = threadIdx.x % LANES; i < (f & 0xfff); i += LANES) slots[i] = symbol;
        if (threadIdx.x % LANES == 0) fc[s - first] = f;
    }
    __syncthreads();
    return {memory, fc, &DEVICE_MODELS};
}

static __device__ __forceinline__ uint64_t warp_sum(uint64_t value) {
    for (uint32_t step = LANES / 2; step; step /= 2) value += __shfl_down_sync(~0u, value, step);
    return value;
}

// Sum over the block, for every thread. Blocks are whole warps.
static __device__ uint64_t block_sum(uint64_t value) {
    __shared__ uint64_t parts[LANES];
    __syncthreads();
    value = warp_sum(value);
    if (threadIdx.x % LANES == 0) parts[threadIdx.x / LANES] = value;
    __syncthreads();
    uint64_t sum = 0;
    for (uint32_t i = 0; i < blockDim.x / LANES; ++i) sum += parts[i];
    return sum;
}

// The check of `bytes` bytes, a multiple of 4, by the block; their first word is number `first`.
static __device__ uint64_t block_check(const uint8_t *data, uint32_t bytes, uint32_t first) {
    const auto *words = reinterpret_cast<const uint32_t *>(data);
    uint64_t plain = 0, weighted = 0;
#pragma unroll 8
    for (uint32_t i = threadIdx.x; i < bytes / 4; i += blockDim.x) {
        const uint32_t word = words[i];
        plain += word;
        weighted += uint64_t{first + i + 1} * word;
    }
    return block_sum(plain + weighted * WEIGHT);
}

static __device__ void copy_bytes(uint8_t *to, const uint8_t *from, uint32_t bytes, uint32_t thread, uint32_t threads) {
    uint32_t done = 0;
    if (((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) & 15) == 0) {
        for (uint32_t i = thread; i < bytes / 16; i += threads) {
            reinterpret_cast<uint4 *>(to)[i] = reinterpret_cast<const uint4 *>(from)[i];
        }
        done = bytes & ~15u;
    }
    for (uint32_t i = done + thread; i < bytes; i += threads) to[i] = from[i];
}

}  // namespace lmc_cuda
