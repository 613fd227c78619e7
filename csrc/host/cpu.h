// Which instruction sets to use, decided once from CPUID; and the attribute macros that go with them.
#pragma once

#include <lmcache_host.h>

#if defined(__x86_64__)
#define LMC_X86 1
#include <immintrin.h>
#define LMC_TARGET_AVX2 __attribute__((target("avx2,bmi2")))
#define LMC_TARGET_AVX512 __attribute__((target("avx2,bmi2,avx512f,avx512bw,avx512vl,avx512dq")))
#define LMC_TARGET_SHA __attribute__((target("sse4.1,ssse3,sha")))
#else
#define LMC_X86 0
#endif

namespace lmc {

// LMC_PORTABLE, LMC_AVX2 or LMC_AVX512, perhaps with LMC_SHA.
int simd();

inline int simd_level() { return simd() & LMC_SIMD_MASK; }

}  // namespace lmc
