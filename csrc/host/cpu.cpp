#include "cpu.h"

#if LMC_X86
#include <cpuid.h>
#endif

namespace lmc {
namespace {

int detect() {
    int found = LMC_PORTABLE;
#if LMC_X86
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return found;
    const bool ssse3 = ecx & (1u << 9), sse41 = ecx & (1u << 19), osxsave = ecx & (1u << 27);
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return found;
    if ((ebx & (1u << 29)) && ssse3 && sse41) found |= LMC_SHA;
    if (!osxsave) return found;
    // The operating system must save the registers too: XCR0 bits 1-2 for YMM, 5-7 for ZMM.
    unsigned xcr0, high;
    __asm__("xgetbv" : "=a"(xcr0), "=d"(high) : "c"(0));
    const bool avx2 = (ebx & (1u << 5)) && (ebx & (1u << 8));  // AVX2, BMI2
    const unsigned wanted = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // AVX-512 F, DQ, BW, VL
    if (avx2 && (xcr0 & 0x6) == 0x6) {
        found |= ((ebx & wanted) == wanted && (xcr0 & 0xe6) == 0xe6) ? LMC_AVX512 : LMC_AVX2;
    }
#endif
    return found;
}

const int detected = detect();
int in_use = detected;

}  // namespace

int simd() { return __atomic_load_n(&in_use, __ATOMIC_RELAXED); }

}  // namespace lmc

extern "C" int32_t lmc_abi_version(void) { return LMC_ABI_VERSION; }

extern "C" int32_t lmc_simd(void) { return lmc::simd(); }

extern "C" int32_t lmc_limit_simd(int32_t limit) {
    const int have = lmc::detected & LMC_SIMD_MASK, want = limit & LMC_SIMD_MASK;
    const int now = (want < have ? want : have) | (lmc::detected & limit & LMC_SHA);
    __atomic_store_n(&lmc::in_use, now, __ATOMIC_RELAXED);
    return now;
}
