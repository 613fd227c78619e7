#include "copy.h"

#include <string.h>

#include "cpu.h"
#include "parallel.h"

namespace lmc {

void copy_run(void *destination, const void *source, int64_t length) {
    memcpy(destination, source, static_cast<size_t>(length));
}

}  // namespace lmc

extern "C" void lmc_copy_batch(const int64_t *destinations, const int64_t *sources, const int64_t *lengths, int64_t count,
                               int32_t threads) {
    lmc::parallel_ranges(count, threads, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            lmc::copy_run(reinterpret_cast<void *>(destinations[i]), reinterpret_cast<const void *>(sources[i]),
                          lengths[i]);
        }
    });
}
