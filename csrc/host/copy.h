// Contiguous copies.
#pragma once

#include <stdint.h>

namespace lmc {

// Bytes moved by one call from which streaming stores win: source and destination no longer fit a core's own cache,
// and a line that is written whole need not be read first. Measured: 1.2-1.9x memcpy from 4 MiB up, slower below 1.
constexpr int64_t STREAM_BYTES = int64_t{4} << 20;

// Copy regions that do not overlap. With `stream`, go around the cache where the CPU can; stream_fence() then
// orders the stores before whatever the thread does next.
void copy_run(void *destination, const void *source, int64_t length, bool stream);
void stream_fence();

// Ask for the first lines of a run that copy_run will stream next: runs in random pages come unforeseen otherwise.
void expect_run(const void *source, int64_t length);

}  // namespace lmc
