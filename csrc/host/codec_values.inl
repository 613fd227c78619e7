// Values <-> symbols, W lanes at a time: the part of the codec that a compiler vectorises as well as a person.
// Included once for each instruction set, inside an unnamed namespace, with W defined.

typedef float VF __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint64_t VL __attribute__((vector_size(8 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));
typedef uint8_t VB __attribute__((vector_size(W)));
typedef int16_t VS __attribute__((vector_size(2 * W)));
typedef int16_t Shorts __attribute__((vector_size(4 * W)));
typedef uint16_t Words __attribute__((vector_size(4 * W)));

template <class V>
inline V get(const void *from) {
    V v;
    memcpy(&v, from, sizeof v);
    return v;
}
template <class V>
inline void put(void *to, V v) {
    memcpy(to, &v, sizeof v);
}
template <class To, class From>
inline To as(From v) {
    To out;
    static_assert(sizeof out == sizeof v, "a cast of bits");
    memcpy(&out, &v, sizeof out);
    return out;
}
template <class To, class From>
inline To to(From v) {
    return __builtin_convertvector(v, To);
}
inline VU pick(VI mask, VU yes, VU no) { return (as<VU>(mask) & yes) | (~as<VU>(mask) & no); }

// rint for |v| <= 2^22; beyond, up to 2^31, a number whose size is above 2^22 too: out of every range asked for.
constexpr float MAGIC_FLOAT = 12582912.0f;  // 1.5 * 2^23
inline VI round_int(VF v) { return as<VI>(as<VU>(v + MAGIC_FLOAT) - 0x4b400000u); }

// 2 W channels are worked on as two halves: in order, or even and odd ones where two share a lane of 32 bits.
struct InOrder {
    static int channel(int half, int k) { return half * W + k; }
    template <class V>
    static V each(const void *of_channels, int half) {
        return get<V>(static_cast<const uint8_t *>(of_channels) + half * sizeof(V));
    }
    static VI symbols(const int16_t *p, int half) { return to<VI>(get<VS>(p + half * W)); }
    static void put_entries(uint16_t *p, VU first, VU second) {
        put(p, to<VH>(first));
        put(p + W, to<VH>(second));
    }
};
struct EvenOdd {
    static int channel(int half, int k) { return 2 * k + half; }
    template <class V>
    static V each(const void *of_channels, int half) {
        const VL two = get<VL>(of_channels);
        return as<V>(to<VU>(half ? two >> 32 : two));
    }
    static VI symbols(const int16_t *p, int half) { return half ? get<VI>(p) >> 16 : as<VI>(get<VU>(p) << 16) >> 16; }
    static void put_entries(uint16_t *p, VU even, VU odd) { put(p, even | odd << 16); }
};
struct Bf16 : EvenOdd {
    using Element = uint16_t;
    static VF load(const Element *p, int half) { return as<VF>(half ? get<VU>(p) & 0xffff0000 : get<VU>(p) << 16); }
    static void store(Element *p, VF even, VF odd) { put(p, round(even) >> 16 | (round(odd) & 0xffff0000)); }

private:
    static VU round(VF v) { return as<VU>(v) + 0x7fff + ((as<VU>(v) >> 16) & 1); }
};
struct F16 : InOrder {
    using Element = uint16_t;
    static VF load(const Element *p, int half) {
        const VU bits = to<VU>(get<VH>(p + half * W)), size = bits & 0x7fff;
        // Denormals as integers times 2^-24; the rest by moving the exponent.
        const VF small = to<VF>(as<VI>(size)) * 5.9604644775390625e-08f;
        const VU large = (size << 13) + (112u << 23);
        return as<VF>(pick(size < 0x400, as<VU>(small), large) | ((bits & 0x8000) << 16));
    }
    static void store(Element *p, VF first, VF second) {
        put(p, narrow(first));
        put(p + W, narrow(second));
    }

private:
    static VH narrow(VF v) {
        const VU bits = as<VU>(v), size = bits & 0x7fffffff;
        const VU small = as<VU>(as<VF>(size) + 0.5f) - 0x3f000000;
        const VU normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
        const VU inf = VU{} + 0x7c00;
        const VU out = pick(size >= 0x47800000, inf, pick(size < 0x38800000, small, normal));
        return to<VH>(out | ((bits >> 16) & 0x8000));
    }
};
struct F32 : InOrder {
    using Element = float;
    static VF load(const Element *p, int half) { return get<VF>(p + half * W); }
    static void store(Element *p, VF first, VF second) {
        put(p, first);
        put(p + W, second);
    }
};

// Two signed 16-bit numbers in each lane: their products with those of another, added up.
inline VI dot(VI a, VI b) {
#if W == 16
    return as<VI>(_mm512_madd_epi16(as<__m512i>(a), as<__m512i>(b)));
#elif W == 8
    return as<VI>(_mm256_madd_epi16(as<__m256i>(a), as<__m256i>(b)));
#else
    return as<VI>(as<VU>((as<VI>(as<VU>(a) << 16) >> 16) * (as<VI>(as<VU>(b) << 16) >> 16)) + as<VU>((a >> 16) * (b >> 16)));
#endif
}
inline VI two(VI low, VI high) { return as<VI>((as<VU>(low) & 0xffff) | as<VU>(high) << 16); }

template <class E>
uint32_t peak(const void *in, int64_t count) {
    using Word = typename std::conditional<sizeof(E) == 2, uint16_t, uint32_t>::type;
    typedef Word V __attribute__((vector_size(4 * W)));
    constexpr int STEP = 4 * W / sizeof(Word);
    const Word *p = static_cast<const Word *>(in);
    V most = {};
    int64_t i = 0;
    for (; i + STEP <= count; i += STEP) {
        const V size = get<V>(p + i) & static_cast<Word>(sizeof(E) == 2 ? 0x7fff : 0x7fffffff);
        most = most > size ? most : size;
    }
    uint32_t found = 0;
    for (int k = 0; k < STEP; ++k) found = most[k] > found ? most[k] : found;
    for (; i < count; ++i) {
        const uint32_t size = p[i] & (sizeof(E) == 2 ? 0x7fffu : 0x7fffffffu);
        found = size > found ? size : found;
    }
    return found;
}

template <class T>
uint64_t energy(const void *in, int64_t count, float scale) {
    const auto *p = static_cast<const typename T::Element *>(in);
    uint64_t total = 0;
    typename T::Element last[2 * W] = {};
    for (int64_t i = 0; i < count;) {
        // f * f is at most 2^28: 14 of them fit 32 bits.
        VU sum = {};
        for (int k = 0; k < 7 && i < count; ++k, i += 2 * W) {
            const auto *from = p + i;
            if (count - i < 2 * W) {
                memcpy(last, from, static_cast<size_t>(count - i) * sizeof *p);
                from = last;
            }
            const VI f = two(round_int(T::load(from, 0) * scale), round_int(T::load(from, 1) * scale));
            sum += as<VU>(dot(f, f));
        }
        for (int k = 0; k < W; ++k) total += sum[k];
    }
    return total;
}

template <class T>
uint64_t spread(const void *in, int64_t stride, int tokens, float scale) {
    const auto *p = static_cast<const typename T::Element *>(in);
    uint64_t total = 0;
    for (int part = 0; part < GROUP / W; ++part) {
        const auto *from = p + part / 2 * 2 * W;
        VI s1 = {};
        VL s2 = {};
        for (int t = 0; t < tokens;) {
            VU sum = {};
            for (int k = 0; k < 7 && t < tokens; ++k, t += 2) {
                const VI f = round_int(T::load(from + t * stride, part % 2) * scale);
                const VI g = t + 1 < tokens ? round_int(T::load(from + (t + 1) * stride, part % 2) * scale) : VI{};
                s1 += f + g;
                sum += as<VU>(dot(two(f, g), two(f, g)));
            }
            s2 += to<VL>(sum);
        }
        for (int k = 0; k < W; ++k) {
            const auto mean = static_cast<int64_t>(s1[k]);
            total += static_cast<uint64_t>(tokens) * s2[k] - static_cast<uint64_t>(mean * mean);
        }
    }
    return total;
}

template <class T, bool PREDICT>
void measure(const void *in, int64_t stride, int tokens, const float *token_scale, Measure *out) {
    const auto *p = static_cast<const typename T::Element *>(in);
    for (int part = 0; part < GROUP / W; ++part) {
        const auto *from = p + part / 2 * 2 * W;
        VI low = VI{} + INT32_MAX, high = VI{} + INT32_MIN;
        Shorts step_low = {}, step_high = {};
        const VI start = round_int(T::load(from, part % 2) * token_scale[0]);
        VU before = as<VU>(start) & 0xffff, q1 = {}, energy = {};
        VL q2 = {};
        for (int t = 0; t < tokens;) {
            // |q| <= 32767, or the row is stored raw: 4 squares fit 32 bits, and a step what it is used for, |q - anchor| <= 127.
            VU sum = {};
            for (int k = 0; k < 2 && t < tokens; ++k, t += 2) {
                const bool alone = t + 1 == tokens;
                const VI q = round_int(T::load(from + t * stride, part % 2) * token_scale[t]);
                const VI r = alone ? q : round_int(T::load(from + (t + 1) * stride, part % 2) * token_scale[t + 1]);
                low = low < q ? low : q;
                low = low < r ? low : r;
                high = high > q ? high : q;
                high = high > r ? high : r;
                const VI pair = two(q, r), counted = alone ? as<VI>(as<VU>(q) & 0xffff) : pair;
                q1 += as<VU>(q) + (alone ? VU{} : as<VU>(r));
                sum += as<VU>(dot(counted, counted));
                if (PREDICT) {
                    const Shorts step = as<Shorts>(as<Words>(pair) - as<Words>(before | as<VU>(pair) << 16));
                    energy += as<VU>(dot(as<VI>(step), as<VI>(step)));
                    step_low = step_low < step ? step_low : step;
                    step_high = step_high > step ? step_high : step;
                    before = as<VU>(pair) >> 16;
                }
            }
            q2 += to<VL>(sum);
        }
        for (int k = 0; k < W; ++k) {
            const int c = part / 2 * 2 * W + T::channel(part % 2, k);
            out->q1[c] = static_cast<int32_t>(q1[k]);
            out->q2[c] = static_cast<int64_t>(q2[k]);
            out->low[c] = low[k];
            out->high[c] = high[k];
            if (PREDICT) {
                out->first[c] = start[k];
                out->energy[c] = energy[k];
                const int up = step_high[2 * k] > step_high[2 * k + 1] ? step_high[2 * k] : step_high[2 * k + 1];
                const int down = step_low[2 * k] < step_low[2 * k + 1] ? step_low[2 * k] : step_low[2 * k + 1];
                out->widest[c] = up > -down ? up : -down;
            }
        }
    }
}

template <class T, bool PREDICT>
void quantise(const void *in, int64_t stride, int tokens, bool begins, const float *token_scale,
              const Channels *channels, uint16_t *entries) {
    const auto *p = static_cast<const typename T::Element *>(in);
    for (int c = 0; c < GROUP; c += 2 * W) {
        VF scale[2];
        VI round[2], halve[2], before[2];
        VU entry[2];
        for (int h = 0; h < 2; ++h) {
            scale[h] = T::template each<VF>(channels->scale + c, h);
            round[h] = T::template each<VI>(channels->round + c, h);
            halve[h] = T::template each<VI>(channels->halve + c, h);
            entry[h] = T::template each<VU>(channels->entry + c, h);
            before[h] = T::template each<VI>(channels->previous + c, h);
            if (PREDICT && !begins) before[h] = round_int(T::load(p - stride + c, h) * (scale[h] * token_scale[-1]));
        }
        for (int t = 0; t < tokens; ++t) {
            VU found[2];
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                const VI q = round_int(T::load(p + t * stride + c, h) * (scale[h] * token_scale[t]));
                const VI symbol = PREDICT ? q - ((before[h] + round[h]) >> halve[h]) : q;
                before[h] = q;
                found[h] = entry[h] | (as<VU>(symbol) & 255);
            }
            T::put_entries(entries + t * GROUP + c, found[0], found[1]);
        }
    }
}

