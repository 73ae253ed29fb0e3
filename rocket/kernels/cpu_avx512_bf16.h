// AVX-512 with VBMI, VBMI2 and BF16: 32 columns at a time; vpexpandw spreads, vdpbf16ps multiplies pairs into fp32 sums.
static constexpr int MAX_TILE = 8, MAX_ROWS = 2;

static inline __mmask32 first_lanes(int64_t count) {
    return count >= 32 ? __mmask32(0xffffffff) : count <= 0 ? __mmask32(0) : __mmask32((1u << count) - 1);
}

// T: bf16, or fp16 for expansion alone, which moves bits and does not compute.
template <class T>
struct Lanes {
    using Operand = T;
    using Vector = __m512i;
    using Sum = __m512;
    static constexpr int width = 32;
    static constexpr bool by_words = false;
    using Word = uint64_t;

    static Sum zero() { return _mm512_setzero_ps(); }
    static Vector load(const T* p) { return _mm512_loadu_si512(p); }
    static Vector load_first(const T* p, int64_t count) { return _mm512_maskz_loadu_epi16(first_lanes(count), p); }
    static Vector expand(const T* p, uint64_t bits) {
        Vector packed = load(p), spread;
        // As in cpu_avx512.h.
        asm("vpxord %0, %0, %0\n\tvpexpandw %1, %0%{%2%}%{z%}" : "=&v"(spread) : "v"(packed), "Yk"(__mmask32(bits)));
        return spread;
    }
    static Vector operand(const T* p) { return _mm512_loadu_si512(p); }
    static Sum multiply_add(Sum sum, Vector a, Vector b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
    static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
    static void store(T* p, Vector vector) { _mm512_storeu_si512(p, vector); }
    static void store_first(T* p, Vector vector, int64_t count) {
        _mm512_mask_storeu_epi16(p, first_lanes(count), vector);
    }
};

// int8 by x in fp32 or fp16 is multiplied as in cpu_avx512.h, but vpexpandb spreads 64 columns at once.
template <>
struct Lanes<int8_t> : avx512::Lanes<int8_t> {
    static constexpr bool by_words = true;
    using Word = __m512i;
    static Word whole(const int8_t* p) { return _mm512_loadu_si512(p); }
    static Word whole_first(const int8_t* p, int64_t count) {
        return _mm512_maskz_loadu_epi8(count >= 64 ? ~__mmask64(0) : __mmask64(low_bits(int(count))), p);
    }
    static Word spread(const int8_t* p, uint64_t bits) {
        __m512i packed = _mm512_loadu_si512(p), spread;
        asm("vpxord %0, %0, %0\n\tvpexpandb %1, %0%{%2%}%{z%}" : "=&v"(spread) : "v"(packed), "Yk"(__mmask64(bits)));
        return spread;
    }
    static Vector part(Word word, int step) {
        const __m128i bytes = step == 0   ? _mm512_castsi512_si128(word)
                              : step == 1 ? _mm512_extracti32x4_epi32(word, 1)
                              : step == 2 ? _mm512_extracti32x4_epi32(word, 2)
                                          : _mm512_extracti32x4_epi32(word, 3);
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
    }
};

// int8 by x in bf16: bf16 holds every int8 exactly, so that 32 columns are multiplied at once. The two bytes of each are
// looked up by the magnitude. Interleaving them leaves 64 columns in the order of `prepare_mixed`.
struct mixed {
    int8_t value;
};

// High or low bytes of the numbers 0 ... 127 in bf16. Known when compiled: what runs as the library is loaded must not
// need these instructions.
template <int SHIFT>
struct Bytes {
    alignas(64) uint8_t of[128];
    constexpr Bytes() : of() {
        for (int i = 1, exponent = 0; i < 128; i++) {
            if (i >> (exponent + 1)) exponent++;
            of[i] = uint8_t(((127 + exponent) << 7 | ((i << (7 - exponent)) & 0x7f)) >> SHIFT);
        }
    }
};
static constexpr Bytes<8> HIGH;
static constexpr Bytes<0> LOW;

template <>
struct Lanes<mixed> : Lanes<bf16> {
    static constexpr bool by_words = true;
    struct Word {
        __m512i parts[2];
    };
    static Word whole(const mixed* p) { return widened(Lanes<int8_t>::whole(&p->value)); }
    static Word whole_first(const mixed* p, int64_t count) {
        return widened(Lanes<int8_t>::whole_first(&p->value, count));
    }
    static Word spread(const mixed* p, uint64_t bits) { return widened(Lanes<int8_t>::spread(&p->value, bits)); }
    static Vector part(const Word& word, int step) { return word.parts[step]; }

private:
    static Word widened(__m512i bytes) {
        const __m512i magnitude = _mm512_abs_epi8(bytes), signs = _mm512_set1_epi8(char(0x80));
        __m512i high = _mm512_permutex2var_epi8(table(HIGH.of), magnitude, table(HIGH.of + 64));
        const __m512i low = _mm512_permutex2var_epi8(table(LOW.of), magnitude, table(LOW.of + 64));
        high = _mm512_ternarylogic_epi64(high, bytes, signs, 0xf8);  // high | (bytes & signs)
        return {{_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)}};
    }
    static __m512i table(const uint8_t* p) { return _mm512_load_si512(p); }
};

// x as `mixed` is multiplied: of each 64 columns those that unpacklo makes first, eight of every sixteen.
static void prepare_mixed(const void* x, int64_t x_stride, int64_t batch, int64_t cols, void* operands, int64_t rows,
                          int64_t stride) {
    const auto* from = static_cast<const bf16*>(x);
    auto* to = static_cast<bf16*>(operands);
    for (int64_t row = 0; row < rows; row++) {
        for (int64_t block = 0; block < stride; block += 64) {
            bf16 columns[64] = {};
            const int64_t left = row < batch ? cols - block : 0;
            if (left > 0)
                memcpy(columns, from + row * x_stride + block, size_t(left < 64 ? left : 64) * sizeof(bf16));
            bf16* first = to + row * stride + block;
            for (int eight = 0; eight < 8; eight++)
                memcpy(first + eight / 2 * 8 + eight % 2 * 32, columns + eight * 8, 8 * sizeof(bf16));
        }
    }
}
