// Values <-> symbols, W lanes at a time: the part of the codec that a compiler vectorises as well as a person.
// Included once for each instruction set, inside an unnamed namespace, with W defined.

typedef float VF __attribute__((vector_size(4 * W)));
typedef int32_t VI __attribute__((vector_size(4 * W)));
typedef uint32_t VU __attribute__((vector_size(4 * W)));
typedef uint64_t VL __attribute__((vector_size(8 * W)));
typedef uint16_t VH __attribute__((vector_size(2 * W)));
typedef uint8_t VB __attribute__((vector_size(W)));
typedef int16_t VS __attribute__((vector_size(2 * W)));

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

struct Bf16 {
    using Element = uint16_t;
    static constexpr uint32_t MAGNITUDE = 0x7fff;
    static VF load(const Element *p) { return as<VF>(to<VU>(get<VH>(p)) << 16); }
    static void store(Element *p, VF v) {
        const VU bits = as<VU>(v);
        put(p, to<VH>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16));
    }
};
struct F16 {
    using Element = uint16_t;
    static constexpr uint32_t MAGNITUDE = 0x7fff;
    static VF load(const Element *p) {
        const VU half = to<VU>(get<VH>(p)), size = half & 0x7fff;
        // Denormals as integers times 2^-24; the rest by moving the exponent.
        const VF small = to<VF>(as<VI>(size)) * 5.9604644775390625e-08f;
        const VU large = (size << 13) + (112u << 23);
        return as<VF>(pick(size < 0x400, as<VU>(small), large) | ((half & 0x8000) << 16));
    }
    static void store(Element *p, VF v) {
        const VU bits = as<VU>(v), size = bits & 0x7fffffff;
        const VU small = as<VU>(as<VF>(size) + 0.5f) - 0x3f000000;
        const VU normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
        const VU inf = VU{} + 0x7c00;
        const VU out = pick(size >= 0x47800000, inf, pick(size < 0x38800000, small, normal));
        put(p, to<VH>(out | ((bits >> 16) & 0x8000)));
    }
};
struct F32 {
    using Element = float;
    static constexpr uint32_t MAGNITUDE = 0x7fffffff;
    static VF load(const Element *p) { return get<VF>(p); }
    static void store(Element *p, VF v) { put(p, v); }
};

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
    int64_t i = 0;
    while (i + W <= count) {
        // f * f is at most 2^28: 15 of them fit 32 bits.
        VU sum = {};
        for (int k = 0; k < 15 && i + W <= count; ++k, i += W) {
            const VI f = round_int(T::load(p + i) * scale);
            sum += as<VU>(f * f);
        }
        for (int k = 0; k < W; ++k) total += sum[k];
    }
    if (i < count) {
        typename T::Element last[W] = {};
        memcpy(last, p + i, static_cast<size_t>(count - i) * sizeof *p);
        const VI f = round_int(T::load(last) * scale);
        for (int k = 0; k < W; ++k) total += static_cast<uint64_t>(f[k] * f[k]);
    }
    return total;
}