template <class T, bool PREDICT>
void restore(const int16_t *symbols, int tokens, const float *token_scale, Channels *channels, void *out,
             int64_t stride) {
    auto *p = static_cast<typename T::Element *>(out);
    for (int c = 0; c < GROUP; c += 2 * W) {
        VF scale[2];
        VI round[2], halve[2], q[2];
        for (int h = 0; h < 2; ++h) {
            scale[h] = T::template each<VF>(channels->scale + c, h);
            round[h] = T::template each<VI>(channels->round + c, h);
            halve[h] = T::template each<VI>(channels->halve + c, h);
            q[h] = T::template each<VI>(channels->previous + c, h);
        }
        for (int t = 0; t < tokens; ++t) {
            VF value[2];
#pragma GCC unroll 2
            for (int h = 0; h < 2; ++h) {
                const VI symbol = T::symbols(symbols + t * GROUP + c, h);
                q[h] = PREDICT ? symbol + ((q[h] + round[h]) >> halve[h]) : symbol;
                value[h] = to<VF>(q[h]) * (scale[h] * token_scale[t]);
            }
            T::store(p + t * stride + c, value[0], value[1]);
        }
        for (int h = 0; h < 2; ++h) {
            for (int k = 0; k < W; ++k) channels->previous[c + T::channel(h, k)] = q[h][k];
        }
    }
}

