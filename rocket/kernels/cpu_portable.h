// Any machine: a block of 64 columns is spread out in memory, then multiplied in the compiler's own vector type (SSE2,
// NEON, or scalars).
typedef float Floats __attribute__((vector_size(16)));
static constexpr int MAX_TILE = 4, MAX_ROWS = 1;

template <class T>
struct Lanes {
    struct Vector {
        float column[64];
    };
    struct Sum {
        Floats even, odd;
    };
    using Operand = float;
    static constexpr int width = 64;
    static constexpr bool by_words = false;
    using Word = uint64_t;

    static Sum zero() { return {Floats{0, 0, 0, 0}, Floats{0, 0, 0, 0}}; }
    static Vector load(const T* p) {
        Vector vector;
        for (int i = 0; i < width; i++) vector.column[i] = to_float(p[i]);
        return vector;
    }
    static Vector load_first(const T* p, int64_t count) {
        Vector vector = {};
        for (int64_t i = 0; i < width && i < count; i++) vector.column[i] = to_float(p[i]);
        return vector;
    }
    static Vector expand(const T* p, uint64_t bits) {
        Vector vector;
        for (int i = 0; i < width; i++) {
            float value = to_float(*p);  // read in any case, so that no branch depends on the mask
            bool kept = bits >> i & 1;
            vector.column[i] = kept ? value : 0.0f;
            p += kept;
        }
        return vector;
    }
    static const float* operand(const float* p) { return p; }
    static Sum multiply_add(Sum sum, const Vector& a, const float* b) {
        for (int i = 0; i < width; i += 8) {
            sum.even += floats(a.column + i) * floats(b + i);
            sum.odd += floats(a.column + i + 4) * floats(b + i + 4);
        }
        return sum;
    }
    static Sum add(Sum a, Sum b) { return {a.even + b.even, a.odd + b.odd}; }
    static float total(Sum sum) {
        Floats both = sum.even + sum.odd;
        return (both[0] + both[1]) + (both[2] + both[3]);
    }
    static void store(T* p, const Vector& vector) { store_first(p, vector, width); }
    static void store_first(T* p, const Vector& vector, int64_t count) {
        for (int64_t i = 0; i < count; i++) from_float(vector.column[i], p[i]);
    }

private:
    static Floats floats(const float* p) {
        Floats four;
        memcpy(&four, p, sizeof four);
        return four;
    }
};
