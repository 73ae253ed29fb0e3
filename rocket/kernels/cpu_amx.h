// Intel AMX for bf16 and several rows of x: panels of the weights are spread out in first-level cache, then multiplied
// with 16 rows of x at a time, at nearly the price of one row.
//
// A weight tile is 16 rows of 32 columns as they lie in memory. An operand tile holds 32 columns of 16 rows of x in
// pairs: entry [pair][row of x][2], as tdpbf16ps wants it; operands are [batch / 16][column / 32] such tiles.
static constexpr int TILE = 16, TILE_COLUMNS = 32, TILE_BYTES = 1024;
static constexpr int PANEL_ROWS = 2 * TILE, PANEL_COLUMNS = 256;  // 16 KiB

struct alignas(64) Panel {
    bf16 weights[PANEL_ROWS][PANEL_COLUMNS];
};

static void prepare(const void* x, int64_t x_stride, int64_t batch, int64_t cols, void* operands, int64_t rows,
                    int64_t stride) {
    memset(operands, 0, size_t(rows * stride) * sizeof(bf16));
    for (int64_t i = 0; i < batch; i++) {
        const bf16* from = static_cast<const bf16*>(x) + i * x_stride;
        bf16* to = static_cast<bf16*>(operands) + i / TILE * TILE * stride + i % TILE * 2;
        int64_t c = 0;
        for (; c + 2 <= cols; c += 2) memcpy(to + c * TILE, from + c, 2 * sizeof(bf16));
        if (c < cols) to[c * TILE] = from[c];
    }
}

// A panel reads many rows in turn, so what memory must deliver next is the same place in the next panel.
static inline __attribute__((always_inline)) void request(const bf16* values, uintptr_t ahead) {
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(values) + ahead), 0, 2);
}

// Spreads the next words of a sparse row out; moves `values` and `mask` on.
static inline void spread(const bf16*& values, const uint8_t*& mask, int64_t words, uintptr_t ahead, bf16* to) {
    using L = avx512_bf16::Lanes<bf16>;
    for (int64_t word = 0; word < words; word++, mask += 8, to += 64) {
        const uint64_t bits = load_word(mask);
        request(values, ahead);
        request(values + 32, ahead);
        L::store(to, L::expand(values, bits & low_bits(32)));
        values += __builtin_popcountll(bits & low_bits(32));
        L::store(to + 32, L::expand(values, bits >> 32));
        values += __builtin_popcountll(bits >> 32);
    }
}

static inline void copy(const bf16* from, int64_t count, int64_t words, uintptr_t ahead, bf16* to) {
    using L = avx512_bf16::Lanes<bf16>;
    for (int64_t c = 0; c < words * 64; c += L::width) {
        request(from + c, ahead);
        L::store(to + c, L::load_first(from + c, count - c));
    }
}

// Rows [row, row + count) of the weights, count <= PANEL_ROWS, times 16 rows of x from `first` on.
static void panel_rows(const Product& p, int64_t row, int count, int64_t first, Panel& panel) {
    const int64_t all_words = words_of(p.cols);
    const bf16* values[PANEL_ROWS];
    const uint8_t* mask[PANEL_ROWS];
    const int64_t entries = p.mask ? p.offsets[row + count] - p.offsets[row] : count * p.cols;
    const uintptr_t ahead = uintptr_t(entries) * sizeof(bf16);
    for (int r = 0; r < count; r++) {
        values[r] = p.mask ? row_values<bf16>(p, row + r) : static_cast<const bf16*>(p.values) + (row + r) * p.cols;
        mask[r] = p.mask ? p.mask + (row + r) * all_words * 8 : nullptr;
    }
    if (count < PANEL_ROWS) memset(panel.weights[count], 0, sizeof(panel.weights[0]) * size_t(PANEL_ROWS - count));

    const bf16* x = static_cast<const bf16*>(p.x) + first * p.x_stride;
    // Tiles 0 ... 3 sum: upper and lower half of the panel, even and odd 32 columns, so that no sum waits for the last.
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t column = 0; column < p.cols; column += PANEL_COLUMNS) {
        const int64_t left = all_words - column / 64, words = left < PANEL_COLUMNS / 64 ? left : PANEL_COLUMNS / 64;
        for (int r = 0; r < count; r++)
            p.mask ? spread(values[r], mask[r], words, ahead, panel.weights[r])
                   : copy(values[r] + column, p.cols - column, words, ahead, panel.weights[r]);
        for (int64_t c = 0; c < words * 64; c += 2 * TILE_COLUMNS) {
            const bf16* operand = x + (column + c) * TILE;
            _tile_loadd(6, operand, 4 * TILE);
            _tile_loadd(7, operand + TILE_COLUMNS * TILE, 4 * TILE);
            _tile_loadd(4, panel.weights[0] + c, sizeof(panel.weights[0]));
            _tile_loadd(5, panel.weights[0] + c + TILE_COLUMNS, sizeof(panel.weights[0]));
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 5, 7);
            if (count <= TILE) continue;
            _tile_loadd(4, panel.weights[TILE] + c, sizeof(panel.weights[0]));
            _tile_loadd(5, panel.weights[TILE] + c + TILE_COLUMNS, sizeof(panel.weights[0]));
            _tile_dpbf16ps(2, 4, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }

    alignas(64) float sums[4][TILE][TILE];
    _tile_stored(0, sums[0], 4 * TILE);
    _tile_stored(1, sums[1], 4 * TILE);
    _tile_stored(2, sums[2], 4 * TILE);
    _tile_stored(3, sums[3], 4 * TILE);
    for (int r = 0; r < count; r++) {
        const int half = r / TILE * 2;
        const float bias = p.bias ? to_float(static_cast<const bf16*>(p.bias)[row + r]) : 0.0f;
        for (int i = 0; i < TILE && first + i < p.batch; i++)
            from_float(sums[half][r % TILE][i] + sums[half + 1][r % TILE][i] + bias,
                       static_cast<bf16*>(p.y)[(first + i) * p.y_stride + row + r]);
    }
}

static void rows(const Product& p, int64_t first_row, int64_t last_row) {
    struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
    Panel panel;
    for (int64_t row = first_row; row < last_row; row += PANEL_ROWS) {
        const int count = int(last_row - row < PANEL_ROWS ? last_row - row : PANEL_ROWS);
        for (int64_t first = 0; first < p.batch; first += TILE) panel_rows(p, row, count, first, panel);
    }
    _tile_release();
}

// Linux lets a process use tiles only after it has asked.
static bool permitted() {
#ifdef __linux__
    unsigned a, b, c, d;
    constexpr unsigned AMX_BF16 = 1u << 22, AMX_TILE = 1u << 24;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & AMX_BF16) || !(d & AMX_TILE)) return false;
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
    return false;
#endif
}
