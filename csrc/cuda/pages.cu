// Engine pages <-> slots on the device.
#include "pages.h"

#include <stdlib.h>

#include "runtime.h"

namespace lmc_cuda {
namespace {

template <typename V>
__device__ __forceinline__ V load(int64_t at) {
    return __ldcs(reinterpret_cast<const V *>(at));
}

template <typename V>
__device__ __forceinline__ void store(int64_t at, V value) {
    __stcs(reinterpret_cast<V *>(at), value);
}

// Bytes pass through once: loads and stores are marked so, and all loads of a thread are on their way before its
// first store.
template <typename V>
__global__ void __launch_bounds__(THREADS) copy_kernel(const __grid_constant__ Batch batch) {
    for (uint32_t t = blockIdx.x; t < batch.tiles; t += gridDim.x) {
        const Tile tile = tile_at(batch, t);
        V values[UNROLL];
        int64_t to[UNROLL];
#pragma unroll
        for (uint32_t u = 0; u < UNROLL; ++u) {
            Vector v;
            to[u] = 0;
            if (vector_at(tile, sizeof(V), tile.first + u * THREADS + threadIdx.x, v)) {
                to[u] = batch.to_slots ? v.slot : v.page;
                values[u] = load<V>(batch.to_slots ? v.page : v.slot);
            }
        }
#pragma unroll
        for (uint32_t u = 0; u < UNROLL; ++u) {
            if (to[u]) store(to[u], values[u]);
        }
    }
}

__device__ __forceinline__ Words words_at(int64_t at) {
    const uint4 v = load<uint4>(at);
    return {{v.x, v.y, v.z, v.w}};
}

__device__ __forceinline__ void put_words(int64_t at, const Words &v) {
    store(at, make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]));
}

__global__ void __launch_bounds__(THREADS) rotate_kernel(const __grid_constant__ Batch batch) {
    const lmc_rope &rope = batch.rope;
    const int64_t half = rope.rotary_dims / 2 * element_size(rope.dtype);
    for (uint32_t t = blockIdx.x; t < batch.tiles; t += gridDim.x) {
        const Tile tile = tile_at(batch, t);
        const auto *turns = reinterpret_cast<const float *>(rope.table) +
                            static_cast<int64_t>(batch.first_slot + tile.chunk) * rope.rotary_dims;
#pragma unroll 1
        for (uint32_t u = 0; u < UNROLL; ++u) {
            Vector v;
            if (!vector_at(tile, 16, tile.first + u * THREADS + threadIdx.x, v)) continue;
            const int64_t from = batch.to_slots ? v.page : v.slot, to = batch.to_slots ? v.slot : v.page;
            uint32_t first = 0;
            const Role role = tile.part == 0 ? role_at(rope, v.in_run, first) : Role::COPY;
            if (role == Role::UPPER) continue;
            Words low = words_at(from), high = {};
            if (role == Role::LOWER) high = words_at(from + half);
            if (role != Role::COPY) rotate(rope, turns, role, first, low, high);
            put_words(to, low);
            if (role == Role::LOWER) put_words(to + half, high);
        }
    }
}

int64_t launch(const Batch &batch, int32_t ctas, cudaStream_t stream) {
    const uint32_t most = ctas > 0 ? static_cast<uint32_t>(ctas) : batch.tiles;
    const uint32_t grid = most < batch.tiles ? most : batch.tiles;
    if (batch.rotate) {
        rotate_kernel<<<grid, THREADS, 0, stream>>>(batch);
    } else if (batch.width == 16) {
        copy_kernel<uint4><<<grid, THREADS, 0, stream>>>(batch);
    } else if (batch.width == 4) {
        copy_kernel<uint32_t><<<grid, THREADS, 0, stream>>>(batch);
    } else {
        copy_kernel<uint8_t><<<grid, THREADS, 0, stream>>>(batch);
    }
    return failed(cudaGetLastError());
}

// The copy engine needs no kernel: every run is a copy of its own.
int64_t copy_runs(const Call &call, cudaStream_t stream) {
    constexpr int64_t ROOM = 1024;
    int64_t to[ROOM], from[ROOM], lengths[ROOM], count = 0;
    return each_batch(call, [&](const Batch &batch) -> int64_t {
        for (uint32_t t = 0; t < batch.tiles;) {
            const Tile tile = tile_at(batch, t);
            const Nest &nest = *tile.nest;
            for (uint32_t v = 0; v < nest.vectors; v += nest.run.d) {
                Vector at;
                if (!vector_at(tile, batch.width, v, at)) continue;
                to[count] = batch.to_slots ? at.slot : at.page;
                from[count] = batch.to_slots ? at.page : at.slot;
                lengths[count] = static_cast<int64_t>(nest.run.d) * batch.width;
                if (++count == ROOM) {
                    if (const int64_t bad = copy_batch(to, from, lengths, count, stream)) return bad;
                    count = 0;
                }
            }
            t += nest.tiles;
        }
        const int64_t rest = count;
        count = 0;
        return copy_batch(to, from, lengths, rest, stream);
    });
}

constexpr int64_t MAX_PLACES = 16;

struct Ring {
    int64_t staging, place_bytes, places;
    cudaStream_t engine;
    cudaEvent_t filled[MAX_PLACES], freed[MAX_PLACES];
};

void destroy(Ring *ring) {
    for (int64_t i = 0; i < ring->places; ++i) {
        if (ring->filled[i]) cudaEventDestroy(ring->filled[i]);
        if (ring->freed[i]) cudaEventDestroy(ring->freed[i]);
    }
    if (ring->engine) cudaStreamDestroy(ring->engine);
    free(ring);
}

