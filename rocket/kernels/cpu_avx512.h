// AVX-512 F, BW, DQ, VL: sixteen columns at a time, multiplied in fp32; vexpandps puts values in their places.
static constexpr int MAX_TILE = 8, MAX_ROWS = 2;

static inline __mmask16 first_lanes(int64_t count) {
    return count >= 16 ? __mmask16(0xffff) : count <= 0 ? __mmask16(0) : __mmask16((1u << count) - 1);
}

static inline __m512 floats(__mmask16 lanes, const float* p) { return _mm512_maskz_loadu_ps(lanes, p); }
static inline __m512 floats(__mmask16 lanes, const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline __m512 floats(__mmask16 lanes, const fp16* p) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, p));
}
static inline __m512 floats(__mmask16 lanes, const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, p)));
}

static inline __m512 floats(const float* p) { return _mm512_loadu_ps(p); }
static inline __m512 floats(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
static inline __m512 floats(const fp16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
static inline __m512 floats(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// Only ever stores what was loaded, so narrowing is exact.
static inline void narrow(float* p, __mmask16 lanes, __m512 vector) { _mm512_mask_storeu_ps(p, lanes, vector); }
static inline void narrow(bf16* p, __mmask16 lanes, __m512 vector) {
    __m512i high = _mm512_srli_epi32(_mm512_castps_si512(vector), 16);
    _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtepi32_epi16(high));
}
static inline void narrow(fp16* p, __mmask16 lanes, __m512 vector) {
    _mm256_mask_storeu_epi16(p, lanes, _mm512_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
}

template <class T>
struct Lanes {
    using Operand = float;
    using Vector = __m512;
    using Sum = __m512;
    static constexpr int width = 16;
    static constexpr bool by_words = false;
    using Word = uint64_t;

    static Sum zero() { return _mm512_setzero_ps(); }
    static Vector load(const T* p) { return floats(p); }
    static Vector load_first(const T* p, int64_t count) { return floats(first_lanes(count), p); }
    static Vector expand(const T* p, uint64_t bits) {
        Vector packed = load(p), spread;
        // The destination is zeroed first because on Zen 5 vexpand waits for its old value even in the zeroing form
        // (3x on the whole kernel); the source is a register because the memory form is microcoded there (4x).
        asm("vpxord %0, %0, %0\n\tvexpandps %1, %0%{%2%}%{z%}" : "=&v"(spread) : "v"(packed), "Yk"(__mmask16(bits)));
        return spread;
    }
    static Vector operand(const float* p) { return _mm512_loadu_ps(p); }
    static Sum multiply_add(Sum sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }
    static Sum add(Sum a, Sum b) { return _mm512_add_ps(a, b); }
    static float total(Sum sum) { return _mm512_reduce_add_ps(sum); }
    static void store(T* p, Vector vector) { narrow(p, 0xffff, vector); }
    static void store_first(T* p, Vector vector, int64_t count) { narrow(p, first_lanes(count), vector); }
};
