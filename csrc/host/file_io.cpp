// Positioned file I/O for a whole batch in one call.
#include <errno.h>
#include <sys/types.h>
#include <unistd.h>

#include "cpu.h"

namespace {

// Returns bytes moved, fewer than `length` only at end of file; or -errno of the first failure.
template <class Transfer>
int64_t whole(const Transfer &transfer, int32_t fd, int64_t address, int64_t length, int64_t offset) {
    int64_t moved = 0;
    while (moved < length) {
        const ssize_t got = transfer(fd, address + moved, static_cast<size_t>(length - moved), offset + moved);
        if (got > 0) {
            moved += got;
        } else if (got == 0) {
            break;
        } else if (errno != EINTR) {
            return -static_cast<int64_t>(errno);
        }
    }
    return moved;
}

}  // namespace

extern "C" void lmc_pread_batch(const int32_t *fds, const int64_t *offsets, const int64_t *addresses,
                                const int64_t *lengths, int64_t count, int64_t *results) {
    const auto read = [](int fd, int64_t address, size_t length, int64_t offset) {
        return pread(fd, reinterpret_cast<void *>(address), length, static_cast<off_t>(offset));
    };
    for (int64_t i = 0; i < count; ++i) results[i] = whole(read, fds[i], addresses[i], lengths[i], offsets[i]);
}

extern "C" void lmc_pwrite_batch(const int32_t *fds, const int64_t *offsets, const int64_t *addresses,
                                 const int64_t *lengths, int64_t count, int64_t *results) {
    const auto write = [](int fd, int64_t address, size_t length, int64_t offset) {
        return pwrite(fd, reinterpret_cast<const void *>(address), length, static_cast<off_t>(offset));
    };
    for (int64_t i = 0; i < count; ++i) results[i] = whole(write, fds[i], addresses[i], lengths[i], offsets[i]);
}
