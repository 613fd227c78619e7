// A nest of strided runs: what one plane of one block is, seen from source and destination.
#pragma once

#include <lmcache_host.h>

namespace lmc {

struct Loop {
    int64_t extent, to, from;  // to, from: strides in bytes
};

struct Nest;

// The three innermost loops of a nest that transposes.
using Transpose = void (*)(const Nest &nest, char *to, const char *from, bool stream);

// dims[0] is the outermost loop; the destination is walked in ascending order.
struct Nest {
    int64_t run;  // contiguous bytes at the bottom
    int ndims;
    Loop dims[LMC_MAX_DIMS];

    // Elements of 2 or 4 bytes (`run`) whose two innermost loops transpose:
    // to[w * w.to + v * v.to + u * run] = from[w * w.from + u * u.from + v * run]. These loops are not in `dims`.
    Transpose transpose;  // null where nothing transposes
    Loop w, v, u;
};

// The fewest, longest loops that make the same copy.
Nest plan_nest(const lmc_part &part, bool to_slots);

// Copy one nest. With `stream`, destination lines that are written whole bypass the cache.
void copy_nest(const Nest &nest, char *to, const char *from, bool stream);

}  // namespace lmc
