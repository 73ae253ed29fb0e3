// Products with a bitmap-packed sparse matrix on the CPU: a plain C interface, loaded with ctypes, that knows nothing
// of torch, so that one build serves all its versions. The best instruction set is chosen at run time.
//
// The OpenMP runtime is left unlinked on Linux (see setup.py): its symbols resolve to the one that torch has loaded,
// and so both share one pool of threads.
#include <cstdlib>
#include <vector>

#include "cpu_common.h"
#ifdef _OPENMP
#include <omp.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define ROCKET_X86
#include <cpuid.h>
#include <immintrin.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace rocket {

// Requests cache lines long before their turn: hardware prefetchers stop at each 4 KiB page. Where packed values lie
// depends on the masks between, but they too are read in order. Into second-level cache, which can wait for more lines
// at once than the first. Always inlined because gcc 12 deletes calls to it as free of effects.
static inline __attribute__((always_inline)) void prefetch(const void* weights, int lines, uintptr_t ahead = 8192) {
    constexpr uintptr_t LINE = 64;
    const uintptr_t first = reinterpret_cast<uintptr_t>(weights) + ahead;
    for (int i = 0; i < lines; i++) __builtin_prefetch(reinterpret_cast<const void*>(first + LINE * uintptr_t(i)), 0, 2);
}

namespace portable {
#include "cpu_portable.h"
#include "cpu_kernels.h"
}  // namespace portable

#ifdef ROCKET_X86
// A region rather than an attribute a function: templates and their helpers all need it, or nothing is inlined.
#define PRAGMA(...) _Pragma(#__VA_ARGS__)
#ifdef __clang__
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

BEGIN_TARGET("avx2,fma,f16c,popcnt")
namespace avx2 {
#include "cpu_avx2.h"
#include "cpu_kernels.h"
}  // namespace avx2
END_TARGET

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2,popcnt")
namespace avx512 {
#include "cpu_avx512.h"
#include "cpu_kernels.h"
}  // namespace avx512
END_TARGET

BEGIN_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,avx2,fma,f16c,bmi2,popcnt")
namespace avx512_bf16 {
#include "cpu_avx512_bf16.h"
#include "cpu_kernels.h"
}  // namespace avx512_bf16
END_TARGET

