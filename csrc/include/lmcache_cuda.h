/* liblmcache_cuda: liblmcache_host's page copies (and codec) on NVIDIA GPUs, as a plain C ABI of its own.
 *
 * The library carries its CUDA runtime and loads without a driver; every call then says so. Calls that take a stream
 * are asynchronous and ordered by it. Results are 0 or more, -errno, or LMC_CUDA_ERROR - e for the CUDA error e; no
 * call aborts, throws or keeps a pointer after it returned, except to the memory its stream still has to move. */
#ifndef LMCACHE_CUDA_H
#define LMCACHE_CUDA_H

#include "lmcache_codec.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LMC_CUDA_ABI_VERSION 1
#define LMC_CUDA_ERROR (-1000)

LMC_API int32_t lmc_cuda_abi_version(void);
/* What a negative result means; a static string. */
LMC_API const char *lmc_cuda_error(int64_t result);
LMC_API int64_t lmc_cuda_device_count(void);
/* Multiprocessors of a device. */
LMC_API int64_t lmc_cuda_multiprocessors(int32_t device);
/* PCI bus id of a device ("0000:3b:00.0", NUL terminated), into `room` bytes: how the kernel names it. */
LMC_API int64_t lmc_cuda_bus_id(int32_t device, char *out, int32_t room);

/* Device memory: bytes free and in all; an allocation of its own, which nothing grows; and its end. */
LMC_API int64_t lmc_cuda_memory(int32_t device, int64_t *free_bytes, int64_t *total_bytes);
LMC_API int64_t lmc_cuda_allocate(int32_t device, int64_t bytes, uint64_t *out);
LMC_API int64_t lmc_cuda_free(int32_t device, int64_t address);

/* Streams and events, as 64-bit handles: those of any CUDA library in the process will do as well. Creating returns
 * the handle through `out`. lmc_cuda_query: 1 once the event has fired, 0 before. */
LMC_API int64_t lmc_cuda_stream_create(int32_t device, uint64_t *out);
LMC_API int64_t lmc_cuda_stream_destroy(uint64_t stream);
LMC_API int64_t lmc_cuda_event_create(int32_t device, uint64_t *out);
LMC_API int64_t lmc_cuda_event_destroy(uint64_t event);
LMC_API int64_t lmc_cuda_record(uint64_t event, uint64_t stream);
LMC_API int64_t lmc_cuda_query(uint64_t event);
LMC_API int64_t lmc_cuda_synchronize(uint64_t event);
LMC_API int64_t lmc_cuda_wait(uint64_t stream, uint64_t event);

/* Pin host memory and map it for every device, and undo it. */
LMC_API int64_t lmc_cuda_pin(int64_t address, int64_t bytes);
LMC_API int64_t lmc_cuda_unpin(int64_t address);
/* 1 + the index of the first address a kernel on the device cannot reach, or 0. */
LMC_API int64_t lmc_cuda_unreachable(int32_t device, const int64_t *addresses, int64_t count);

/* `count` independent copies between any two of device and host memory, in one call to the driver where it can. */
LMC_API int64_t lmc_cuda_copy_batch(int32_t device, const int64_t *destinations, const int64_t *sources,
                                    const int64_t *lengths, int64_t count, uint64_t stream);

/* A ring of `places` places of `bytes / places` bytes in device memory at `staging`, with a stream for the copy
 * engine. The caller owns the memory, and destroys the ring before it. One copy at a time. */
LMC_API int64_t lmc_cuda_ring_create(int32_t device, int64_t staging, int64_t bytes, int64_t places, uint64_t *out);
LMC_API int64_t lmc_cuda_ring_destroy(uint64_t ring);

/* Rotates the first `rotary_dims` of each head of part 0 while it is copied, in float32, rounded to nearest even:
 * (x, y) -> (x cos - y sin, x sin + y cos), pairs (i, i + rotary_dims / 2), or (2 i, 2 i + 1) if interleaved. Runs of
 * part 0 must be whole heads. Moves K between positions. */
typedef struct {
    int64_t table; /* reachable: float cos, sin [chunks][rotary_dims / 2][2] */
    int32_t dtype; /* LMC_BF16, LMC_F16 or LMC_F32 */
    int32_t head_dims, rotary_dims, interleaved;
} lmc_rope;

/* How the bytes move. LMC_KERNEL: a kernel reads and writes pages and slots where they lie; slots are device memory,
 * or pinned. LMC_STAGED: the kernel and the copy engine meet in a ring. LMC_ENGINE: the copy engine alone, run by
 * run; for long runs. */
enum { LMC_KERNEL = 0, LMC_STAGED = 1, LMC_ENGINE = 2 };

typedef struct {
    int32_t device;
    int32_t path;
    int32_t ctas;         /* at most so many thread blocks; 0: as many as are useful */
    int32_t reserved;     /* 0 */
    uint64_t stream;
    uint64_t ring;        /* of LMC_STAGED */
    int64_t slot_bytes;   /* bytes of one slot; of LMC_STAGED */
    const lmc_rope *rope; /* or null; not with LMC_ENGINE */
} lmc_cuda_how;

/* lmc_copy_pages of lmcache_host.h, with at most 2 parts, pages in device (or pinned) memory. Nothing was launched
 * when the result is not 0, unless it is a CUDA error. -EFAULT: a slot the device cannot reach. */
LMC_API int64_t lmc_cuda_copy_pages(const lmc_part *parts, int64_t part_count, int64_t layers, int64_t num_blocks,
                                    const int64_t *block_ids, int64_t chunks, int64_t blocks, const int64_t *slots,
                                    int32_t to_slots, int32_t skip_negative, const lmc_cuda_how *how);

/* The codec of lmcache_codec.h on the device, byte for byte and bit for bit. Blobs, chunks and results lie in memory
 * the device can reach, blobs and chunks at multiples of 16; `scratch` at a multiple of 256. */

/* The numbers of the table file this library was built with; returns how many there are and writes at most `room`. */
LMC_API int64_t lmc_cuda_codec_numbers(int32_t *out, int64_t room);

/* Bytes of scratch memory for `count` chunks. `tile_tokens` is read to encode. */
LMC_API int64_t lmc_cuda_codec_scratch(const lmc_codec *codec, int64_t count, int32_t encode);

/* lmc_codec_decode. `tables`: id of the table file. status: int32[count] on the device's side. At most `ctas` thread
 * blocks decode; 0: as many as are useful. */
LMC_API int64_t lmc_cuda_codec_decode(int32_t device, const lmc_codec *codec, uint64_t tables, const int64_t *blobs,
                                      const int64_t *lengths, const int64_t *outs, int64_t count, int32_t first_layer,
                                      int32_t layers, int64_t scratch, int64_t scratch_bytes, int64_t status,
                                      int32_t ctas, uint64_t stream);

/* lmc_codec_encode. `modes` and `offsets` are pageable host memory, read before this returns; sizes:
 * int64[count] and raw_rows: int32[count] on the device's side. */
LMC_API int64_t lmc_cuda_codec_encode(int32_t device, const lmc_codec *codec, uint64_t tables, const int64_t *chunks,
                                      const int64_t *outs, int64_t count, int64_t scratch, int64_t scratch_bytes,
                                      int64_t sizes, int64_t raw_rows, uint64_t stream);

#ifdef __cplusplus
}
#endif
#endif
