// What the instruction sets share: the types of values, and the description of a product.
#pragma once
#include <cstdint>
#include <cstring>

namespace rocket {

struct bf16 {
    uint16_t bits;
};
struct fp16 {
    uint16_t bits;
};

static inline uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline float to_float(float value) { return value; }
static inline float to_float(int8_t value) { return float(value); }
static inline float to_float(bf16 value) { return float_of(uint32_t(value.bits) << 16); }
static inline float to_float(fp16 value) {
    uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
    uint32_t exponent = value.bits >> 10 & 0x1f, fraction = value.bits & 0x3ff;
    if (exponent == 0) {
        float magnitude = float(fraction) * 0x1p-24f;
        return sign ? -magnitude : magnitude;
    }
    return float_of(sign | (exponent == 31 ? 0xff : exponent + 112) << 23 | fraction << 13);
}

// Round to nearest, ties to even; a NaN stays a NaN (adding the rounding bias could carry it into infinity or zero).
static inline void from_float(float value, float& result) { result = value; }
static inline void from_float(float value, bf16& result) {
    uint32_t bits = bits_of(value);
    if (value != value)
        result.bits = uint16_t(bits >> 16 | 0x40);
    else
        result.bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
static inline void from_float(float value, fp16& result) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000)
        result.bits = uint16_t(sign | 0x7e00);
    else if (magnitude >= 0x477ff000)  // 65520 and above round to infinity
        result.bits = uint16_t(sign | 0x7c00);
    else if (magnitude < 0x38800000)  // below 2^-14: adding 0.5 leaves the subnormal, rounded, in the low bits
        result.bits = uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f)));
    else
        result.bits = uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
}

enum Type { FP32, BF16, FP16, TYPES };

static inline int64_t size_of(int type) { return type == FP32 ? 4 : 2; }

static inline float read(const void* values, int64_t index, int type) {
    if (type == FP32) return static_cast<const float*>(values)[index];
    return type == BF16 ? to_float(static_cast<const bf16*>(values)[index])
                        : to_float(static_cast<const fp16*>(values)[index]);
}

template <class T>
static inline void write_as(const float* from, int64_t count, float scale, void* to) {
    for (int64_t i = 0; i < count; i++) from_float(from[i] * scale, static_cast<T*>(to)[i]);
}

// `count` values times `scale`, rounded to `type`, from to[index] on.
static inline void write(const float* from, int64_t count, float scale, void* to, int64_t index, int type) {
    void* first = static_cast<char*>(to) + index * size_of(type);
    if (type == FP32)
        write_as<float>(from, count, scale, first);
    else if (type == BF16)
        write_as<bf16>(from, count, scale, first);
    else
        write_as<fp16>(from, count, scale, first);
}

// y = x Sᵀ + bias with S [rows, cols], sparse where `mask` is set and dense where it is null. Values are of the type of
// x, or, where `scale` is set, int8: 127 stands for scale[row].
struct Product {
    const void* values;
    const void* scale;  // null, or [rows]
    int type;           // of x, scale, bias and y, before and after `Kernels::prepare`
    const uint8_t* mask;
    const int64_t* offsets;
    int64_t rows, cols;
    const void* x;  // operands: [batch rounded up to a tile, x_stride], zero beyond `cols`
    int64_t x_stride, batch;
    const void* bias;  // null, or [rows]
    void* y;           // [batch, y_stride]
    int64_t y_stride;
    int64_t nnz = 0;  // values that exist, where sparse
    // Rows from `tail_row` on read their values from `tail` instead, which begins with values[offsets[tail_row]].
    int64_t tail_row = INT64_MAX;
    const void* tail = nullptr;
};

static inline int64_t words_of(int64_t cols) { return (cols + 63) / 64; }
static constexpr uint64_t low_bits(int count) { return ~uint64_t(0) >> (64 - count); }

static inline uint64_t load_word(const uint8_t* mask) {
    uint64_t word;
    memcpy(&word, mask, 8);
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    word = __builtin_bswap64(word);
#endif
    return word;
}

// What one unit of a row's values stands for.
static inline float unit(const Product& p, int64_t row) { return p.scale ? read(p.scale, row, p.type) / 127.0f : 1.0f; }

template <class T>
static inline const T* row_values(const Product& p, int64_t row) {
    if (row < p.tail_row) return static_cast<const T*>(p.values) + p.offsets[row];
    return static_cast<const T*>(p.tail) + (p.offsets[row] - p.offsets[p.tail_row]);
}

// The functions of one instruction set for one type of x and one of values.
struct Kernels {
    int64_t operand_size;  // bytes of one entry of Product::x
    bool by_rows;          // operands are rows of x, one after the other
    bool in_order;         // and their entries those of x
    int max_tile;          // rows of x multiplied at once
    // Writes `rows` rows of operands, `stride` entries each, from x [batch, x_stride]; zeros beyond x.
    void (*prepare)(const void* x, int64_t x_stride, int64_t batch, int64_t cols, void* operands, int64_t rows,
                    int64_t stride);
    void (*rows)(const Product&, int64_t first, int64_t last);
    void (*expand)(const Product&, int64_t first, int64_t last);
};

// Rows of x that the tiles of `batch` rows touch: all tiles are max_tile high, or a last one is 1, 2, 4 ...
static inline int64_t tile_rows(int64_t batch, int max_tile, bool small_tiles) {
    int64_t rest = batch % max_tile, tile = rest == 0 ? 0 : small_tiles ? 1 : max_tile;
    while (tile < rest) tile *= 2;
    return batch - rest + tile;
}

}  // namespace rocket
