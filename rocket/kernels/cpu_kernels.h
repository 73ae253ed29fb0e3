// The products, written once over `Lanes<T>` and compiled once for each instruction set: included inside that set's
// namespace and target region, hence without an include guard. A set provides MAX_TILE and MAX_ROWS (how many rows of
// x and of the weights are multiplied at once) and, for values of type T, Lanes<T>:
//   width                    columns a vector holds
//   Operand                  type that x is multiplied in
//   Vector, Sum              the weights, and partial sums
//   load(p)                  `width` values; load_first(p, n): the first n, reading no more, then zeros
//   expand(p, bits)          the next values at the set bits, zero elsewhere; may read 64 values
//   Word, by_words           64 columns of a mask; or, by words, what products take instead of load and expand:
//                            whole(p), whole_first(p, n) and spread(p, bits) are the values of 64 columns, of which
//                            part(word, i) is vector i
//   operand(p)               of x; multiply_add(sum, a, b), add(a, b), total(sum)
//   store(p, vector), store_first(p, vector, n); for int8_t a Vector is `width` floats instead

// A block of 64 columns. PARTIAL: fewer columns exist (dense weights only: rows of a mask are padded).
template <class T, int ROWS, int TILE, int SUMS, bool SPARSE, bool PARTIAL>
static inline __attribute__((always_inline)) void block(const T** values, const uint8_t* const* mask, int64_t column,
                                                        int64_t cols, const typename Lanes<T>::Operand* x,
                                                        int64_t x_stride,
                                                        typename Lanes<T>::Sum (&sums)[ROWS][TILE][SUMS]) {
    using L = Lanes<T>;
    // Lines that 64 columns fill, if all are kept: a line that is skipped costs more than one that is asked for twice.
    constexpr int lines = sizeof(T);
    constexpr uintptr_t mask_ahead = 1024;
    typename L::Word word[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const uint64_t bits = SPARSE ? load_word(mask[r] + size_t(column) / 8) : 0;
        if (SPARSE) prefetch(mask[r] + size_t(column) / 8, 1, mask_ahead);
        SPARSE ? prefetch(values[r], lines) : prefetch(values[r] + column, lines);
        if constexpr (!L::by_words) {
            word[r] = bits;
        } else if (SPARSE) {
            word[r] = L::spread(values[r], bits);
            values[r] += __builtin_popcountll(bits);
        } else {
            word[r] = PARTIAL ? L::whole_first(values[r] + column, cols - column) : L::whole(values[r] + column);
        }
    }
#pragma GCC unroll 8
    for (int step = 0; step < 64 / L::width; step++) {
        typename L::Vector weights[ROWS];
#pragma GCC unroll 2
        for (int r = 0; r < ROWS; r++)
            if constexpr (L::by_words) {
                weights[r] = L::part(word[r], step);
            } else if constexpr (SPARSE) {
                uint64_t bits = word[r] & low_bits(L::width);
                weights[r] = L::expand(values[r], bits);
                values[r] += __builtin_popcountll(bits);
                if (L::width < 64) word[r] >>= L::width % 64;
            } else {
                const T* from = values[r] + column + step * L::width;
                weights[r] = PARTIAL ? L::load_first(from, cols - column - step * L::width) : L::load(from);
            }
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) {
            auto operand = L::operand(x + i * x_stride + column + step * L::width);
#pragma GCC unroll 2
            for (int r = 0; r < ROWS; r++)
                sums[r][i][step % SUMS] = L::multiply_add(sums[r][i][step % SUMS], weights[r], operand);
        }
    }
}

// ROWS rows of S times TILE rows of x: each weight is expanded once for all of the tile.
template <class T, int ROWS, int TILE, bool SPARSE>
static void tile(const Product& p, int64_t row, int64_t first) {
    using L = Lanes<T>;
    // Partial sums enough to hide the latency of multiply-add, where the tile alone has too few; as many for a row left
    // over, so that the result does not depend on how rows are shared among threads.
    constexpr int wanted = 8 / (TILE * MAX_ROWS), steps = 64 / L::width;
    constexpr int SUMS = wanted < 1 ? 1 : wanted < steps ? wanted : steps;
    typename L::Sum sums[ROWS][TILE][SUMS];
#pragma GCC unroll 16
    for (int i = 0; i < ROWS * TILE * SUMS; i++) sums[i / (TILE * SUMS)][i / SUMS % TILE][i % SUMS] = L::zero();

    const T* values[ROWS];
    const uint8_t* mask[ROWS];
    for (int r = 0; r < ROWS; r++) {
        values[r] = SPARSE ? row_values<T>(p, row + r) : static_cast<const T*>(p.values) + (row + r) * p.cols;
        mask[r] = SPARSE ? p.mask + (row + r) * words_of(p.cols) * 8 : nullptr;
    }
    const auto* x = static_cast<const typename L::Operand*>(p.x) + first * p.x_stride;
    int64_t column = 0;
    for (; column < (SPARSE ? p.cols : p.cols - 63); column += 64)
        block<T, ROWS, TILE, SUMS, SPARSE, false>(values, mask, column, p.cols, x, p.x_stride, sums);
    if (!SPARSE && column < p.cols)
        block<T, ROWS, TILE, SUMS, SPARSE, true>(values, mask, column, p.cols, x, p.x_stride, sums);

    for (int r = 0; r < ROWS; r++) {
        const float scale = unit(p, row + r), bias = p.bias ? read(p.bias, row + r, p.type) : 0.0f;
#pragma GCC unroll 8
        for (int i = 0; i < TILE; i++) {
            auto sum = sums[r][i][0];
            for (int s = 1; s < SUMS; s++) sum = L::add(sum, sums[r][i][s]);
            const float result = L::total(sum) * scale + bias;
            if (first + i < p.batch) write(&result, 1, 1.0f, p.y, (first + i) * p.y_stride + row + r, p.type);
        }
    }
}

