// libcufile as far as lmcache_backends.gds.cufile uses it, over pread and pwrite. What goes wrong is told by `fake`, and by
// FAKE_CUFILE_OPEN for the process that only opens the driver: `hang`, `crash`, or `ERR/CU_ERR`.
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include <cstdint>
#include <mutex>
#include <set>

namespace {

struct Status {
    int err, cu_err;
};

struct Description {
    int type;
    union {
        int fd;
        void *handle;
    } handle;
    const void *fs_ops;
};

struct Properties {
    unsigned major, minor;
    size_t poll, direct;
    unsigned status, control, features, cache, buffer, pinned, batch, timeout;
};

struct Handle {
    int fd;
};

// Addresses of device memory: no system call and no instruction reaches them.
constexpr uint64_t DEVICE = uint64_t{1} << 56;

std::mutex mutex;
std::set<uint64_t> memories;

}  // namespace

extern "C" {

struct Fake {
    int64_t most;     // bytes of one transfer, 0: all
    int64_t result;   // what transfers return instead of moving, 0: they move
    int64_t after;    // so many transfers move first
    int32_t error;    // errno with that
    int32_t damage;   // change a byte of what is moved
    int32_t file_err, memory_err, cu_err;
    int32_t open;     // drivers, files and memories now
    int32_t files, memories;
    int32_t files_ever, memories_ever;
    int64_t calls, bytes, through_memory;  // transfers, and those whose base is registered memory
} fake;

Status cuFileDriverOpen(void) {
    const char *told = getenv("FAKE_CUFILE_OPEN");
    if (told && *told == 'h') {
        for (volatile int i = 0;; i = i + 1) {
        }
    }
    if (told && *told == 'c') raise(SIGSEGV);
    int err = 0, cu_err = 0;
    if (told) sscanf(told, "%d/%d", &err, &cu_err);
    fake.open += !err;
    return {err, cu_err};
}

Status cuFileDriverClose(void) {
    --fake.open;
    return {0, 0};
}

Status cuFileDriverGetProperties(Properties *properties) {
    *properties = {2, 20, 4, 16384, 0, 2, 0, 0, 0, 0, 128, 0};
    return {0, 0};
}

Status cuFileHandleRegister(void **handle, Description *description) {
    if (fake.file_err) return {fake.file_err, fake.cu_err};
    if (description->type != 1 || fcntl(description->handle.fd, F_GETFD) < 0) return {5022, 0};
    *handle = new Handle{description->handle.fd};
    ++fake.files;
    ++fake.files_ever;
    return {0, 0};
}

void cuFileHandleDeregister(void *handle) {
    if (fcntl(static_cast<Handle *>(handle)->fd, F_GETFD) < 0) abort();  // closed before it was deregistered
    delete static_cast<Handle *>(handle);
    --fake.files;
}

Status cuFileBufRegister(const void *base, size_t, int) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (fake.memory_err) return {fake.memory_err, fake.cu_err};
    if (!memories.insert(reinterpret_cast<uint64_t>(base)).second) return {5023, 0};
    ++fake.memories;
    ++fake.memories_ever;
    return {0, 0};
}

Status cuFileBufDeregister(const void *base) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!memories.erase(reinterpret_cast<uint64_t>(base))) return {5024, 0};
    --fake.memories;
    return {0, 0};
}

static ssize_t transfer(bool write, Handle *handle, uint64_t base, size_t size, int64_t at, int64_t base_offset) {
    const std::lock_guard<std::mutex> lock(mutex);
    ++fake.calls;
    fake.through_memory += static_cast<int64_t>(memories.count(base));
    if (fake.result && fake.after-- <= 0) {
        errno = fake.error;
        return fake.result;
    }
    const uint64_t address = base + static_cast<uint64_t>(base_offset);
    char *memory = reinterpret_cast<char *>(address >= DEVICE ? address - DEVICE : address);
    if (fake.most && size > static_cast<size_t>(fake.most)) size = static_cast<size_t>(fake.most);
    if (write && fake.damage) memory[size / 2] ^= 1;
    const ssize_t moved = write ? pwrite(handle->fd, memory, size, at) : pread(handle->fd, memory, size, at);
    if (fake.damage && moved > 0) memory[size / 2] ^= 1;
    if (moved > 0) fake.bytes += moved;
    return moved;
}

ssize_t cuFileRead(void *handle, void *base, size_t size, int64_t file_offset, int64_t base_offset) {
    return transfer(false, static_cast<Handle *>(handle), reinterpret_cast<uint64_t>(base), size, file_offset, base_offset);
}

ssize_t cuFileWrite(void *handle, const void *base, size_t size, int64_t file_offset, int64_t base_offset) {
    return transfer(true, static_cast<Handle *>(handle), reinterpret_cast<uint64_t>(base), size, file_offset, base_offset);
}

}  // extern "C"