// Elements of EXPONENT and MANTISSA bits and a sign.
template <class Word, int EXPONENT, int MANTISSA>
struct Fields {
    static constexpr int REST = MANTISSA + 1, BYTES = REST >> 3, BITS = REST & 7;
    static constexpr uint32_t FIELD = (1u << EXPONENT) - 1, LOW_BITS = (1u << MANTISSA) - 1;
    typedef Word V __attribute__((vector_size(sizeof(Word) * W)));

    static void scan(const void *in, int64_t stride, int tokens, Measure *out) {
        const Word *p = static_cast<const Word *>(in);
        for (int c = 0; c < GROUP; c += W) {
            VU sum = {}, low = VU{} + FIELD, high = {};
            for (int t = 0; t < tokens; ++t) {
                const VU field = (to<VU>(get<V>(p + t * stride + c)) >> MANTISSA) & FIELD;
                sum += field;
                low = low < field ? low : field;
                high = high > field ? high : field;
            }
            for (int k = 0; k < W; ++k) {
                out->q1[c + k] = sum[k];
                out->low[c + k] = static_cast<int32_t>(low[k]);
                out->high[c + k] = static_cast<int32_t>(high[k]);
            }
        }
    }

    static void split(const void *in, int64_t stride, int tokens, const Channels *channels, uint16_t *entries,
                      uint8_t *rest, int at, int tile) {
        const Word *p = static_cast<const Word *>(in);
        uint8_t *planes = rest + BYTES * GROUP * tile;
        for (int t = 0; t < tokens; ++t) {
            uint64_t bits[8] = {};
            for (int c = 0; c < GROUP; c += W) {
                const VU word = to<VU>(get<V>(p + t * stride + c));
                const VU symbol = get<VU>(channels->top + c) - ((word >> MANTISSA) & FIELD);
                put(entries + t * GROUP + c, to<VH>(get<VU>(channels->entry + c) | symbol));
                const VU left = (word >> (EXPONENT + MANTISSA)) << MANTISSA | (word & LOW_BITS);
                for (int k = 0; k < BYTES; ++k) put(rest + (k * tile + at + t) * GROUP + c, to<VB>((left >> 8 * k) & 255));
                for (int k = 0; k < BITS; ++k) {
                    const VU bit = (left >> (8 * BYTES + k)) & 1;
                    for (int i = 0; i < W; ++i) bits[k] |= static_cast<uint64_t>(bit[i]) << (c + i);
                }
            }
            for (int k = 0; k < BITS; ++k) memcpy(planes + (k * tile + at + t) * 8, bits + k, 8);
        }
    }