template <class T, int TILE, bool SPARSE>
static void tile_column(const Product& p, int64_t row, int64_t last, int64_t first) {
    // Two rows share each load of x, and one core reads two streams up to a quarter faster than one.
    for (; row + MAX_ROWS <= last; row += MAX_ROWS) tile<T, MAX_ROWS, TILE, SPARSE>(p, row, first);
    for (; row < last; row++) tile<T, 1, TILE, SPARSE>(p, row, first);
}

template <class T, bool SPARSE>
static void all_tiles(const Product& p, int64_t first_row, int64_t last_row) {
    // Later tiles of x find this many rows of the weights still in the second-level cache.
    constexpr int64_t CHUNK = 64;
    for (int64_t row = first_row; row < last_row; row += CHUNK) {
        int64_t end = row + CHUNK < last_row ? row + CHUNK : last_row;
        for (int64_t first = 0; first < p.batch;) {
            int64_t left = p.batch - first;
            if (left > 4 && MAX_TILE >= 8) {
                tile_column<T, MAX_TILE, SPARSE>(p, row, end, first);
                first += MAX_TILE;
            } else if (left > 2) {
                tile_column<T, 4, SPARSE>(p, row, end, first);
                first += 4;
            } else if (left == 2) {
                tile_column<T, 2, SPARSE>(p, row, end, first);
                first += 2;
            } else {
                tile_column<T, 1, SPARSE>(p, row, end, first);
                first += 1;
            }
        }
    }
}

template <class T>
static void rows(const Product& p, int64_t first, int64_t last) {
    p.mask ? all_tiles<T, true>(p, first, last) : all_tiles<T, false>(p, first, last);
}

template <class T>
static void expand_rows(const Product& p, int64_t first, int64_t last) {
    using L = Lanes<T>;
    for (int64_t row = first; row < last; row++) {
        const T* values = row_values<T>(p, row);
        const uint8_t* mask = p.mask + row * words_of(p.cols) * 8;
        const float scale = unit(p, row);
        for (int64_t column = 0; column < p.cols; column += 64) {
            uint64_t word = load_word(mask + size_t(column) / 8);
            prefetch(values, sizeof(T));
#pragma GCC unroll 8
            for (int64_t start = column; start < column + 64; start += L::width) {
                uint64_t bits = word & low_bits(L::width);
                auto vector = L::expand(values, bits);
                const int64_t left = p.cols - start, at = row * p.y_stride + start;
                if constexpr (sizeof(T) == 1) {
                    float columns[L::width];
                    memcpy(static_cast<void*>(columns), &vector, sizeof columns);
                    if (left > 0) write(columns, left < L::width ? left : L::width, scale, p.y, at, p.type);
                } else if (left >= L::width) {
                    L::store(static_cast<T*>(p.y) + at, vector);
                } else if (left > 0) {
                    L::store_first(static_cast<T*>(p.y) + at, vector, left);
                }
                values += __builtin_popcountll(bits);
                if (L::width < 64) word >>= L::width % 64;
            }
        }
    }
}

template <class T>
static void prepare_row(const T* x, int64_t count, float* operands) {
    using L = Lanes<T>;
    for (int64_t i = 0; i < count; i += L::width) {
        const auto vector = count - i < L::width ? L::load_first(x + i, count - i) : L::load(x + i);
        const int64_t left = count - i < L::width ? count - i : L::width;
        memcpy(static_cast<void*>(operands + i), &vector, size_t(left) * sizeof(float));
    }
}
static inline void prepare_row(const bf16* x, int64_t count, bf16* operands) {
    memcpy(operands, x, size_t(count) * sizeof(bf16));
}

template <class T>
static void prepare(const void* x, int64_t x_stride, int64_t batch, int64_t cols, void* operands, int64_t rows,
                    int64_t stride) {
    auto* to = static_cast<typename Lanes<T>::Operand*>(operands);
    for (int64_t i = 0; i < rows; i++) {
        const int64_t filled = i < batch ? cols : 0;
        if (filled) prepare_row(static_cast<const T*>(x) + i * x_stride, filled, to + i * stride);
        memset(static_cast<void*>(to + i * stride + filled), 0, size_t(stride - filled) * sizeof(*to));
    }
}

// For x of type T, and values of the same type or int8, which sets provide whose operands are floats.
template <class T>
static Kernels kernels() {
    return {sizeof(typename Lanes<T>::Operand), true, true, MAX_TILE, prepare<T>, rows<T>, expand_rows<T>};
}
template <class T>
static Kernels int8_kernels() {
    return {sizeof(float), true, true, MAX_TILE, prepare<T>, rows<int8_t>, expand_rows<int8_t>};
}
