// Byte planes: all first bytes, then all second bytes, ... Exponents and mantissas then compress apart.
#include <errno.h>

#include "cpu.h"

namespace {

template <int ITEM>
void split_portable(const uint8_t *in, uint8_t *out, int64_t begin, int64_t count) {
    for (int64_t i = begin; i < count; ++i) {
        for (int k = 0; k < ITEM; ++k) out[k * count + i] = in[ITEM * i + k];
    }
}

template <int ITEM>
void join_portable(const uint8_t *in, uint8_t *out, int64_t begin, int64_t count) {
    for (int64_t i = begin; i < count; ++i) {
        for (int k = 0; k < ITEM; ++k) out[ITEM * i + k] = in[k * count + i];
    }
}

}  // namespace

extern "C" int32_t lmc_split_planes(const void *elements_in, void *planes_out, int64_t elements, int32_t itemsize) {
    const auto *in = static_cast<const uint8_t *>(elements_in);
    auto *out = static_cast<uint8_t *>(planes_out);
    if (itemsize == 2) {
        split_portable<2>(in, out, 0, elements);
    } else if (itemsize == 4) {
        split_portable<4>(in, out, 0, elements);
    } else {
        return -EINVAL;
    }
    return 0;
}

extern "C" int32_t lmc_join_planes(const void *planes_in, void *elements_out, int64_t elements, int32_t itemsize) {
    const auto *in = static_cast<const uint8_t *>(planes_in);
    auto *out = static_cast<uint8_t *>(elements_out);
    if (itemsize == 2) {
        join_portable<2>(in, out, 0, elements);
    } else if (itemsize == 4) {
        join_portable<4>(in, out, 0, elements);
    } else {
        return -EINVAL;
    }
    return 0;
}