    static void join(const int16_t *symbols, int tokens, const Channels *channels, const uint8_t *rest, int at, int tile,
                     void *out, int64_t stride) {
        Word *p = static_cast<Word *>(out);
        const uint8_t *planes = rest + BYTES * GROUP * tile;
        for (int t = 0; t < tokens; ++t) {
            uint64_t bits[8] = {};
            for (int k = 0; k < BITS; ++k) memcpy(bits + k, planes + (k * tile + at + t) * 8, 8);
            for (int c = 0; c < GROUP; c += W) {
                VU left = {};
                for (int k = 0; k < BYTES; ++k) left |= to<VU>(get<VB>(rest + (k * tile + at + t) * GROUP + c)) << 8 * k;
                for (int k = 0; k < BITS; ++k) {
                    VU bit;
                    for (int i = 0; i < W; ++i) bit[i] = static_cast<uint32_t>(bits[k] >> (c + i)) & 1;
                    left |= bit << (8 * BYTES + k);
                }
                const VU symbol = as<VU>(to<VI>(get<VS>(symbols + t * GROUP + c)));
                const VU field = (get<VU>(channels->top + c) - symbol) & FIELD;
                const VU word = (left >> MANTISSA) << (EXPONENT + MANTISSA) | field << MANTISSA | (left & LOW_BITS);
                put(p + t * stride + c, to<V>(word));
            }
        }
    }
};

