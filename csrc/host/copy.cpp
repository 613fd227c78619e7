#include "copy.h"

#include <string.h>

#include "cpu.h"
#include "parallel.h"

namespace {

#if LMC_X86

// Streaming stores in the order DRAM likes: four sides (pages, or quarters of a shorter run) side by side, two cache
// lines of each in turn, so that several DRAM rows are open at once and the hardware prefetcher follows four streams.
constexpr int64_t PAGE = 4096, SHORTEST = 4 * 256;

int64_t side_of(int64_t length) {
    const int64_t quarter = length / 4 & ~int64_t{127};
    return quarter < PAGE ? quarter : PAGE;
}

LMC_TARGET_AVX512 void stream_avx512(char *to, const char *from, int64_t groups, int64_t side) {
    for (; groups > 0; --groups, to += 4 * side, from += 4 * side) {
        for (int64_t line = 0; line < side; line += 128) {
            for (int64_t start = 0; start < 4 * side; start += side) {
                const char *source = from + start + line;
                _mm_prefetch(source + 256, _MM_HINT_T0);
                _mm_prefetch(source + 320, _MM_HINT_T0);
                const __m512i first = _mm512_loadu_si512(source), second = _mm512_loadu_si512(source + 64);
                _mm512_stream_si512(reinterpret_cast<__m512i *>(to + start + line), first);
                _mm512_stream_si512(reinterpret_cast<__m512i *>(to + start + line + 64), second);
            }
        }
    }
}

LMC_TARGET_AVX2 void stream_avx2(char *to, const char *from, int64_t groups, int64_t side) {
    for (; groups > 0; --groups, to += 4 * side, from += 4 * side) {
        for (int64_t line = 0; line < side; line += 128) {
            for (int64_t start = 0; start < 4 * side; start += side) {
                const char *source = from + start + line;
                _mm_prefetch(source + 256, _MM_HINT_T0);
                _mm_prefetch(source + 320, _MM_HINT_T0);
                for (int64_t half = 0; half < 128; half += 32) {
                    const auto *in = reinterpret_cast<const __m256i *>(source + half);
                    _mm256_stream_si256(reinterpret_cast<__m256i *>(to + start + line + half), _mm256_loadu_si256(in));
                }
            }
        }
    }
}

#endif

}  // namespace

namespace lmc {

void copy_run(void *destination, const void *source, int64_t length, bool stream) {
    auto *to = static_cast<char *>(destination);
    const auto *from = static_cast<const char *>(source);
#if LMC_X86
    const int level = simd_level();
    if (stream && level != LMC_PORTABLE && length >= SHORTEST + 64) {
        const int64_t head = -reinterpret_cast<intptr_t>(to) & 63;
        memcpy(to, from, static_cast<size_t>(head));
        to += head;
        from += head;
        length -= head;
        while (length >= SHORTEST) {
            const int64_t side = side_of(length);
            const int64_t groups = length / (4 * side), done = groups * 4 * side;
            (level == LMC_AVX512 ? stream_avx512 : stream_avx2)(to, from, groups, side);
            to += done;
            from += done;
            length -= done;
        }
    }
#else
    (void)stream;
#endif
    memcpy(to, from, static_cast<size_t>(length));
}

void expect_run(const void *source, int64_t length) {
#if LMC_X86
    if (length < SHORTEST) return;
    const auto *from = static_cast<const char *>(source);
    const int64_t side = side_of(length);
    for (int64_t start = 0; start < 4 * side; start += side) {
        for (int64_t line = 0; line < 256; line += 64) _mm_prefetch(from + start + line, _MM_HINT_T0);
    }
#else
    (void)source, (void)length;
#endif
}

void stream_fence() {
#if LMC_X86
    _mm_sfence();
#endif
}

}  // namespace lmc

extern "C" void lmc_copy_batch(const int64_t *destinations, const int64_t *sources, const int64_t *lengths, int64_t count,
                               int32_t threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < count; ++i) total += lengths[i];
    const bool stream = total >= lmc::STREAM_BYTES;
    lmc::parallel_ranges(count, stream ? threads : 1, [=](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            lmc::copy_run(reinterpret_cast<void *>(destinations[i]), reinterpret_cast<const void *>(sources[i]),
                          lengths[i], stream);
        }
        if (stream) lmc::stream_fence();
    });
}