BEGIN_TARGET(
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx512vbmi2,avx512bf16,amx-tile,amx-bf16,avx2,fma,f16c,bmi2,popcnt")
namespace amx {
#include "cpu_amx.h"
}  // namespace amx
END_TARGET
#endif  // ROCKET_X86

enum Path { PORTABLE, AVX2, AVX512, AVX512_BF16, AMX, PATHS };
enum Status { OK, BAD_OFFSETS, NO_MEMORY, BAD_REQUEST };

static bool available(int path) {
    if (path == PORTABLE) return true;
#ifdef ROCKET_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    const bool avx512_bf16 =
        avx512 && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
        __builtin_cpu_supports("avx512bf16");
    if (path == AVX2) return avx2;
    if (path == AVX512) return avx512;
    if (path == AVX512_BF16) return avx512_bf16;
    if (path == AMX) return avx512_bf16 && amx::permitted();
#endif
    return false;
}

// The best of one set of instructions for x of a type.
#define CHOOSE(set, chosen) \
    (type == FP32 ? set::chosen<float>() : type == BF16 ? set::chosen<bf16>() : set::chosen<fp16>())

static Kernels kernels_of(int path, int type, bool int8, int64_t batch) {
#ifdef ROCKET_X86
    constexpr int64_t AMX_BATCH = 4;  // the tiles of fewer rows of x would be too empty
    if (int8 && path >= AVX512) {
        Kernels chosen = CHOOSE(avx512, int8_kernels);
        if (path >= AVX512_BF16 && type == BF16) {
            chosen.operand_size = sizeof(bf16);
            chosen.in_order = false;
            chosen.prepare = avx512_bf16::prepare_mixed;
            chosen.rows = avx512_bf16::rows<avx512_bf16::mixed>;
        } else if (path >= AVX512_BF16) {
            chosen.rows = avx512_bf16::rows<int8_t>;
        }
        return chosen;
    }
    if (int8 && path == AVX2) return CHOOSE(avx2, int8_kernels);
    if (path == AMX && type == BF16 && batch >= AMX_BATCH)
        return {sizeof(bf16), false, false, amx::TILE, amx::prepare, amx::rows, nullptr};
    if (path >= AVX512_BF16 && type == BF16) return avx512_bf16::kernels<bf16>();
    if (path >= AVX512) {
        Kernels chosen = CHOOSE(avx512, kernels);
        // Nothing multiplies fp16 into fp32 sums directly, but spreading is the same for any 16 bits.
        if (path >= AVX512_BF16 && type == FP16) chosen.expand = avx512_bf16::expand_rows<fp16>;
        return chosen;
    }
    if (path == AVX2) return CHOOSE(avx2, kernels);
#endif
    return int8 ? CHOOSE(portable, int8_kernels) : CHOOSE(portable, kernels);
}

static int available_paths() {
    int paths = 0;
    for (int path = 0; path < PATHS; path++) paths |= available(path) << path;
    return paths;
}

// Asked once, when the library is loaded: in a virtual machine each look at the processor costs microseconds.
static const int AVAILABLE = available_paths();

static bool bad(int path, int type) {
    return path < 0 || path >= PATHS || !(AVAILABLE >> path & 1) || type < 0 || type >= TYPES;
}

class Scratch {
public:
    explicit Scratch(int64_t bytes)
        : data_(bytes > 0 ? aligned_alloc(64, size_t(bytes + 63) / 64 * 64) : nullptr), failed_(bytes > 0 && !data_) {}
    ~Scratch() { free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    char* data() const { return static_cast<char*>(data_); }
    bool failed() const { return failed_; }

private:
    void* data_;
    bool failed_;
};

// x as the kernels read it: their operand type and order, rows padded with zeros to whole words and tiles.
struct Operands {
    int64_t stride, rows, bytes;
    bool as_is;  // x already has that form

    Operands(const Kernels& kernels, int64_t batch, int64_t cols, int64_t item)
        : stride(words_of(cols) * 64),
          rows(tile_rows(batch, kernels.max_tile, kernels.by_rows)),
          bytes(stride * rows * kernels.operand_size),
          as_is(kernels.in_order && stride == cols && rows == batch && kernels.operand_size == item) {}
};

// The kernels load up to 64 packed values at once. The tensors have no padding, so the rows that end within 64 values of
// their end are given padded copies.
class Tails {
public:
    Tails(std::vector<Product>& products, int64_t item) : scratch_(bytes(products, item)) {
        char* to = scratch_.data();
        if (!to) return;
        for (Product& p : products) {
            const int64_t row = first_row(p), count = p.nnz - p.offsets[row];
            if (row == p.rows) continue;
            if (count) memcpy(to, static_cast<const char*>(p.values) + p.offsets[row] * item, size_t(count * item));
            memset(to + count * item, 0, size_t(64 * item));
            p.tail_row = row;
            p.tail = to;
            to += (count + 64) * item;
        }
    }
    bool failed() const { return scratch_.failed(); }

private:
    static int64_t first_row(const Product& p) {
        int64_t row = p.rows;
        while (p.mask && row > 0 && p.offsets[row] + 64 > p.nnz) row--;
        return row;
    }
    static int64_t bytes(const std::vector<Product>& products, int64_t item) {
        int64_t total = 0;
        for (const Product& p : products) {
            const int64_t row = first_row(p);
            if (row < p.rows) total += (p.nnz - p.offsets[row] + 64) * item;
        }
        return total;
    }
    Scratch scratch_;
};

// Bytes that rows 0 ... row - 1 cost to read. A word costs time even where it keeps nothing: as much as its dense
// half in bf16, measured.
static int64_t cost(const Product& p, int64_t row, int64_t item) {
    return p.mask ? p.offsets[row] * item + row * words_of(p.cols) * 64 : row * p.cols * item;
}

static int threads_for(int64_t bytes, int64_t batch, int threads) {
    constexpr int64_t BYTES_A_THREAD = 1 << 16;  // below, waking a thread costs more than its share of the work
    int64_t useful = bytes * (batch > 1 ? batch : 1) / BYTES_A_THREAD + 1;
    return useful < threads ? int(useful) : threads;
}

// The first row before which at least `wanted` bytes lie.
static int64_t row_at(const Product& p, int64_t item, int64_t wanted) {
    int64_t low = 0, high = p.rows;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        cost(p, middle, item) - cost(p, 0, item) < wanted ? low = middle + 1 : high = middle;
    }
    return low;
}

// The rows of some products that are read one after the other, parted among threads: equal costs, not equal rows, since
// rows may keep very different numbers.
class Shares {
public:
    Shares(const Product* products, size_t number, int64_t item)
        : products_(products), number_(number), item_(item), total_(0) {
        for (size_t i = 0; i < number; i++) total_ += bytes(products[i]);
    }
    int threads(int wanted) const { return number_ ? threads_for(total_, products_[0].batch, wanted) : 1; }

    // Calls work(product, first row, last row) for what thread `id` of `count` has to do.
    template <class Work>
    void each(int id, int count, Work work) const {
        int64_t begin = total_ / count * id, end = id + 1 == count ? total_ : total_ / count * (id + 1);
        for (size_t i = 0; i < number_; i++) {
            const Product& p = products_[i];
            const int64_t first = row_at(p, item_, begin), last = id + 1 == count ? p.rows : row_at(p, item_, end);
            if (first < last) work(p, first, last);
            begin -= bytes(p);
            end -= bytes(p);
        }
    }

private:
    int64_t bytes(const Product& p) const { return cost(p, p.rows, item_) - cost(p, 0, item_); }
    const Product* products_;
    size_t number_;
    int64_t item_, total_;
};

template <class Work>
static void parallel(int threads, Work work) {
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        work(omp_get_thread_num(), omp_get_num_threads());
        return;
    }
#endif
    (void)threads;
    work(0, 1);
}