// A few chunks at a time through the places of the ring: while the copy engine works on one, the kernel works on the
// next. The caller's stream waits for all of it.
int64_t copy_staged(Call call, const Ring &ring, int64_t slot_bytes, int32_t ctas, cudaStream_t stream) {
    const int64_t fit = slot_bytes > 0 ? ring.place_bytes / slot_bytes : 0;
    const int64_t group = fit < MAX_SLOTS ? fit : MAX_SLOTS;
    if (group < 1) return -EINVAL;
    const int64_t *const slots = call.slots, *const ids = call.block_ids, chunks = call.chunks;
    int64_t staged[MAX_SLOTS], lengths[MAX_SLOTS];
    lmc_rope rope{};
    const int64_t table = call.rope ? call.rope->table : 0;
    if (call.rope) {
        rope = *call.rope;
        call.rope = &rope;
    }
    // The engine starts after what the caller queued, and after the last copy through each place.
    LMC_TRY(cudaEventRecord(ring.filled[0], stream));
    LMC_TRY(cudaStreamWaitEvent(ring.engine, ring.filled[0], 0));
    for (int64_t first = 0, turn = 0; first < chunks; first += group, ++turn) {
        const int64_t place = turn % ring.places;
        call.chunks = chunks - first < group ? chunks - first : group;
        call.block_ids = ids + first * call.blocks;
        call.slots = staged;
        rope.table = table + first * rope.rotary_dims * static_cast<int64_t>(sizeof(float));
        for (int64_t i = 0; i < call.chunks; ++i) {
            staged[i] = ring.staging + place * ring.place_bytes + i * slot_bytes;
            lengths[i] = slot_bytes;
        }
        const auto kernels = [&] { return each_batch(call, [&](const Batch &b) { return launch(b, ctas, stream); }); };
        const cudaStream_t before = call.to_slots ? stream : ring.engine, after = call.to_slots ? ring.engine : stream;
        if (turn >= ring.places) LMC_TRY(cudaStreamWaitEvent(before, ring.freed[place], 0));
        const int64_t start = call.to_slots ? kernels() : copy_batch(staged, slots + first, lengths, call.chunks, before);
        if (start) return start;
        LMC_TRY(cudaEventRecord(ring.filled[place], before));
        LMC_TRY(cudaStreamWaitEvent(after, ring.filled[place], 0));
        const int64_t end = call.to_slots ? copy_batch(slots + first, staged, lengths, call.chunks, after) : kernels();
        if (end) return end;
        LMC_TRY(cudaEventRecord(ring.freed[place], after));
    }
    if (call.to_slots && chunks) {
        const int64_t last = ((chunks + group - 1) / group - 1) % ring.places;
        LMC_TRY(cudaStreamWaitEvent(stream, ring.freed[last], 0));
    }
    return 0;
}

}  // namespace
}  // namespace lmc_cuda

using namespace lmc_cuda;

extern "C" {

int64_t lmc_cuda_ring_create(int32_t device, int64_t staging, int64_t bytes, int64_t places, uint64_t *out) {
    if (places < 2 || places > MAX_PLACES || bytes < places) return -EINVAL;
    const OnDevice on(device);
    if (on.error) return on.error;
    auto *ring = static_cast<Ring *>(calloc(1, sizeof(Ring)));
    if (!ring) return -ENOMEM;
    ring->staging = staging;
    ring->place_bytes = bytes / places & ~int64_t{255};
    ring->places = places;
    cudaError_t error = cudaStreamCreateWithFlags(&ring->engine, cudaStreamNonBlocking);
    for (int64_t i = 0; i < places && error == cudaSuccess; ++i) {
        error = cudaEventCreateWithFlags(&ring->filled[i], cudaEventDisableTiming);
        if (error == cudaSuccess) error = cudaEventCreateWithFlags(&ring->freed[i], cudaEventDisableTiming);
    }
    if (error != cudaSuccess) {
        destroy(ring);
        return failed(error);
    }
    *out = reinterpret_cast<uint64_t>(ring);
    return 0;
}

int64_t lmc_cuda_ring_destroy(uint64_t ring) {
    destroy(reinterpret_cast<Ring *>(ring));
    return failed(cudaGetLastError());
}

int64_t lmc_cuda_copy_pages(const lmc_part *parts, int64_t part_count, int64_t layers, int64_t num_blocks,
                            const int64_t *block_ids, int64_t chunks, int64_t blocks, const int64_t *slots,
                            int32_t to_slots, int32_t skip_negative, const lmc_cuda_how *how) {
    const Call call = {parts, part_count, layers,        num_blocks,         block_ids, chunks, blocks,
                       slots, to_slots != 0, skip_negative != 0, how->rope};
    if (const int64_t refused = check(call)) return refused;
    const OnDevice on(how->device);
    if (on.error) return on.error;
    const cudaStream_t stream = stream_of(how->stream);
    if (how->path == LMC_ENGINE) return call.rope ? -EINVAL : copy_runs(call, stream);
    if (how->path == LMC_STAGED) {
        if (!how->ring) return -EINVAL;
        return copy_staged(call, *reinterpret_cast<const Ring *>(how->ring), how->slot_bytes, how->ctas, stream);
    }
    if (how->path != LMC_KERNEL) return -EINVAL;
    const int64_t unreachable = lmc_cuda_unreachable(how->device, slots, chunks);
    if (unreachable) return unreachable < 0 ? unreachable : -EFAULT;
    return each_batch(call, [&](const Batch &batch) { return launch(batch, how->ctas, stream); });
}

}  // extern "C"
