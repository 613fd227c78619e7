// Contiguous copies.
#pragma once

#include <stdint.h>

namespace lmc {

// memcpy of `length` bytes that may bypass the cache on the way out; regions must not overlap.
void copy_run(void *destination, const void *source, int64_t length);

}  // namespace lmc
