// The kernels' arithmetic, compiled for the host: threads and warps are loops. Built by the tests with any C++17
// compiler, so that everything of a kernel but its launch is tested where there is no GPU.
#include <algorithm>

#include "../csrc/cuda/pages.h"
#include "codec_emulation.h"

using namespace lmc_cuda;

namespace {

Words load(int64_t at) {
    Words words;
    memcpy(&words, reinterpret_cast<void *>(at), 16);
    return words;
}

void copy(const Batch &b, int64_t page, int64_t slot) {
    memcpy(reinterpret_cast<void *>(b.to_slots ? slot : page), reinterpret_cast<void *>(b.to_slots ? page : slot),
           b.width);
}

void copy_rotated(const Batch &b, const Tile &tile, const Vector &v) {
    uint32_t first;
    const Role role = role_at(b.rope, v.in_run, first);
    if (tile.part != 0 || role == Role::COPY) return copy(b, v.page, v.slot);
    if (role == Role::UPPER) return;
    const int64_t half = b.rope.rotary_dims / 2 * element_size(b.rope.dtype);
    const auto *turns = reinterpret_cast<const float *>(b.rope.table) + (b.first_slot + tile.chunk) * b.rope.rotary_dims;
    const int64_t from = b.to_slots ? v.page : v.slot, to = b.to_slots ? v.slot : v.page;
    Words low = load(from), high = role == Role::LOWER ? load(from + half) : Words{};
    rotate(b.rope, turns, role, first, low, high);
    memcpy(reinterpret_cast<void *>(to), &low, 16);
    if (role == Role::LOWER) memcpy(reinterpret_cast<void *>(to + half), &high, 16);
}

}  // namespace

extern "C" int64_t emulate_copy_pages(const lmc_part *parts, int64_t part_count, int64_t layers, int64_t num_blocks,
                                      const int64_t *block_ids, int64_t chunks, int64_t blocks, const int64_t *slots,
                                      int32_t to_slots, int32_t skip_negative, const lmc_rope *rope) {
    const Call call = {parts,          part_count, layers, num_blocks,    block_ids, chunks, blocks, slots,
                       to_slots != 0, skip_negative != 0, rope};
    if (const int64_t refused = check(call)) return refused;
    return each_batch(call, [](const Batch &b) {
        for (uint32_t t = 0; t < b.tiles; ++t) {
            const Tile tile = tile_at(b, t);
            for (uint32_t i = 0; i < TILE; ++i) {
                Vector v;
                if (!vector_at(tile, b.width, tile.first + i, v)) continue;
                if (b.rotate) {
                    copy_rotated(b, tile, v);
                } else {
                    copy(b, v.page, v.slot);
                }
            }
        }
        return int64_t{0};
    });
}

extern "C" int64_t emulate_divide(uint32_t n, uint32_t d) { return divide(n, divisor(d)); }
extern "C" void emulate_loads(int32_t dtype, const uint32_t *bits, int64_t count, float *out) {
    for (int64_t i = 0; i < count; ++i) out[i] = load_element(bits[i], dtype);
}
extern "C" void emulate_stores(int32_t dtype, const float *values, int64_t count, uint32_t *out) {
    for (int64_t i = 0; i < count; ++i) out[i] = store_element(values[i], dtype);
}

static Shape shape_of(const int32_t *n) {
    return {n[0], static_cast<uint32_t>(n[1]), static_cast<uint32_t>(n[2]), static_cast<uint32_t>(n[3]),
            static_cast<uint32_t>(n[4])};
}

extern "C" int32_t emulate_decode(const uint8_t *blob, uint64_t length, const int32_t *shape, uint64_t tables,
                                  const lmc_codec_profile *profile, uint8_t *out) {
    return decode(blob, length, shape_of(shape), tables, profile, out);
}
extern "C" int64_t emulate_encode(const uint8_t *chunk, const int32_t *shape, uint64_t tables,
                                  const lmc_codec_profile *profile, uint64_t start, const uint8_t *modes, const int16_t *offsets, int32_t n_raw, uint32_t tile_tokens, uint8_t level,
                                  uint8_t *out) {
    return encode(chunk, shape_of(shape), tables, profile, start, modes, offsets, n_raw, tile_tokens, level, out);
}
