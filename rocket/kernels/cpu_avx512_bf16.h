// AVX-512 with VBMI2 and BF16: 32 columns at a time; vpexpandw spreads, vdpbf16ps multiplies pairs into fp32 sums.
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

// int8 is multiplied as in cpu_avx512.h, but vpexpandb spreads 64 columns at once.
template <>
struct Lanes<int8_t> : avx512::Lanes<int8_t> {
    static constexpr bool by_words = true;
    using Word = __m512i;
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
