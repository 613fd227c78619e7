/* liblmcache_host: the byte-moving half of lmcache-core, as a plain C ABI.
 *
 * Addresses are 64-bit integers, sizes are bytes unless a name says otherwise, and nothing of Python or of any
 * tensor library crosses this boundary. No function keeps a pointer, allocates on a caller's behalf or throws.
 * All are thread-safe; none needs the caller to hold a lock. For little-endian machines. */
#ifndef LMCACHE_HOST_H
#define LMCACHE_HOST_H

#include <stdint.h>

#if defined(__GNUC__)
#define LMC_API __attribute__((visibility("default")))
#else
#define LMC_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised with every incompatible change; the loader refuses any other number. */
#define LMC_ABI_VERSION 1

LMC_API int32_t lmc_abi_version(void);

/* Instruction sets. LMC_SHA may be combined with any other. */
enum { LMC_PORTABLE = 0, LMC_AVX2 = 1, LMC_AVX512 = 2, LMC_SIMD_MASK = 7, LMC_SHA = 8 };

/* The instruction sets in use. */
LMC_API int32_t lmc_simd(void);

/* Use at most `limit`; what the CPU lacks stays off. Returns the sets now in use. For tests and measurements. */
LMC_API int32_t lmc_limit_simd(int32_t limit);

/* XXH3-64 with seed 0 and the default secret (Collet, xxHash specification). */
LMC_API uint64_t lmc_xxh3_64(const void *data, int64_t length);
LMC_API void lmc_xxh3_64_batch(const int64_t *addresses, const int64_t *lengths, int64_t count, uint64_t *out);

/* SHA-256 chain (FIPS 180-4): digest_i = SHA-256(digest_{i-1} || tokens_i as little-endian int32), digest_{-1} =
 * `state` (32 bytes). Writes `chunks` digests of 32 bytes to `out`. */
LMC_API void lmc_sha256_chain(const uint8_t *state, const int32_t *tokens, int64_t chunk_tokens, int64_t chunks,
                              uint8_t *out);

/* `count` independent memory copies, shared by up to `threads` threads. */
LMC_API void lmc_copy_batch(const int64_t *destinations, const int64_t *sources, const int64_t *lengths, int64_t count,
                            int32_t threads);

/* Positioned reads and writes that continue after short transfers and EINTR. results[i] is the number of bytes
 * moved (short at end of file) or -errno. */
LMC_API void lmc_pread_batch(const int32_t *fds, const int64_t *offsets, const int64_t *addresses,
                             const int64_t *lengths, int64_t count, int64_t *results);
LMC_API void lmc_pwrite_batch(const int32_t *fds, const int64_t *offsets, const int64_t *addresses,
                              const int64_t *lengths, int64_t count, int64_t *results);

/* Byte planes of `elements` elements of `itemsize` bytes (2 or 4): plane k holds byte k of every element, and the
 * planes follow each other. Returns 0, or -EINVAL for another item size. */
LMC_API int32_t lmc_split_planes(const void *elements_in, void *planes_out, int64_t elements, int32_t itemsize);
LMC_API int32_t lmc_join_planes(const void *planes_in, void *elements_out, int64_t elements, int32_t itemsize);

/* Engine pages <-> slots. One part is one plane of the pages (K, V, or all of an opaque page): the same nest of
 * strided runs in every block of every layer.
 *
 *   page address = bases[layer] + block_id * block_stride                  + sum_k i_k * page_strides[k]
 *   slot address = slot + slot_offset + layer * slot_layer_stride
 *                       + block_index * slot_block_stride                  + sum_k i_k * slot_strides[k]
 *
 * for every i_k in [0, extents[k]), `run_bytes` bytes each. */
#define LMC_MAX_DIMS 6

typedef struct {
    const int64_t *bases; /* one address per layer, page offset of the part included */
    int64_t block_stride;
    int64_t slot_offset;
    int64_t slot_layer_stride;
    int64_t slot_block_stride;
    int64_t run_bytes;
    int64_t ndims;
    int64_t extents[LMC_MAX_DIMS];
    int64_t page_strides[LMC_MAX_DIMS];
    int64_t slot_strides[LMC_MAX_DIMS];
} lmc_part;

/* Copy `chunks` chunks of `blocks` blocks each: block_ids[chunk][block], slots[chunk]. With `skip_negative`, a
 * block id of -1 leaves that block out. Returns 0; 1 + the flat index of the first block id outside
 * [0, num_blocks), and then nothing was copied; or -EINVAL for a malformed part. */
LMC_API int64_t lmc_copy_pages(const lmc_part *parts, int64_t part_count, int64_t layers, int64_t num_blocks,
                               const int64_t *block_ids, int64_t chunks, int64_t blocks, const int64_t *slots,
                               int32_t to_slots, int32_t skip_negative, int32_t threads);

#ifdef __cplusplus
}
#endif
#endif