// Waits for the other threads of `parallel`; alone, it does nothing.
static void barrier() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

// x [batch, cols] as operands: x itself, or a copy.
class Prepared {
public:
    Prepared(const Kernels& kernels, const void* x, int64_t batch, int64_t cols, int64_t item)
        : shape_(kernels, batch, cols, item),
          copy_(shape_.as_is ? 0 : shape_.bytes),
          x_(shape_.as_is ? x : copy_.data()) {
        if (copy_.data()) kernels.prepare(x, cols, batch, cols, copy_.data(), shape_.rows, shape_.stride);
    }
    bool failed() const { return copy_.failed(); }
    const void* x() const { return x_; }
    int64_t stride() const { return shape_.stride; }

private:
    Operands shape_;
    Scratch copy_;
    const void* x_;
};

}  // namespace rocket

using namespace rocket;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Bit i is set where path i (portable, avx2, avx512, avx512_bf16, amx) can run here.
EXPORT int rocket_paths() { return AVAILABLE; }

// y [batch, rows] = x [batch, cols] Wᵀ + bias; bias and scale may be null. Returns a Status, as do all below.
EXPORT int rocket_dense_linear(int path, int type, int threads, const void* x, int64_t batch, int64_t cols,
                               const void* weight, const void* scale, int64_t rows, const void* bias, void* y) {
    if (bad(path, type)) return BAD_REQUEST;
    if (batch == 0) return OK;
    const Kernels kernels = kernels_of(path, type, scale, batch);
    const Prepared prepared(kernels, x, batch, cols, size_of(type));
    if (prepared.failed()) return NO_MEMORY;
    const Product product{weight,       scale,             type,  nullptr, nullptr, rows, cols,
                          prepared.x(), prepared.stride(), batch, bias,    y,       rows};
    const Shares shares(&product, 1, scale ? 1 : size_of(type));
    parallel(shares.threads(threads), [&](int id, int count) { shares.each(id, count, kernels.rows); });
    return OK;
}

// A matrix that x [batch, in] is multiplied by: S [rows, cols], sparse, or S D with a dictionary D [rank, in], or
// S [D; I], which multiplies x Dᵀ with x beside it. `nnz` values exist. scale and bias may be null.
struct Part {  // eight bytes a field: library.py writes it as such
    const void *values, *scale;
    const uint8_t* mask;
    const int64_t* offsets;
    int64_t nnz, rows, cols;  // cols is in, rank, or rank + in
    const void* bias;
    const void *dictionary, *dictionary_scale;
    int64_t rank;  // -1 where there is no dictionary
    void* y;       // [batch, rows]
};
static_assert(sizeof(Part) == 12 * sizeof(int64_t), "library.py packs fields of eight bytes");

// What S is multiplied by behind a dictionary: x Dᵀ, or that and x.
struct Hidden {
    Operands shape;
    int64_t cols;
    char *operands, *plain;  // plain: as the first product writes it, perhaps the operands already

    void prepare(const Kernels& kernels, int64_t batch) const {
        if (shape.bytes) kernels.prepare(plain, cols, batch, cols, operands, shape.rows, shape.stride);
    }
};

static int check(const Part& part, bool int8, int64_t in) {
    const bool factored = part.rank >= 0;
    if (part.offsets[0] < 0 || part.offsets[part.rows] > part.nnz) return BAD_OFFSETS;
    // What has no rows may have no scale either: nothing points to an empty tensor.
    if (part.rows > 0 && !part.scale == int8) return BAD_REQUEST;
    if (part.rank > 0 && !part.dictionary_scale == int8) return BAD_REQUEST;
    return part.cols == (factored ? part.rank : in) || (factored && part.cols == part.rank + in) ? OK : BAD_REQUEST;
}

