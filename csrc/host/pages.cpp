// Engine pages <-> slots, a whole batch of chunks in one call.
#include <errno.h>

#include "copy.h"
#include "nest.h"
#include "parallel.h"

namespace {

constexpr int64_t MAX_PARTS = 8;

bool well_formed(const lmc_part &part) {
    if (!part.bases || part.run_bytes < 1 || part.ndims < 0 || part.ndims > LMC_MAX_DIMS) return false;
    for (int64_t i = 0; i < part.ndims; ++i) {
        if (part.extents[i] < 1) return false;
    }
    return true;
}

int64_t nest_bytes(const lmc_part &part) {
    int64_t bytes = part.run_bytes;
    for (int64_t i = 0; i < part.ndims; ++i) bytes *= part.extents[i];
    return bytes;
}

}  // namespace

extern "C" int64_t lmc_copy_pages(const lmc_part *parts, int64_t part_count, int64_t layers, int64_t num_blocks,
                                  const int64_t *block_ids, int64_t chunks, int64_t blocks, const int64_t *slots,
                                  int32_t to_slots, int32_t skip_negative, int32_t threads) {
    if (part_count < 1 || part_count > MAX_PARTS || layers < 1 || blocks < 1 || chunks < 0) return -EINVAL;
    lmc::Nest nests[MAX_PARTS];
    int64_t total = 0;
    for (int64_t p = 0; p < part_count; ++p) {
        if (!well_formed(parts[p])) return -EINVAL;
        nests[p] = lmc::plan_nest(parts[p], to_slots);
        total += nest_bytes(parts[p]) * layers * blocks * chunks;
    }
    for (int64_t i = 0; i < chunks * blocks; ++i) {
        const bool skipped = skip_negative && block_ids[i] == -1;
        if (!skipped && (block_ids[i] < 0 || block_ids[i] >= num_blocks)) return 1 + i;
    }
    const bool stream = total >= lmc::STREAM_BYTES;
    lmc::parallel_ranges(chunks * layers, stream ? threads : 1, [&](int64_t begin, int64_t end) {
        for (int64_t item = begin; item < end; ++item) {
            const int64_t chunk = item / layers, layer = item % layers;
            for (int64_t p = 0; p < part_count; ++p) {
                const lmc_part &part = parts[p];
                const int64_t slot = slots[chunk] + part.slot_offset + layer * part.slot_layer_stride;
                for (int64_t b = 0; b < blocks; ++b) {
                    const int64_t id = block_ids[chunk * blocks + b];
                    if (id < 0) continue;
                    const int64_t next = stream && to_slots && b + 1 < blocks ? block_ids[chunk * blocks + b + 1] : -1;
                    if (next >= 0) {
                        lmc::expect_run(reinterpret_cast<char *>(part.bases[layer] + next * part.block_stride),
                                        nests[p].run);
                    }
                    auto *in_page = reinterpret_cast<char *>(part.bases[layer] + id * part.block_stride);
                    auto *in_slot = reinterpret_cast<char *>(slot + b * part.slot_block_stride);
                    lmc::copy_nest(nests[p], to_slots ? in_slot : in_page, to_slots ? in_page : in_slot, stream);
                }
            }
        }
        if (stream) lmc::stream_fence();
    });
    return 0;
}