void check_sums(const uint8_t *data, int64_t words, uint64_t first, uint64_t *plain, uint64_t *weighted) {
    typedef uint64_t V __attribute__((vector_size(4 * W)));
    // Adding the running sums up gives the first of n pairs of words the weight n, the last 1: the weights wanted, mirrored.
    V low = {}, high = {}, running = {};
    int64_t i = 0;
    for (; i + W <= words; i += W) {
        const V two = get<V>(data + 4 * i);
        low += two & 0xffffffff;
        high += two >> 32;
        running += low + high;
    }
    uint64_t a = 0, b = 0;
    for (int k = 0; k < W / 2; ++k) {
        const uint64_t weight = first + 1 + static_cast<uint64_t>(i + 2 * k);
        a += low[k] + high[k];
        b += low[k] * weight + high[k] * (weight + 1) - W * running[k];
    }
    for (; i < words; ++i) {
        uint32_t word;
        memcpy(&word, data + 4 * i, sizeof word);
        a += word;
        b += word * (first + 1 + static_cast<uint64_t>(i));
    }
    *plain += a;
    *weighted += b;
}

template <class T>
constexpr Values values_of() {
    return {peak<typename T::Element>, energy<T>, spread<T>,
            {measure<T, false>, measure<T, true>}, {quantise<T, false>, quantise<T, true>}, {restore<T, false>, restore<T, true>}};
}
template <class F>
constexpr Bits bits_of() {
    return {F::scan, F::split, F::join};
}
constexpr Kernels make_kernels(decltype(Kernels::decode) decode, decltype(Kernels::encode) encode,
                               decltype(Kernels::decode_bf16) decode_bf16) {
    return {{values_of<Bf16>(), values_of<F16>(), values_of<F32>()},
            {bits_of<Fields<uint16_t, 8, 7>>(), bits_of<Fields<uint16_t, 5, 10>>(), bits_of<Fields<uint32_t, 8, 23>>(),
             bits_of<Fields<uint8_t, 4, 3>>(), bits_of<Fields<uint8_t, 5, 2>>()},
            check_sums, decode, encode, decode_bf16};
}
