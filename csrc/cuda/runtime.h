// What the library's parts share of the CUDA runtime.
#pragma once

#include <cuda_runtime.h>
#include <lmcache_cuda.h>

namespace lmc_cuda {

// The result for a CUDA error, which is not left behind for others to find.
inline int64_t failed(cudaError_t error) {
    if (error == cudaSuccess) return 0;
    cudaGetLastError();
    return LMC_CUDA_ERROR - static_cast<int64_t>(error);
}

#define LMC_TRY(call)                                                            \
    do {                                                                         \
        if (const int64_t lmc_failed = ::lmc_cuda::failed(call)) return lmc_failed; \
    } while (0)

// A device made current for as long as this lives; the caller's comes back.
class OnDevice {
  public:
    explicit OnDevice(int32_t device) {
        error = failed(cudaGetDevice(&before_));
        if (!error && before_ != device) {
            error = failed(cudaSetDevice(device));
            changed_ = !error;
        }
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice &) = delete;
    OnDevice &operator=(const OnDevice &) = delete;
    int64_t error;

  private:
    int before_ = 0;
    bool changed_ = false;
};

inline cudaStream_t stream_of(uint64_t handle) { return reinterpret_cast<cudaStream_t>(handle); }

int64_t copy_batch(const int64_t *to, const int64_t *from, const int64_t *lengths, int64_t count, cudaStream_t stream);

}  // namespace lmc_cuda
