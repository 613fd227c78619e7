// The codec's transform (docs/codec.md), one value at a time: what host and device share.
#pragma once

#include "numbers.h"

namespace lmc_cuda {

constexpr uint64_t MOST_START = (uint64_t{1} << 48) - 1;
constexpr int32_t MOST_STEPS = 32767, MOST_COMPONENT = 8191;  // of a quantised value; of a component
constexpr int32_t FIXED_BITS = 12, UNIT_BITS = 13, LEAST_EXPONENT = -60;

// Cosine and sine of the angle of a token: `turns` is 2^64 times the turns that one token adds.
LMC_HD void angle_of(uint64_t turns, uint64_t position, float &cosine, float &sine) {
    const auto phase = static_cast<uint32_t>(position * turns >> 32);
    const uint32_t quadrant = (phase + (1u << 29)) >> 30;
    const double y = static_cast<double>(static_cast<int32_t>(phase - (quadrant << 30))) * 0x1.921fb54442d18p-30;
    const double z = y * y;
    const double s = y * ((((1.0 / 362880 * z + -1.0 / 5040) * z + 1.0 / 120) * z + -1.0 / 6) * z + 1.0);
    const double c = ((((-1.0 / 3628800 * z + 1.0 / 40320) * z + -1.0 / 720) * z + 1.0 / 24) * z + -0.5) * z + 1.0;
    const auto plain_c = static_cast<float>(c), plain_s = static_cast<float>(s);
    const float a = quadrant & 1 ? plain_s : plain_c, b = quadrant & 1 ? plain_c : plain_s;
    cosine = (quadrant + 1) & 2 ? -a : a;
    sine = quadrant & 2 ? -b : b;
}

// A rotary pair turned by an angle, or back with the negative sine.
LMC_HD void turn(float &a, float &b, float cosine, float sine) {
    const float first = a * cosine - b * sine, second = b * cosine + a * sine;
    a = first;
    b = second;
}

// 2^power for -126 <= power <= 127.
LMC_HD float two_to(int32_t power) { return float_of(static_cast<uint32_t>(power + 127) << 23); }

// rint for |value| <= 2^22.
LMC_HD int32_t rint_small(float value) { return static_cast<int32_t>(bits_of(value + 12582912.0f) - 0x4b400000u); }

// Exponent of a token whose largest value has these bits; false where the row must stay raw.
LMC_HD bool token_exponent(uint32_t most_bits, int32_t highest, int32_t &exponent) {
    const auto field = static_cast<int32_t>(most_bits >> 23);
    exponent = field ? field - 127 : LEAST_EXPONENT;
    return exponent >= LEAST_EXPONENT && exponent <= highest;
}

// Sum over a block's components of a token, in pairs, times column `c` of its matrix; modulo 2^32.
LMC_HD void add_pair(uint32_t &sum, uint32_t q, uint32_t m) {
    const auto low = static_cast<int32_t>(static_cast<int16_t>(q)) * static_cast<int32_t>(static_cast<int16_t>(m));
    const auto high = (static_cast<int32_t>(q) >> 16) * (static_cast<int32_t>(m) >> 16);
    sum += static_cast<uint32_t>(low) + static_cast<uint32_t>(high);
}

// K, channel `at` of a head whose values x gives, without its rotation.
template <typename Values>
LMC_HD float turned_back(const Values &x, uint32_t at, const uint64_t *turns, uint32_t pairs, uint64_t position) {
    if (at >= 2 * pairs) return x(at);
    const uint32_t pair = at % pairs;
    float a = x(pair), b = x(pair + pairs), cosine, sine;
    angle_of(turns[pair], position, cosine, sine);
    turn(a, b, cosine, -sine);
    return at < pairs ? a : b;
}

// A value in fixed point, and a component from a sum of products of such.
LMC_HD uint32_t fixed_point(float x, int32_t exponent) {
    return static_cast<uint32_t>(rint_small(x * two_to(FIXED_BITS - exponent))) & 0xffff;
}
LMC_HD float component_of(uint32_t sum, int32_t exponent) {
    return static_cast<float>(static_cast<int32_t>(sum)) * two_to(exponent - FIXED_BITS - UNIT_BITS);
}

// A value without its mean and rotation, of such a sum. `step`: as bits.
LMC_HD float plain_value(uint32_t sum, uint32_t step) {
    return static_cast<float>(static_cast<int32_t>(sum)) * (float_of(step) * two_to(-UNIT_BITS));
}

}  // namespace lmc_cuda
