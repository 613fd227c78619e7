// A nest of strided runs: what one plane of one block is, seen from source and destination.
#pragma once

#include <lmcache_host.h>

namespace lmc {

struct Loop {
    int64_t extent, to, from;  // to, from: strides in bytes
};

struct Nest;

// Copies the three innermost loops of a nest. With `stream`, destination lines that are written whole bypass the cache.
using Kernel = void (*)(const Nest &nest, char *to, const char *from, bool stream);

// The fewest, longest loops that make a copy; those of the destination's longest strides outermost.
struct Nest {
    int64_t run;  // contiguous bytes at the bottom
    int ndims;
    Loop dims[LMC_MAX_DIMS];  // outermost first, without the loops of the kernel

    // to[w * w.to + v * v.to + u * u.to] = from[w * w.from + v * v.from + u * u.from], `run` bytes.
    // Either u has one step (rows), or u.to == v.from == run (a transposition of elements of 2 or 4 bytes).
    Loop w, v, u;
    Kernel kernel;
};

Nest plan_nest(const lmc_part &part, bool to_slots);

void copy_nest(const Nest &nest, char *to, const char *from, bool stream);

// The fastest kernel for the nest on this CPU.
Kernel pick_row_kernel(const Nest &nest);
Kernel pick_transpose_kernel(const Nest &nest);

}  // namespace lmc
