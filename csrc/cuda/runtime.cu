// Devices, streams, events, pinned memory, and copies by the copy engine.
#include "runtime.h"

#include <errno.h>

namespace lmc_cuda {
namespace {

cudaEvent_t event_of(uint64_t handle) { return reinterpret_cast<cudaEvent_t>(handle); }

#if CUDART_VERSION >= 13000
// One driver call for many copies. An old driver, or a stream that takes no batches, says so and gets the loop.
bool batched(const int64_t *to, const int64_t *from, const int64_t *lengths, int64_t count, cudaStream_t stream,
             cudaError_t &error) {
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    size_t first = 0;
    static_assert(sizeof(void *) == sizeof(int64_t) && sizeof(size_t) == sizeof(int64_t), "a 64-bit machine");
    error = cudaMemcpyBatchAsync(reinterpret_cast<void *const *>(to), reinterpret_cast<const void *const *>(from),
                                 reinterpret_cast<const size_t *>(lengths), static_cast<size_t>(count), &attributes,
                                 &first, 1, stream);
    if (error != cudaErrorNotSupported && error != cudaErrorCallRequiresNewerDriver && error != cudaErrorInvalidValue) {
        return true;
    }
    cudaGetLastError();
    return false;
}
#else
bool batched(const int64_t *, const int64_t *, const int64_t *, int64_t, cudaStream_t, cudaError_t &) { return false; }
#endif

}  // namespace

int64_t copy_batch(const int64_t *to, const int64_t *from, const int64_t *lengths, int64_t count, cudaStream_t stream) {
    cudaError_t error = cudaSuccess;
    if (count > 1 && batched(to, from, lengths, count, stream, error)) return failed(error);
    for (int64_t i = 0; i < count; ++i) {
        LMC_TRY(cudaMemcpyAsync(reinterpret_cast<void *>(to[i]), reinterpret_cast<const void *>(from[i]),
                                static_cast<size_t>(lengths[i]), cudaMemcpyDefault, stream));
    }
    return 0;
}

}  // namespace lmc_cuda

using namespace lmc_cuda;

extern "C" {

int32_t lmc_cuda_abi_version(void) { return LMC_CUDA_ABI_VERSION; }

const char *lmc_cuda_error(int64_t result) {
    if (result <= LMC_CUDA_ERROR) return cudaGetErrorString(static_cast<cudaError_t>(LMC_CUDA_ERROR - result));
    if (result == -EINVAL) return "malformed arguments";
    if (result == -EFAULT) return "memory the device cannot reach: neither device memory nor pinned";
    if (result == -ENOMEM) return "no memory";
    return result < 0 ? "unknown error" : "no error";
}

int64_t lmc_cuda_device_count(void) {
    int count = 0;
    LMC_TRY(cudaGetDeviceCount(&count));
    return count;
}

int64_t lmc_cuda_multiprocessors(int32_t device) {
    int count = 0;
    LMC_TRY(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    return count;
}

int64_t lmc_cuda_bus_id(int32_t device, char *out, int32_t room) {
    return failed(cudaDeviceGetPCIBusId(out, room, device));
}

int64_t lmc_cuda_memory(int32_t device, int64_t *free_bytes, int64_t *total_bytes) {
    const OnDevice on(device);
    if (on.error) return on.error;
    size_t left = 0, total = 0;
    LMC_TRY(cudaMemGetInfo(&left, &total));
    *free_bytes = static_cast<int64_t>(left);
    *total_bytes = static_cast<int64_t>(total);
    return 0;
}
int64_t lmc_cuda_allocate(int32_t device, int64_t bytes, uint64_t *out) {
    const OnDevice on(device);
    if (on.error) return on.error;
    return bytes > 0 ? failed(cudaMalloc(reinterpret_cast<void **>(out), static_cast<size_t>(bytes))) : -EINVAL;
}
int64_t lmc_cuda_free(int32_t device, int64_t address) {
    const OnDevice on(device);
    if (on.error) return on.error;
    return failed(cudaFree(reinterpret_cast<void *>(address)));
}

int64_t lmc_cuda_stream_create(int32_t device, uint64_t *out) {
    const OnDevice on(device);
    if (on.error) return on.error;
    return failed(cudaStreamCreateWithFlags(reinterpret_cast<cudaStream_t *>(out), cudaStreamNonBlocking));
}
int64_t lmc_cuda_stream_destroy(uint64_t stream) { return failed(cudaStreamDestroy(stream_of(stream))); }

int64_t lmc_cuda_event_create(int32_t device, uint64_t *out) {
    const OnDevice on(device);
    if (on.error) return on.error;
    // Who waits for it sleeps: a thread of ours waits for copies, and must not take a core from the engine.
    const unsigned flags = cudaEventDisableTiming | cudaEventBlockingSync;
    return failed(cudaEventCreateWithFlags(reinterpret_cast<cudaEvent_t *>(out), flags));
}
int64_t lmc_cuda_event_destroy(uint64_t event) { return failed(cudaEventDestroy(event_of(event))); }
int64_t lmc_cuda_record(uint64_t event, uint64_t stream) {
    return failed(cudaEventRecord(event_of(event), stream_of(stream)));
}
int64_t lmc_cuda_query(uint64_t event) {
    const cudaError_t state = cudaEventQuery(event_of(event));
    if (state != cudaErrorNotReady) return state == cudaSuccess ? 1 : failed(state);
    cudaGetLastError();
    return 0;
}
int64_t lmc_cuda_synchronize(uint64_t event) { return failed(cudaEventSynchronize(event_of(event))); }
int64_t lmc_cuda_wait(uint64_t stream, uint64_t event) {
    return failed(cudaStreamWaitEvent(stream_of(stream), event_of(event), 0));
}

int64_t lmc_cuda_pin(int64_t address, int64_t bytes) {
    const unsigned flags = cudaHostRegisterPortable | cudaHostRegisterMapped;
    return failed(cudaHostRegister(reinterpret_cast<void *>(address), static_cast<size_t>(bytes), flags));
}
int64_t lmc_cuda_unpin(int64_t address) { return failed(cudaHostUnregister(reinterpret_cast<void *>(address))); }

int64_t lmc_cuda_unreachable(int32_t device, const int64_t *addresses, int64_t count) {
    const OnDevice on(device);
    if (on.error) return on.error;
    for (int64_t i = 0; i < count; ++i) {
        cudaPointerAttributes found;
        LMC_TRY(cudaPointerGetAttributes(&found, reinterpret_cast<void *>(addresses[i])));
        // Memory pinned at another address for the device would have to be addressed there.
        if (found.devicePointer != reinterpret_cast<void *>(addresses[i])) return 1 + i;
    }
    return 0;
}

int64_t lmc_cuda_copy_batch(int32_t device, const int64_t *destinations, const int64_t *sources,
                            const int64_t *lengths, int64_t count, uint64_t stream) {
    const OnDevice on(device);
    if (on.error) return on.error;
    return copy_batch(destinations, sources, lengths, count, stream_of(stream));
}

}  // extern "C"
