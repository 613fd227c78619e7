// Kernels for runs of contiguous bytes.
#include <string.h>

#include "copy.h"
#include "cpu.h"
#include "nest.h"

namespace lmc {
namespace {

void one_run(const Nest &nest, char *to, const char *from, bool stream) { copy_run(to, from, nest.run, stream); }

// RUN is the length of a run where the compiler should know it.
template <int64_t RUN>
void rows(const Nest &nest, char *to, const char *from, bool) {
    const size_t bytes = static_cast<size_t>(RUN ? RUN : nest.run);
    for (int64_t w = 0; w < nest.w.extent; ++w, to += nest.w.to, from += nest.w.from) {
        for (int64_t v = 0; v < nest.v.extent; ++v) memcpy(to + v * nest.v.to, from + v * nest.v.from, bytes);
    }
}

Kernel plain_rows(int64_t run) {
    switch (run) {
        case 1: return rows<1>;
        case 2: return rows<2>;
        case 4: return rows<4>;
        case 8: return rows<8>;
        case 16: return rows<16>;
        case 32: return rows<32>;
        case 64: return rows<64>;
        case 128: return rows<128>;
        case 256: return rows<256>;
        default: return rows<0>;
    }
}

void long_rows(const Nest &nest, char *to, const char *from, bool stream) {
    for (int64_t w = 0; w < nest.w.extent; ++w, to += nest.w.to, from += nest.w.from) {
        for (int64_t v = 0; v < nest.v.extent; ++v) copy_run(to + v * nest.v.to, from + v * nest.v.from, nest.run, stream);
    }
}

#if LMC_X86

// Bytes to ask for ahead of need: rows lie apart, so the hardware does not see them coming.
constexpr int64_t AHEAD = 2048;

// Rows of whole cache lines. Where the destination is not aligned to them, plain stores.
#define LMC_LINE_ROWS(NAME, TARGET, VECTOR, WIDTH, LOAD, STREAM, STORE)                                          \
    TARGET void NAME(const Nest &nest, char *to, const char *from, bool stream) {                                \
        const auto strides = static_cast<uintptr_t>(nest.w.to | nest.v.to);                                      \
        const bool whole = stream && ((reinterpret_cast<uintptr_t>(to) | strides) & 63) == 0;                    \
        const int64_t run = nest.run, step = nest.v.extent * run;                                                \
        const int64_t v_ahead = step > AHEAD ? AHEAD / run * nest.v.from : 0;                                    \
        const int64_t ahead = v_ahead ? v_ahead : (AHEAD + step - 1) / step * nest.w.from;                       \
        for (int64_t w = 0; w < nest.w.extent; ++w, to += nest.w.to, from += nest.w.from) {                      \
            char *out = to;                                                                                      \
            const char *in = from;                                                                               \
            for (int64_t v = 0; v < nest.v.extent; ++v, out += nest.v.to, in += nest.v.from) {                   \
                for (int64_t k = 0; k < run; k += 64) {                                                          \
                    _mm_prefetch(in + ahead + k, _MM_HINT_T0);                                                   \
                    for (int64_t part = k; part < k + 64; part += WIDTH) {                                       \
                        const VECTOR bytes = LOAD(reinterpret_cast<const VECTOR *>(in + part));                  \
                        if (whole) {                                                                             \
                            STREAM(reinterpret_cast<VECTOR *>(out + part), bytes);                               \
                        } else {                                                                                 \
                            STORE(reinterpret_cast<VECTOR *>(out + part), bytes);                                \
                        }                                                                                        \
                    }                                                                                            \
                }                                                                                                \
            }                                                                                                    \
        }                                                                                                        \
    }
LMC_LINE_ROWS(line_rows_avx512, LMC_TARGET_AVX512, __m512i, 64, _mm512_loadu_si512, _mm512_stream_si512,
              _mm512_storeu_si512)
LMC_LINE_ROWS(line_rows_avx2, LMC_TARGET_AVX2, __m256i, 32, _mm256_loadu_si256, _mm256_stream_si256, _mm256_storeu_si256)
#undef LMC_LINE_ROWS

#endif

}  // namespace

Kernel pick_row_kernel(const Nest &nest) {
    if (nest.v.extent == 1 && nest.w.extent == 1) return one_run;
    if (nest.run >= 16384) return long_rows;
#if LMC_X86
    const int level = simd_level();
    if (nest.run % 64 == 0 && level == LMC_AVX512) return line_rows_avx512;
    if (nest.run % 64 == 0 && level == LMC_AVX2) return line_rows_avx2;
#endif
    return plain_rows(nest.run);
}

}  // namespace lmc
