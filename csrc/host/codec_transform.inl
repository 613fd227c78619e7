// The transform, W lanes at a time. Included once for each instruction set, inside a namespace of its own, with W
// (lanes of 32 bits) and LMC_DOT (sums + products of two pairs of 16-bit numbers each) defined.

typedef uint32_t V __attribute__((vector_size(4 * W)));  // modulo 2^32, as damaged blobs may make it
typedef int32_t S __attribute__((vector_size(4 * W)));
typedef uint32_t Pair __attribute__((may_alias));  // two 16-bit numbers, as they were stored

// Rows of 16-bit numbers by a matrix as in lmc_codec_profile. What stays in registers is ROWS x 4 W sums.
template <int ROWS>
void product_rows(const int16_t *in, const int16_t *matrix, int size, int32_t *out) {
    const auto *two = reinterpret_cast<const Pair *>(in);
    for (int column = 0; column < size; column += 4 * W) {
        const auto *at = reinterpret_cast<const int32_t *>(matrix) + column;
        V sums[ROWS][4] = {};
        for (int pair = 0; pair < size / 2; ++pair, at += size) {
            V m[4];
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) memcpy(m + k, at + k * W, sizeof(V));
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; ++row) {
                const V x = V{} + two[row * (size / 2) + pair];
#pragma GCC unroll 4
                for (int k = 0; k < 4; ++k) sums[row][k] = LMC_DOT(sums[row][k], x, m[k]);
            }
        }
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; ++row) {
#pragma GCC unroll 4
            for (int k = 0; k < 4; ++k) memcpy(out + row * size + column + k * W, &sums[row][k], sizeof(V));
        }
    }
}

void product(const int16_t *in, int rows, const int16_t *matrix, int size, int32_t *out) {
    constexpr int ROWS = W == 16 ? 6 : 3;
    for (; rows >= ROWS; rows -= ROWS, in += ROWS * size, out += ROWS * size) {
        product_rows<ROWS>(in, matrix, size, out);
    }
    for (; rows; --rows, in += size, out += size) product_rows<1>(in, matrix, size, out);
}

void turn_row(float *x, const Turning &t, int token, float sign) {
    const float *cosine = t.cosine + int64_t{token} * t.pairs, *sine = t.sine + int64_t{token} * t.pairs;
    for (int head = 0; head < t.heads; ++head, x += t.dim) {
        float *a = x, *b = x + t.pairs;
#pragma GCC ivdep
        for (int i = 0; i < t.pairs; ++i) lmc_cuda::turn(a[i], b[i], cosine[i], sign * sine[i]);
    }
}

template <class E>
bool to_components(const Turning &t, int tokens, const void *elements, float *x) {
    const auto *in = static_cast<const typename E::Element *>(elements);
    for (int done = 0; done < tokens;) {
        const int count = tokens - done < TRANSFORM_TOKENS ? tokens - done : TRANSFORM_TOKENS;
        int32_t exponents[TRANSFORM_TOKENS];
        for (int i = 0; i < count; ++i, in += t.channels) {
            float *row = x + int64_t{i} * t.channels;
#pragma GCC ivdep
            for (int c = 0; c < t.channels; ++c) row[c] = E::load(in[c]);
            if (t.mean) {
                turn_row(row, t, done + i, -1.0f);
#pragma GCC ivdep
                for (int c = 0; c < t.channels; ++c) row[c] -= t.mean[c];
            }
            uint32_t most = 0;
            for (int c = 0; c < t.channels; ++c) {
                const uint32_t size = lmc_cuda::bits_of(row[c]) & 0x7fffffff;
                most = most > size ? most : size;
            }
            if (!lmc_cuda::token_exponent(most, t.highest, exponents[i])) return false;
        }
        for (int block = 0; block < t.blocks; ++block) {
            for (int i = 0; i < count; ++i) {
                const float *from = x + int64_t{i} * t.channels + block * t.block;
                const float factor = lmc_cuda::two_to(lmc_cuda::FIXED_BITS - exponents[i]);
                int16_t *to = t.fixed + i * t.size;
#pragma GCC ivdep
                for (int c = 0; c < t.block; ++c) to[c] = static_cast<int16_t>(lmc_cuda::rint_small(from[c] * factor));
                for (int c = t.block; c < t.size; ++c) to[c] = 0;
            }
            product(t.fixed, count, t.matrix + int64_t{block} * t.size * t.size, t.size, t.sums);
            for (int i = 0; i < count; ++i) {
                float *to = x + int64_t{i} * t.channels + block * t.block;
                const float factor = lmc_cuda::two_to(exponents[i] - lmc_cuda::FIXED_BITS - lmc_cuda::UNIT_BITS);
                const int32_t *from = t.sums + i * t.size;
#pragma GCC ivdep
                for (int c = 0; c < t.block; ++c) to[c] = static_cast<float>(from[c]) * factor;
            }
        }
        x += int64_t{count} * t.channels;
        done += count;
    }
    return true;
}

template <class E>
void from_components(const Turning &t, int tokens, const float *steps, float *x, int64_t stride, void *elements) {
    auto *out = static_cast<typename E::Element *>(elements);
    for (int done = 0; done < tokens;) {
        const int count = tokens - done < TRANSFORM_TOKENS ? tokens - done : TRANSFORM_TOKENS;
        for (int block = 0; block < t.blocks; ++block) {
            for (int i = 0; i < count; ++i) {
                const float *from = x + i * stride + block * t.block;
                int16_t *to = t.fixed + i * t.size;
#pragma GCC ivdep
                for (int c = 0; c < t.size; ++c) to[c] = static_cast<int16_t>(static_cast<int32_t>(from[c]));
            }
            product(t.fixed, count, t.matrix + int64_t{block} * t.size * t.size, t.size, t.sums);
            const float *mean = t.mean ? t.mean + block * t.block : nullptr;
            for (int i = 0; i < count; ++i) {
                float *to = x + i * stride + block * t.block;
                const float factor = steps[done + i] * lmc_cuda::two_to(-lmc_cuda::UNIT_BITS);
                const int32_t *from = t.sums + i * t.size;
                if (mean) {
#pragma GCC ivdep
                    for (int c = 0; c < t.block; ++c) to[c] = static_cast<float>(from[c]) * factor + mean[c];
                } else {
#pragma GCC ivdep
                    for (int c = 0; c < t.block; ++c) to[c] = static_cast<float>(from[c]) * factor;
                }
            }
        }
        for (int i = 0; i < count; ++i, x += stride, out += t.channels) {
            if (t.mean) turn_row(x, t, done + i, 1.0f);
#pragma GCC ivdep
            for (int c = 0; c < t.channels; ++c) out[c] = static_cast<typename E::Element>(E::store(x[c]));
        }
        done += count;
    }
}

void find_angles(const uint64_t *turns, int pairs, uint64_t position, int tokens, float *cosine, float *sine) {
    for (int t = 0; t < tokens; ++t, ++position, cosine += pairs, sine += pairs) {
#pragma GCC ivdep
        for (int i = 0; i < pairs; ++i) lmc_cuda::angle_of(turns[i], position, cosine[i], sine[i]);
    }
}

constexpr TransformKernels kernels = {{to_components<Half<lmc_cuda::Bf16>>, to_components<Half<lmc_cuda::Fp16>>, to_components<Whole>},
                                      {from_components<Half<lmc_cuda::Bf16>>, from_components<Half<lmc_cuda::Fp16>>, from_components<Whole>},
                                      find_angles};
