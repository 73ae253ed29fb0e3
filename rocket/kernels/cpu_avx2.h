// AVX2, FMA and F16C: eight columns at a time; the expansion is a table of 256 permutations.
static constexpr int MAX_TILE = 4, MAX_ROWS = 2;

// For each byte of mask, which packed value each of eight positions takes; negative where none does.
struct Permutations {
    alignas(64) int8_t source[256][8];
    constexpr Permutations() : source() {
        for (int byte = 0; byte < 256; byte++)
            for (int i = 0, taken = 0; i < 8; i++) source[byte][i] = byte >> i & 1 ? int8_t(taken++) : int8_t(-1);
    }
};
static constexpr Permutations PERMUTATIONS;

static inline __m256 floats(const float* p) { return _mm256_loadu_ps(p); }
static inline __m256 floats(const bf16* p) {
    __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
}
static inline __m256 floats(const fp16* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
static inline __m256 floats(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}

// Only ever stores what was loaded, so narrowing is exact.
static inline void narrow(float* p, __m256 vector) { _mm256_storeu_ps(p, vector); }
static inline void narrow(bf16* p, __m256 vector) {
    __m256i high = _mm256_srli_epi32(_mm256_castps_si256(vector), 16);
    __m128i half = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
static inline void narrow(fp16* p, __m256 vector) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(vector, _MM_FROUND_TO_NEAREST_INT));
}

template <class T>
struct Lanes {
    using Operand = float;
    using Vector = __m256;
    using Sum = __m256;
    static constexpr int width = 8;
    static constexpr bool by_words = false;
    using Word = uint64_t;

    static Sum zero() { return _mm256_setzero_ps(); }
    static Vector load(const T* p) { return floats(p); }
    static Vector load_first(const T* p, int64_t count) {
        if (count >= width) return load(p);
        T buffer[width] = {};
        if (count > 0) memcpy(buffer, p, count * sizeof(T));
        return load(buffer);
    }
    static Vector expand(const T* p, uint64_t bits) {
        Vector packed = load(p);
        __m256i source = _mm256_cvtepi8_epi32(
            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(PERMUTATIONS.source[bits])));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(packed, source), zero(), _mm256_castsi256_ps(source));
    }
    static Vector operand(const float* p) { return _mm256_loadu_ps(p); }
    static Sum multiply_add(Sum sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }
    static Sum add(Sum a, Sum b) { return _mm256_add_ps(a, b); }
    static float total(Sum sum) {
        __m128 half = _mm_add_ps(_mm256_castps256_ps128(sum), _mm256_extractf128_ps(sum, 1));
        half = _mm_add_ps(half, _mm_movehl_ps(half, half));
        return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
    }
    static void store(T* p, Vector vector) { narrow(p, vector); }
    static void store_first(T* p, Vector vector, int64_t count) {
        T buffer[width];
        narrow(buffer, vector);
        memcpy(p, buffer, count * sizeof(T));
    }
};
