/* The `cachegen` codec of liblmcache_host (docs/codec.md): chunks of KV cache <-> blobs, bit-exact on every CPU.
 *
 * Same rules as lmcache_host.h. No function allocates: a caller lends `lmc_codec_scratch_bytes()` bytes, one such
 * scratch for each thread that calls at the same time. */
#ifndef LMCACHE_CODEC_H
#define LMCACHE_CODEC_H

#include <lmcache_host.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { LMC_BF16 = 0, LMC_F16 = 1, LMC_F32 = 2, LMC_E4M3 = 3, LMC_E5M2 = 4 };
enum { LMC_ROW_RAW = 0, LMC_ROW_ANCHORED = 1, LMC_ROW_PER_TOKEN = 2, LMC_ROW_LOSSLESS = 3 };

/* Why a blob was refused (negative results). */
enum {
    LMC_CODEC_ARGUMENT = -1, /* the call itself is wrong: shape, mode or offset out of range, too little room */
    LMC_CODEC_HEADER = -2,   /* not a blob of this version, shape, length and table set */
    LMC_CODEC_CHECK = -3,    /* a check does not match */
    LMC_CODEC_ROW = -4,      /* a row's own header or its sections are inconsistent */
    LMC_CODEC_TILE = -5      /* an entropy-coded tile does not end as it must */
};

/* A profile (docs/codec.md, "Transform"). Matrices: [layer][2][block][i / 2][j][i % 2], where input i counts towards
 * output j; i and j run to the next multiple of 64 of `block`, filled up with zeros. `blocks * block` channels. */
typedef struct {
    uint64_t number;
    int32_t heads, pairs, blocks, block;
    const uint64_t *turns;       /* [pairs] */
    const float *mean;           /* [layer][channel] */
    const int16_t *there, *back; /* to components, and from them */
    void *room;                  /* lmc_codec_room_bytes() bytes for each thread that calls at the same time */
} lmc_codec_profile;

/* The shape of a chunk, [layer][plane][token][channel], and how to encode it. */
typedef struct {
    int32_t dtype, layers, planes, tokens, channels;
    int32_t level, n_raw, tile_tokens; /* encode only; n_raw -1: decide from the data */
    const uint8_t *modes;              /* encode only: of each row, LMC_ROW_* */
    const int16_t *offsets;            /* encode only: of each row, 16 * log2(step / rms), -160 to 32 */
    const lmc_codec_profile *profile;  /* or NULL */
    const int64_t *starts;             /* encode only, with a profile: of each chunk, position of the first token, or -1:
                                          without transform */
} lmc_codec;

enum { LMC_CODEC_AUX = 16 }; /* bytes a blob with a transform takes beyond lmc_codec_bound() */

LMC_API uint64_t lmc_codec_table_set(void);
LMC_API int64_t lmc_codec_scratch_bytes(void);
LMC_API int64_t lmc_codec_room_bytes(const lmc_codec *codec);

/* Most bytes a blob of this shape takes, or LMC_CODEC_ARGUMENT. */
LMC_API int64_t lmc_codec_bound(const lmc_codec *codec);

/* Encode `count` chunks; outs[i] has room for lmc_codec_bound() bytes (and LMC_CODEC_AUX with a profile), 8-byte
 * aligned like everything else here.
 * sizes[i] = bytes written; raw_rows[i] = rows that a lossy or lossless mode was asked for but are stored as they are.
 * Returns 0 or LMC_CODEC_ARGUMENT. */
LMC_API int32_t lmc_codec_encode(const lmc_codec *codec, const int64_t *chunks, const int64_t *outs, int64_t count,
                                 void *scratch, int64_t *sizes, int32_t *raw_rows);

/* Decode layers [first_layer, first_layer + layers) of `count` blobs into outs[i], which holds just these layers.
 * status[i] = 0 or why the blob was refused; what outs[i] holds then is unspecified. Returns the first status that is
 * not 0, else 0. */
LMC_API int32_t lmc_codec_decode(const lmc_codec *codec, const int64_t *blobs, const int64_t *lengths,
                                 const int64_t *outs, int64_t count, int32_t first_layer, int32_t layers,
                                 void *scratch, int32_t *status);

#ifdef __cplusplus
}
#endif
#endif
