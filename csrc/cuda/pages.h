// Index arithmetic of the page copies: for the kernels, for the host that launches them, and for tests without a GPU.
#pragma once

#include <errno.h>
#include <lmcache_cuda.h>

#include "numbers.h"

namespace lmc_cuda {

constexpr int64_t MAX_PARTS = 2;
constexpr int64_t MAX_BASES = 128, MAX_SLOTS = 32, MAX_IDS = 512;
constexpr uint32_t THREADS = 256, UNROLL = 4, TILE = THREADS * UNROLL;

// One loop of a nest. Loops are ordered by their strides in the slot, so that neighbouring threads have neighbouring
// bytes of it: that side may be host memory, seen through a narrow link.
struct Loop {
    Divisor extent;
    int64_t page, slot;
};

struct Nest {
    int64_t block_stride, slot_offset, slot_layer_stride, slot_block_stride;
    Divisor run, block;  // vectors of one run, of one block
    uint32_t vectors;    // of all blocks of one chunk and layer
    uint32_t tiles;
    int32_t ndims;
    Loop dims[LMC_MAX_DIMS];  // innermost first
};

// All that one launch needs, small enough to travel as its parameter.
struct Batch {
    int64_t bases[MAX_BASES];  // [part][layer]
    int64_t slots[MAX_SLOTS];
    int32_t ids[MAX_IDS];  // [chunk][block]
    Nest nests[MAX_PARTS];
    Divisor chunk_tiles, layer_tiles;
    uint32_t tiles, parts, layers, blocks;
    uint32_t width;       // bytes of one vector
    uint32_t first_slot;  // of the whole batch, for the rotation's table
    bool to_slots, rotate;
    lmc_rope rope;
};
static_assert(sizeof(Batch) <= 4096, "what every CUDA version takes as a kernel's parameter");

// A tile: TILE consecutive vectors of one part of one layer of one chunk.
struct Tile {
    const Nest *nest;
    int64_t page, slot;
    const int32_t *ids;
    uint32_t first, chunk, part;
};

LMC_HD Tile tile_at(const Batch &batch, uint32_t tile) {
    uint32_t layer = tile, part = 0;
    uint32_t chunk = divide(tile, batch.chunk_tiles);
    layer -= chunk * batch.chunk_tiles.d;
    uint32_t rest = split(layer, batch.layer_tiles);
    if (rest >= batch.nests[0].tiles) {
        rest -= batch.nests[0].tiles;
        part = 1;
    }
    const Nest &nest = batch.nests[part];
    return {&nest,
            batch.bases[part * batch.layers + layer],
            batch.slots[chunk] + nest.slot_offset + layer * nest.slot_layer_stride,
            batch.ids + chunk * batch.blocks,
            rest * TILE,
            chunk,
            part};
}

struct Vector {
    int64_t page, slot;
    uint32_t in_run;  // which vector of its run
};

// Where vector v of a tile's nest lies; false if there is none, or its block is left out.
LMC_HD bool vector_at(const Tile &tile, uint32_t width, uint32_t v, Vector &out) {
    const Nest &nest = *tile.nest;
    if (v >= nest.vectors) return false;
    const uint32_t block = divide(v, nest.block);
    v -= block * nest.block.d;
    const int32_t id = tile.ids[block];
    if (id < 0) return false;
    out.in_run = split(v, nest.run);
    out.page = tile.page + id * nest.block_stride + int64_t{out.in_run} * width;
    out.slot = tile.slot + block * nest.slot_block_stride + int64_t{out.in_run} * width;
    LMC_UNROLL
    for (int i = 0; i < LMC_MAX_DIMS; ++i) {
        if (i < nest.ndims) {
            const uint32_t at = split(v, nest.dims[i].extent);
            out.page += at * nest.dims[i].page;
            out.slot += at * nest.dims[i].slot;
        }
    }
    return true;
}

// The rotation of 16-byte vectors. For halves (i, i + n / 2), the vector of the lower half brings its partner along.
enum class Role { COPY, PAIRS, LOWER, UPPER };

LMC_HD uint32_t element_size(int32_t dtype) { return dtype == LMC_F32 ? 4 : 2; }

// `first` is the vector's first element in its head.
LMC_HD Role role_at(const lmc_rope &rope, uint32_t in_run, uint32_t &first) {
    const uint32_t each = 16 / element_size(rope.dtype);
    first = in_run * each % rope.head_dims;
    if (first >= static_cast<uint32_t>(rope.rotary_dims)) return Role::COPY;
    if (rope.interleaved) return Role::PAIRS;
    return first < static_cast<uint32_t>(rope.rotary_dims / 2) ? Role::LOWER : Role::UPPER;
}

struct alignas(16) Words {
    uint32_t w[4];
};

template <int32_t DTYPE>
LMC_HD float element(const Words &v, uint32_t i) {
    if (DTYPE == LMC_F32) return float_of(v.w[i]);
    const uint32_t bits = v.w[i / 2] >> i % 2 * 16 & 0xffffu;
    return DTYPE == LMC_BF16 ? Bf16::load(bits) : Fp16::load(bits);
}

template <int32_t DTYPE>
LMC_HD void set_element(Words &v, uint32_t i, float value) {
    if (DTYPE == LMC_F32) {
        v.w[i] = bits_of(value);
    } else {
        const uint32_t bits = DTYPE == LMC_BF16 ? Bf16::store(value) : Fp16::store(value), shift = i % 2 * 16;
        v.w[i / 2] = (v.w[i / 2] & ~(0xffffu << shift)) | bits << shift;
    }
}

template <int32_t DTYPE>
LMC_HD void rotate_pair(const float *turn, Words &a, uint32_t i, Words &b, uint32_t k) {
    // Built without contraction into fused operations: host and device give the same bits.
    const float x = element<DTYPE>(a, i), y = element<DTYPE>(b, k);
    const float xc = x * turn[0], ys = y * turn[1], xs = x * turn[1], yc = y * turn[0];
    set_element<DTYPE>(a, i, xc - ys);
    set_element<DTYPE>(b, k, xs + yc);
}

template <int32_t DTYPE>
LMC_HD void rotate_vectors(const float *turns, bool pairs, uint32_t turning, Words &low, Words &high) {
    constexpr uint32_t EACH = DTYPE == LMC_F32 ? 4 : 8;
    LMC_UNROLL
    for (uint32_t i = 0; i < EACH; ++i) {
        if (!pairs) rotate_pair<DTYPE>(turns + 2 * i, low, i, high, i);
        if (pairs && i % 2 == 0 && i < turning) rotate_pair<DTYPE>(turns + i, low, i, low, i + 1);
    }
}

// `turns`: cos, sin of the chunk. Of role LOWER, `high` is the partner; of role PAIRS it is not looked at.
LMC_HD void rotate(const lmc_rope &rope, const float *turns, Role role, uint32_t first, Words &low, Words &high) {
    const bool pairs = role == Role::PAIRS;
    const uint32_t turning = rope.rotary_dims - first;
    turns += pairs ? first : 2 * first;
    if (rope.dtype == LMC_BF16) rotate_vectors<LMC_BF16>(turns, pairs, turning, low, high);
    if (rope.dtype == LMC_F16) rotate_vectors<LMC_F16>(turns, pairs, turning, low, high);
    if (rope.dtype == LMC_F32) rotate_vectors<LMC_F32>(turns, pairs, turning, low, high);
}

// -- on the host: check a call and cut it into batches --

inline bool merge_once(Nest &nest, int64_t &run, int64_t (&extents)[LMC_MAX_DIMS]) {
    const auto drop = [&](int at) {
        for (int i = at + 1; i < nest.ndims; ++i) {
            nest.dims[i - 1] = nest.dims[i];
            extents[i - 1] = extents[i];
        }
        --nest.ndims;
    };
    for (int i = 0; i < nest.ndims; ++i) {
        const Loop loop = nest.dims[i];
        if (extents[i] == 1 || (loop.page == run && loop.slot == run)) {
            run *= extents[i];
            drop(i);
            return true;
        }
        for (int k = 0; k < nest.ndims; ++k) {
            if (i != k && loop.page == nest.dims[k].page * extents[k] && loop.slot == nest.dims[k].slot * extents[k]) {
                extents[k] *= extents[i];
                drop(i);
                return true;
            }
        }
    }
    return false;
}

inline bool well_formed(const lmc_part &part) {
    if (!part.bases || part.run_bytes < 1 || part.ndims < 0 || part.ndims > LMC_MAX_DIMS) return false;
    for (int64_t i = 0; i < part.ndims; ++i) {
        if (part.extents[i] < 1) return false;
    }
    return true;
}

// The nest of a part in as few loops as can be, and its run in bytes. What addresses are made of is or-ed into
// `alignment`.
inline bool plan_nest(const lmc_part &part, int64_t (&extents)[LMC_MAX_DIMS], int64_t &run, Nest &nest,
                      int64_t &alignment) {
    nest = {};
    nest.block_stride = part.block_stride;
    nest.slot_offset = part.slot_offset;
    nest.slot_layer_stride = part.slot_layer_stride;
    nest.slot_block_stride = part.slot_block_stride;
    nest.ndims = static_cast<int32_t>(part.ndims);
    run = part.run_bytes;
    for (int i = 0; i < nest.ndims; ++i) {
        nest.dims[i] = {{}, part.page_strides[i], part.slot_strides[i]};
        extents[i] = part.extents[i];
    }
    while (merge_once(nest, run, extents)) {
    }
    for (int i = 1; i < nest.ndims; ++i) {  // insertion sort
        for (int k = i; k > 0 && nest.dims[k].slot < nest.dims[k - 1].slot; --k) {
            const Loop loop = nest.dims[k];
            nest.dims[k] = nest.dims[k - 1];
            nest.dims[k - 1] = loop;
            const int64_t extent = extents[k];
            extents[k] = extents[k - 1];
            extents[k - 1] = extent;
        }
    }
    alignment |= run | part.block_stride | part.slot_offset | part.slot_layer_stride | part.slot_block_stride;
    for (int i = 0; i < nest.ndims; ++i) {
        alignment |= nest.dims[i].page | nest.dims[i].slot;
        if (extents[i] >= int64_t{1} << 31) return false;
        nest.dims[i].extent = divisor(static_cast<uint32_t>(extents[i]));
    }
    return true;
}

struct Call {
    const lmc_part *parts;
    int64_t part_count, layers, num_blocks;
    const int64_t *block_ids;
    int64_t chunks, blocks;
    const int64_t *slots;
    bool to_slots, skip_negative;
    const lmc_rope *rope;
};

inline int64_t check(const Call &call) {
    if (call.part_count < 1 || call.part_count > MAX_PARTS || call.layers < 1 || call.blocks < 1 || call.chunks < 0 ||
        call.num_blocks > INT32_MAX) {
        return -EINVAL;
    }
    for (int64_t p = 0; p < call.part_count; ++p) {
        if (!well_formed(call.parts[p])) return -EINVAL;
    }
    for (int64_t i = 0; i < call.chunks * call.blocks; ++i) {
        const int64_t id = call.block_ids[i];
        if (!(call.skip_negative && id == -1) && (id < 0 || id >= call.num_blocks)) return 1 + i;
    }
    if (const lmc_rope *rope = call.rope) {
        if (rope->dtype < LMC_BF16 || rope->dtype > LMC_F32 || rope->head_dims < 1 || rope->rotary_dims < 2 ||
            rope->rotary_dims > rope->head_dims || !rope->table) {
            return -EINVAL;
        }
        const int64_t item = element_size(rope->dtype), whole = rope->interleaved ? 2 * item : 32;
        if (rope->rotary_dims * item % whole || rope->head_dims * item % 16 ||
            call.parts[0].run_bytes % (rope->head_dims * item)) {
            return -EINVAL;
        }
    }
    return 0;
}

// Calls launch(batch) until it returns something else than 0. The call has been checked.
template <typename Launch>
int64_t each_batch(const Call &call, Launch launch) {
    Batch batch{};
    batch.parts = static_cast<uint32_t>(call.part_count);
    batch.to_slots = call.to_slots;
    batch.rotate = call.rope != nullptr;
    if (call.rope) batch.rope = *call.rope;
    int64_t runs[MAX_PARTS], extents[MAX_PARTS][LMC_MAX_DIMS], alignment = 16;
    for (int64_t p = 0; p < call.part_count; ++p) {
        if (!plan_nest(call.parts[p], extents[p], runs[p], batch.nests[p], alignment)) return -EINVAL;
        for (int64_t i = 0; i < call.layers; ++i) alignment |= call.parts[p].bases[i];
    }
    for (int64_t i = 0; i < call.chunks; ++i) alignment |= call.slots[i];
    batch.width = alignment % 16 == 0 ? 16 : alignment % 4 == 0 ? 4 : 1;
    if (batch.rotate && batch.width != 16) return -EINVAL;

    const auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    const int64_t most_layers = least(call.layers, MAX_BASES / call.part_count);
    const int64_t most_blocks = least(call.blocks, MAX_IDS);
    const int64_t most_chunks = least(least(call.chunks, MAX_SLOTS), MAX_IDS / most_blocks);
    for (int64_t p = 0; p < call.part_count; ++p) {
        int64_t vectors = runs[p] / batch.width;
        if (vectors >= int64_t{1} << 31) return -EINVAL;
        batch.nests[p].run = divisor(static_cast<uint32_t>(vectors));
        for (int i = 0; i < batch.nests[p].ndims; ++i) vectors *= extents[p][i];
        // Tiles of a launch are counted in 31 bits.
        if (vectors * most_blocks >= int64_t{1} << 31 ||
            (vectors * most_blocks / TILE + 1) * most_layers * most_chunks >= 1 << 29) {
            return -EINVAL;
        }
        batch.nests[p].block = divisor(static_cast<uint32_t>(vectors));
    }
    for (int64_t layer = 0; layer < call.layers; layer += most_layers) {
        batch.layers = static_cast<uint32_t>(least(most_layers, call.layers - layer));
        for (int64_t block = 0; block < call.blocks; block += most_blocks) {
            batch.blocks = static_cast<uint32_t>(least(most_blocks, call.blocks - block));
            uint32_t layer_tiles = 0;
            for (int64_t p = 0; p < call.part_count; ++p) {
                Nest &nest = batch.nests[p];
                nest.slot_offset = call.parts[p].slot_offset + layer * nest.slot_layer_stride +
                                   block * nest.slot_block_stride;
                nest.vectors = nest.block.d * batch.blocks;
                nest.tiles = (nest.vectors + TILE - 1) / TILE;
                layer_tiles += nest.tiles;
                for (uint32_t i = 0; i < batch.layers; ++i) {
                    batch.bases[p * batch.layers + i] = call.parts[p].bases[layer + i];
                }
            }
            batch.layer_tiles = divisor(layer_tiles);
            batch.chunk_tiles = divisor(layer_tiles * batch.layers);
            for (int64_t chunk = 0; chunk < call.chunks; chunk += most_chunks) {
                const int64_t chunks = least(most_chunks, call.chunks - chunk);
                batch.first_slot = static_cast<uint32_t>(chunk);
                batch.tiles = batch.chunk_tiles.d * static_cast<uint32_t>(chunks);
                for (int64_t c = 0; c < chunks; ++c) {
                    batch.slots[c] = call.slots[chunk + c];
                    for (uint32_t b = 0; b < batch.blocks; ++b) {
                        const int64_t id = call.block_ids[(chunk + c) * call.blocks + block + b];
                        batch.ids[c * batch.blocks + b] = static_cast<int32_t>(id);
                    }
                }
                if (const int64_t result = launch(batch)) return result;
            }
        }
    }
    return 0;
}

}  // namespace lmc_cuda
