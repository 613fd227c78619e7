// The kernels at the bottom of a nest.
#pragma once

#include "nest.h"

namespace lmc {

// The fastest kernel for the transposition of nest.u and nest.v (see Nest), elements of 2 or 4 bytes.
Transpose pick_transpose(const Nest &nest);

// Copy rows of `run` bytes with streaming stores; false, and nothing done, where rows are not whole cache lines.
bool stream_rows(const Loop &loop, int64_t run, char *to, const char *from);

}  // namespace lmc