template <class T>
uint64_t spread(const void *in, int64_t stride, int tokens, float scale) {
    const auto *p = static_cast<const typename T::Element *>(in);
    uint64_t total = 0;
    for (int c = 0; c < GROUP; c += W) {
        VI s1 = {};
        VL s2 = {};
        for (int t = 0; t < tokens;) {
            VU sum = {};
            for (int end = t + 15 < tokens ? t + 15 : tokens; t < end; ++t) {
                const VI f = round_int(T::load(p + t * stride + c) * scale);
                s1 += f;
                sum += as<VU>(f * f);
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
    for (int c = 0; c < GROUP; c += W) {
        VI low = VI{} + INT32_MAX, high = VI{} + INT32_MIN, step_low = {}, step_high = {};
        VU q1 = {};
        VI before = round_int(T::load(p + c) * token_scale[0]);
        put(out->first + c, before);
        VU energy = {};
        VL q2 = {};
        for (int t = 0; t < tokens;) {
            // |q| <= 32767, or the row is stored raw: 4 squares fit 32 bits.
            VU sum = {};
            for (int end = t + 4 < tokens ? t + 4 : tokens; t < end; ++t) {
                const VI q = round_int(T::load(p + t * stride + c) * token_scale[t]);
                q1 += as<VU>(q);
                sum += as<VU>(q) * as<VU>(q);
                low = low < q ? low : q;
                high = high > q ? high : q;
                if (PREDICT) {  // used only where |q - anchor| <= 127: then nothing here overflows
                    const VI step = as<VI>(as<VU>(q) - as<VU>(before));
                    energy += as<VU>(step) * as<VU>(step);
                    step_low = step_low < step ? step_low : step;
                    step_high = step_high > step ? step_high : step;
                    before = q;
                }
            }
            q2 += to<VL>(sum);
        }
        for (int k = 0; k < W; ++k) {
            out->q1[c + k] = static_cast<int32_t>(q1[k]);
            out->q2[c + k] = static_cast<int64_t>(q2[k]);
            out->low[c + k] = low[k];
            out->high[c + k] = high[k];
            if (PREDICT) {
                out->energy[c + k] = energy[k];
                const int64_t down = -static_cast<int64_t>(step_low[k]);
                out->widest[c + k] = static_cast<int32_t>(step_high[k] > down ? step_high[k] : down);
            }
        }
    }
}

template <class T, bool PREDICT>
void quantise(const void *in, int64_t stride, int tokens, bool begins, const float *token_scale,
              const Channels *channels, uint16_t *entries) {
    const auto *p = static_cast<const typename T::Element *>(in);
    for (int c = 0; c < GROUP; c += W) {
        const VF scale = get<VF>(channels->scale + c);
        const VI anchor = get<VI>(channels->anchor + c), entry = get<VI>(channels->entry + c);
        const VI round = get<VI>(channels->round + c), halve = get<VI>(channels->halve + c);
        VI before = {};
        if (PREDICT && !begins) before = round_int(T::load(p - stride + c) * (scale * token_scale[-1])) - anchor;
        for (int t = 0; t < tokens; ++t) {
            const VI r = round_int(T::load(p + t * stride + c) * (scale * token_scale[t])) - anchor;
            const VI symbol = PREDICT ? r - ((before + round) >> halve) : r;
            if (PREDICT) before = r;
            put(entries + t * GROUP + c, to<VH>(as<VU>(entry | (symbol & 255))));
        }
    }
}

template <class T, bool PREDICT>
void restore(const int16_t *symbols, int tokens, const float *token_scale, Channels *channels, void *out,
             int64_t stride) {
    auto *p = static_cast<typename T::Element *>(out);
    for (int c = 0; c < GROUP; c += W) {
        const VF scale = get<VF>(channels->scale + c);
        const VI anchor = get<VI>(channels->anchor + c);
        const VI round = get<VI>(channels->round + c), halve = get<VI>(channels->halve + c);
        VI r = get<VI>(channels->previous + c);
        for (int t = 0; t < tokens; ++t) {
            const VI symbol = to<VI>(get<VS>(symbols + t * GROUP + c));
            r = PREDICT ? symbol + ((r + round) >> halve) : symbol;
            T::store(p + t * stride + c, to<VF>(r + anchor) * (scale * token_scale[t]));
        }
        put(channels->previous + c, r);
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
                const VU symbol = get<VU>(channels->anchor + c) - ((word >> MANTISSA) & FIELD);
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
                const VU field = (get<VU>(channels->anchor + c) - symbol) & FIELD;
                const VU word = (left >> MANTISSA) << (EXPONENT + MANTISSA) | field << MANTISSA | (left & LOW_BITS);
                put(p + t * stride + c, to<V>(word));
            }
        }
    }
};

void check_sums(const uint8_t *data, int64_t words, uint64_t first, uint64_t *plain, uint64_t *weighted) {
    // Adding the running sum up gives the first of n words the weight n, the last 1: the weights wanted, mirrored.
    VL sum = {}, running = {};
    int64_t i = 0;
    for (; i + W <= words; i += W) {
        sum += to<VL>(get<VU>(data + 4 * i));
        running += sum;
    }
    uint64_t a = 0, b = 0;
    for (int k = 0; k < W; ++k) {
        a += sum[k];
        b += sum[k] * (first + 1 + static_cast<uint64_t>(i + k)) - W * running[k];
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
                               decltype(Kernels::decode_bf16) decode_bf16 = nullptr) {
    return {{values_of<Bf16>(), values_of<F16>(), values_of<F32>()},
            {bits_of<Fields<uint16_t, 8, 7>>(), bits_of<Fields<uint16_t, 5, 10>>(), bits_of<Fields<uint32_t, 8, 23>>(),
             bits_of<Fields<uint8_t, 4, 3>>(), bits_of<Fields<uint8_t, 5, 2>>()},
            check_sums, decode, encode, decode_bf16};
}
