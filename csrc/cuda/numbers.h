// Arithmetic that device and host code share, bit for bit.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define LMC_HD __host__ __device__ __forceinline__
#else
#define LMC_HD inline
#endif
#if defined(__CUDA_ARCH__)
#define LMC_UNROLL _Pragma("unroll")
#else
#define LMC_UNROLL
#endif

namespace lmc_cuda {

// n / d for n < 2^31 with one multiplication (Granlund and Montgomery, 1994).
struct Divisor {
    uint32_t d, multiplier, shift;
};

inline Divisor divisor(uint32_t d) {
    uint32_t shift = 0;
    while ((uint64_t{1} << shift) < d) ++shift;
    return {d, static_cast<uint32_t>((((uint64_t{1} << shift) - d) << 32) / d + 1), shift};
}

LMC_HD uint32_t divide(uint32_t n, const Divisor &by) {
#if defined(__CUDA_ARCH__)
    return (__umulhi(n, by.multiplier) + n) >> by.shift;
#else
    return (static_cast<uint32_t>(uint64_t{n} * by.multiplier >> 32) + n) >> by.shift;
#endif
}

// n, and what is left of it.
LMC_HD uint32_t split(uint32_t &n, const Divisor &by) {
    const uint32_t quotient = divide(n, by), rest = n - quotient * by.d;
    n = quotient;
    return rest;
}

LMC_HD float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, 4);
    return value;
#endif
}

LMC_HD uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
#endif
}

// Conversions round to nearest, ties to even; a NaN stays one.

struct Bf16 {
    static LMC_HD float load(uint32_t bits) { return float_of(bits << 16); }
    static LMC_HD uint32_t store(float value) {
        const uint32_t bits = bits_of(value);
        if ((bits & 0x7fffffffu) > 0x7f800000u) return bits >> 16 | 0x40u;
        return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    }
};

struct Fp16 {
    static LMC_HD float load(uint32_t bits) {
        const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
        if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
        // Exact in float32, denormals included: 2^112 moves the exponent's bias.
        return float_of(sign | bits_of(float_of(magnitude << 13) * float_of(0x77800000u)));
    }
    static LMC_HD uint32_t store(float value) {
        const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
        if (magnitude > 0x7f800000u) return sign | 0x7e00u | (magnitude >> 13 & 0x3ffu);
        if (magnitude >= 0x477ff000u) return sign | 0x7c00u;
        if (magnitude < 0x38800000u) {  // a denormal: adding 0.5 leaves units of 2^-24 in the last places, rounded
            return sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u);
        }
        return sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    }
};

}  // namespace lmc_cuda
