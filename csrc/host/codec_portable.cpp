// The codec's kernels in plain C++: what the others must equal.
#include <type_traits>

#include "codec.h"

namespace lmc::codec {
namespace {

#define W 4
#include "codec_values.inl"
#undef W

void decode(DecodeTile *tiles, int count, int tokens, const uint32_t *table) {
    for (DecodeTile *tile = tiles; tile < tiles + count; ++tile) {
        const uint16_t *words = tile->words;
        for (int step = 0; step < 2 * tokens; ++step) {
            const uint32_t *first = step & 1 ? tile->odd : tile->even;
            for (int lane = 0; lane < LANES; ++lane) {
                uint32_t x = tile->x[lane];
                const uint32_t entry = table[first[lane] + (x & (SLOTS - 1))];
                const int offset = static_cast<int8_t>(entry >> 8) + 17 * static_cast<int8_t>(entry >> 16);
                x = (entry & 0x7ff) * (x >> 11) + static_cast<uint32_t>(offset);
                tile->x[lane] = x < LOW ? x << 16 | *words++ : x;
                tile->symbols[(step >> 1) * GROUP + 2 * lane + (step & 1)] =
                    static_cast<int16_t>(static_cast<int32_t>(entry) >> 24);
            }
        }
        tile->words = words;
    }
}

void encode(EncodeTile *tiles, int count, int tokens, const uint64_t *table) {
    for (EncodeTile *tile = tiles; tile < tiles + count; ++tile) {
        uint16_t *words = tile->words;
        for (int step = 2 * tokens - 1; step >= 0; --step) {
            for (int lane = LANES - 1; lane >= 0; --lane) {
                const uint64_t model = table[tile->entries[(step >> 1) * GROUP + 2 * lane + (step & 1)]];
                const auto entry = static_cast<uint32_t>(model >> 32);
                uint32_t x = tile->x[lane];
                if (x >= (entry & 0xfff00000)) {
                    *--words = static_cast<uint16_t>(x);
                    x >>= 16;
                }
                const auto high = static_cast<uint32_t>(static_cast<uint64_t>(x) * (model & 0xffffffff) >> 32);
                tile->x[lane] = x + (high >> ((entry >> 12) & 15)) * (SLOTS - (entry >> 20)) + (entry & 0xfff);
            }
        }
        tile->words = words;
    }
}

}  // namespace

constexpr Kernels portable = make_kernels(decode, encode, nullptr);

}  // namespace lmc::codec
