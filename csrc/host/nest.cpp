#include "nest.h"

namespace lmc {
namespace {

constexpr Loop ONCE = {1, 0, 0};

Loop take(Nest &nest, int at) {
    const Loop taken = nest.dims[at];
    for (int i = at + 1; i < nest.ndims; ++i) nest.dims[i - 1] = nest.dims[i];
    --nest.ndims;
    return taken;
}

Loop take_innermost(Nest &nest) { return nest.ndims > 0 ? take(nest, nest.ndims - 1) : ONCE; }

// Make one loop part of the run, or two loops one, if any can be.
bool merge_once(Nest &nest) {
    for (int i = 0; i < nest.ndims; ++i) {
        const Loop &loop = nest.dims[i];
        if (loop.extent == 1 || (loop.to == nest.run && loop.from == nest.run)) {
            nest.run *= take(nest, i).extent;
            return true;
        }
    }
    for (int i = 0; i < nest.ndims; ++i) {
        for (int k = 0; k < nest.ndims; ++k) {
            const Loop &outer = nest.dims[i];
            Loop &inner = nest.dims[k];
            if (i != k && outer.to == inner.to * inner.extent && outer.from == inner.from * inner.extent) {
                inner.extent *= outer.extent;
                take(nest, i);
                return true;
            }
        }
    }
    return false;
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
    for (int i = 1; i < nest.ndims; ++i) {  // insertion sort
        for (int k = i; k > 0 && nest.dims[k].to > nest.dims[k - 1].to; --k) {
            const Loop swap = nest.dims[k];
            nest.dims[k] = nest.dims[k - 1];
            nest.dims[k - 1] = swap;
        }
    }
    // A loop that is contiguous in the destination has come to be the last.
    int v = nest.ndims - 2;
    while (v >= 0 && nest.dims[v].from != nest.run) --v;
    if ((nest.run == 2 || nest.run == 4) && v >= 0 && nest.dims[nest.ndims - 1].to == nest.run) {
        nest.u = take_innermost(nest);
        nest.v = take(nest, v);
        nest.w = take_innermost(nest);
        nest.kernel = pick_transpose_kernel(nest);
    } else {
        nest.u = ONCE;
        nest.v = take_innermost(nest);
        nest.w = take_innermost(nest);
        nest.kernel = pick_row_kernel(nest);
    }
    return nest;
}

void copy_nest(const Nest &nest, char *to, const char *from, bool stream) {
    int64_t at[LMC_MAX_DIMS] = {};
    for (;;) {
        nest.kernel(nest, to, from, stream);
        int i = nest.ndims - 1;
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