// y = x Wᵀ + bias of `number` matrices, in one pass over all dictionaries and one over all that is sparse. x Dᵀ is
// rounded to the type of x, so that the result is that of the two products one after the other. All have scales, or
// none has.
EXPORT int rocket_packed_linears(int path, int type, int threads, const void* x, int64_t batch, int64_t in,
                                 const Part* parts, int64_t number) {
    if (bad(path, type)) return BAD_REQUEST;
    bool int8 = false;
    for (int64_t i = 0; i < number; i++) int8 = int8 || parts[i].scale || parts[i].dictionary_scale;
    for (int64_t i = 0; i < number; i++)
        if (const int status = check(parts[i], int8, in)) return status;
    if (batch == 0 || number == 0) return OK;
    const Kernels kernels = kernels_of(path, type, int8, batch);
    const int64_t size = size_of(type), item = int8 ? 1 : size;
    // Whether the first products can write the second ones' operands themselves.
    const bool direct = kernels.in_order && kernels.operand_size == size;
    std::vector<Hidden> inner;
    inner.reserve(size_t(number));
    int64_t operand_bytes = 0, plain_bytes = 0;
    for (int64_t i = 0; i < number; i++) {
        if (parts[i].rank < 0) continue;
        inner.push_back({Operands(kernels, batch, parts[i].cols, size), parts[i].cols, nullptr, nullptr});
        operand_bytes += inner.back().shape.bytes;
        plain_bytes += direct ? 0 : batch * parts[i].cols * size;
    }
    const Prepared outer(kernels, x, batch, in, size);
    const Scratch operands(operand_bytes), plain(plain_bytes);
    if (outer.failed() || operands.failed() || plain.failed()) return NO_MEMORY;

    std::vector<Product> first, second;
    first.reserve(inner.size());
    second.reserve(size_t(number));
    char *next_operands = operands.data(), *next_plain = plain.data();
    for (int64_t i = 0; i < number; i++) {
        const Part& part = parts[i];
        second.push_back({part.values, part.scale, type, part.mask, part.offsets, part.rows, part.cols, outer.x(),
                          outer.stride(), batch, part.bias, part.y, part.rows, part.nnz});
        if (part.rank < 0) continue;
        Hidden& hidden = inner[first.size()];
        hidden.operands = next_operands;
        hidden.plain = direct ? next_operands : next_plain;
        second.back().x = hidden.operands;
        second.back().x_stride = hidden.shape.stride;
        const int64_t stride = direct ? hidden.shape.stride : part.cols;
        first.push_back({part.dictionary, part.dictionary_scale, type, nullptr, nullptr, part.rank, in, outer.x(),
                         outer.stride(), batch, nullptr, hidden.plain, stride});
        if (direct && hidden.shape.bytes) memset(hidden.operands, 0, size_t(hidden.shape.bytes));
        for (int64_t row = 0; part.cols > part.rank && row < batch; row++)
            memcpy(hidden.plain + (row * stride + part.rank) * size, static_cast<const char*>(x) + row * in * size,
                   size_t(in * size));
        next_operands += hidden.shape.bytes;
        next_plain += direct ? 0 : batch * part.cols * size;
    }
    const Tails tails(second, item);
    if (tails.failed()) return NO_MEMORY;
    const Shares first_shares(first.data(), first.size(), item), second_shares(second.data(), second.size(), item);
    const int first_threads = first_shares.threads(threads), second_threads = second_shares.threads(threads);
    parallel(first_threads > second_threads ? first_threads : second_threads, [&](int id, int count) {
        if (!first.empty()) {
            first_shares.each(id, count, kernels.rows);
            barrier();
        }
        if (!first.empty() && !direct) {
            for (size_t i = size_t(id); i < inner.size(); i += size_t(count)) inner[i].prepare(kernels, batch);
            barrier();
        }
        second_shares.each(id, count, kernels.rows);
    });
    return OK;
}

// dense [rows, cols], of the type that `type` and scale have, zero where nothing is kept; scale may be null.
EXPORT int rocket_expand(int path, int type, int threads, const void* values, const void* scale, const uint8_t* mask,
                         const int64_t* offsets, int64_t nnz, int64_t rows, int64_t cols, void* dense) {
    if (bad(path, type)) return BAD_REQUEST;
    if (offsets[0] < 0 || offsets[rows] > nnz) return BAD_OFFSETS;
    const Kernels kernels = kernels_of(path, type, scale, 1);
    const int64_t item = scale ? 1 : size_of(type);
    std::vector<Product> products{
        {values, scale, type, mask, offsets, rows, cols, nullptr, 0, 0, nullptr, dense, cols, nnz}};
    const Tails tails(products, item);
    if (tails.failed()) return NO_MEMORY;
    const Shares shares(products.data(), 1, item);
    parallel(shares.threads(threads), [&](int id, int count) { shares.each(id, count, kernels.expand); });
    return OK;
}
