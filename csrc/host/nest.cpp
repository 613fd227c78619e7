#include "nest.h"

#include <string.h>

#include "copy.h"
#include "transpose.h"

namespace lmc {
namespace {

void drop(Nest &nest, int at) {
    for (int i = at + 1; i < nest.ndims; ++i) nest.dims[i - 1] = nest.dims[i];
    --nest.ndims;
}

// Take one loop into the run, or two loops into one, if any can be.
bool merge_once(Nest &nest) {
    for (int i = 0; i < nest.ndims; ++i) {
        const Loop &loop = nest.dims[i];
        if (loop.extent == 1 || (loop.to == nest.run && loop.from == nest.run)) {
            nest.run *= loop.extent;
            drop(nest, i);
            return true;
        }
    }
    for (int i = 0; i < nest.ndims; ++i) {
        for (int k = 0; k < nest.ndims; ++k) {
            const Loop &outer = nest.dims[i];
            Loop &inner = nest.dims[k];
            if (i != k && outer.to == inner.to * inner.extent && outer.from == inner.from * inner.extent) {
                inner.extent *= outer.extent;
                drop(nest, i);
                return true;
            }
        }
    }
    return false;
}

// Rows of `run` bytes over the innermost loop; RUN is that length where it is known at compile time.
template <int64_t RUN>
void copy_rows(const Loop &loop, int64_t run, char *to, const char *from) {
    const size_t bytes = static_cast<size_t>(RUN ? RUN : run);
    for (int64_t i = 0; i < loop.extent; ++i, to += loop.to, from += loop.from) memcpy(to, from, bytes);
}

void copy_innermost(const Nest &nest, char *to, const char *from, bool stream) {
    if (nest.transpose) {
        nest.transpose(nest, to, from, stream);
        return;
    }
    if (nest.ndims == 0) {
        copy_run(to, from, nest.run, stream);
        return;
    }
    const Loop &loop = nest.dims[nest.ndims - 1];
    if (stream && stream_rows(loop, nest.run, to, from)) return;
    switch (nest.run) {
        case 1: copy_rows<1>(loop, 1, to, from); break;
        case 2: copy_rows<2>(loop, 2, to, from); break;
        case 4: copy_rows<4>(loop, 4, to, from); break;
        case 8: copy_rows<8>(loop, 8, to, from); break;
        case 64: copy_rows<64>(loop, 64, to, from); break;
        case 128: copy_rows<128>(loop, 128, to, from); break;
        case 256: copy_rows<256>(loop, 256, to, from); break;
        default: copy_rows<0>(loop, nest.run, to, from);
    }
}

}  // namespace

Nest plan_nest(const lmc_part &part, bool to_slots) {
    Nest nest{};
    nest.run = part.run_bytes;
    nest.ndims = static_cast<int>(part.ndims);
    for (int i = 0; i < nest.ndims; ++i) {
        const int64_t page = part.page_strides[i], slot = part.slot_strides[i];
        nest.dims[i] = {part.extents[i], to_slots ? slot : page, to_slots ? page : slot};
    }
    while (merge_once(nest)) {
    }
    for (int i = 1; i < nest.ndims; ++i) {  // insertion sort, longest destination stride first
        for (int k = i; k > 0 && (to_slots ? nest.dims[k].to > nest.dims[k - 1].to : nest.dims[k].from > nest.dims[k - 1].from); --k) {
            const Loop swap = nest.dims[k];
            nest.dims[k] = nest.dims[k - 1];
            nest.dims[k - 1] = swap;
        }
    }
    if (nest.run == 2 || nest.run == 4) {
        int u = -1, v = -1;
        for (int i = 0; i < nest.ndims; ++i) {
            if (nest.dims[i].to == nest.run) u = i;
            if (nest.dims[i].from == nest.run) v = i;
        }
        if (u >= 0 && v >= 0) {
            nest.u = nest.dims[u];
            nest.v = nest.dims[v];
            drop(nest, u > v ? u : v);
            drop(nest, u > v ? v : u);
            nest.w = {1, 0, 0};
            if (nest.ndims > 0) nest.w = nest.dims[--nest.ndims];
            nest.transpose = pick_transpose(nest);
        }
    }
    return nest;
}

void copy_nest(const Nest &nest, char *to, const char *from, bool stream) {
    // The innermost loop belongs to the row kernels; a transposition has taken its own loops out.
    const int outer = nest.transpose || nest.ndims == 0 ? nest.ndims : nest.ndims - 1;
    int64_t at[LMC_MAX_DIMS] = {};
    for (;;) {
        copy_innermost(nest, to, from, stream);
        int i = outer - 1;
        for (; i >= 0; --i) {
            const Loop &loop = nest.dims[i];
            to += loop.to;
            from += loop.from;
            if (++at[i] < loop.extent) break;
            at[i] = 0;
            to -= loop.extent * loop.to;
            from -= loop.extent * loop.from;
        }
        if (i < 0) return;
    }
}

}  // namespace lmc
