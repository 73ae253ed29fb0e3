// Fuzzes the CPU kernels under AddressSanitizer and UBSan; built and run by sanitize.py. Inputs end at a guard page in
// every other round (which catches what sanitizers do not instrument, such as masked loads), else on the heap.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../rocket/kernels/cpu.cpp"

static std::mt19937_64 generator(7);

static int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(generator);
}

// `bytes` bytes with nothing readable after them.
class Buffer {
public:
    Buffer(int64_t bytes, bool guarded) : guarded_(guarded), size_(size_t(bytes)) {
        if (!guarded) {
            start_ = data_ = static_cast<char*>(malloc(size_));
            return;
        }
        const size_t page = size_t(sysconf(_SC_PAGESIZE)), used = (size_ + page - 1) / page * page;
        mapped_ = used + page;
        start_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        mprotect(start_ + used, page, PROT_NONE);
        data_ = start_ + used - size_;
    }
    ~Buffer() { guarded_ ? void(munmap(start_, mapped_)) : free(start_); }
    Buffer(const Buffer&) = delete;
    template <class T>
    T* as() {
        return reinterpret_cast<T*>(data_);
    }

private:
    bool guarded_;
    size_t size_, mapped_ = 0;
    char *start_, *data_;
};

static void from_float(float value, int8_t& result) { result = int8_t(std::fmin(127.0f, std::fmax(-127.0f, 40 * value))); }

template <class T>
static void fill(T* values, int64_t count) {
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; i++) from_float(normal(generator), values[i]);
}

static void expect(bool right, const char* what, int path, int type, int64_t rows, int64_t cols, int64_t batch) {
    if (right) return;
    printf("%s is wrong: path %d, type %d, rows %ld, cols %ld, batch %ld\n", what, path, type, long(rows), long(cols),
           long(batch));
    exit(1);
}

// Whether y = x Wᵀ + bias within the rounding of T.
template <class T>
static bool close(const T* y, const T* x, const std::vector<float>& weight, const T* bias, int64_t batch, int64_t cols,
                  int64_t rows, double tolerance) {
    for (int64_t i = 0; i < batch; i++)
        for (int64_t r = 0; r < rows; r++) {
            double sum = bias ? to_float(bias[r]) : 0, size = std::fabs(sum) + 1e-6;
            for (int64_t c = 0; c < cols; c++) {
                const double term = double(weight[size_t(r * cols + c)]) * to_float(x[i * cols + c]);
                sum += term;
                size += std::fabs(term);
            }
            if (!(std::fabs(to_float(y[i * rows + r]) - sum) <= tolerance * size)) return false;
        }
    return true;
}

// T: the type of x; V: that of the values.
template <class T, class V>
static void round(int path, int type, bool guarded, double tolerance) {
    constexpr bool INT8 = sizeof(V) == 1;
    const int64_t rows = between(1, 90), cols = between(1, 300), in = between(1, 150), batch = between(0, 20);
    const double density = double(between(0, 4)) / 4;
    const int threads = int(between(1, 3));
    const int64_t item = sizeof(T);
    Buffer mask(rows * words_of(cols) * 8, guarded), offsets((rows + 1) * 8, guarded);
    Buffer scales(rows * item, guarded), units(cols * item, guarded);
    fill(scales.as<T>(), rows);
    fill(units.as<T>(), cols);
    const T *scale = INT8 ? scales.as<T>() : nullptr, *dictionary_scale = INT8 ? units.as<T>() : nullptr;
    std::vector<V> kept;
    std::vector<float> weight(size_t(rows * cols), 0.0f);
    memset(mask.as<char>(), 0, size_t(rows * words_of(cols) * 8));
    for (int64_t r = 0; r < rows; r++) {
        offsets.as<int64_t>()[r] = int64_t(kept.size());
        for (int64_t c = 0; c < cols; c++) {
            if (std::uniform_real_distribution<>()(generator) >= density) continue;
            mask.as<uint8_t>()[r * words_of(cols) * 8 + c / 8] |= uint8_t(1 << c % 8);
            V value;
            fill(&value, 1);
            kept.push_back(value);
            weight[size_t(r * cols + c)] = to_float(value) * (INT8 ? to_float(scale[r]) / 127 : 1);
        }
    }
    const int64_t nnz = int64_t(kept.size());
    offsets.as<int64_t>()[rows] = nnz;
    Buffer values(nnz * int64_t(sizeof(V)), guarded), x(batch * cols * item, guarded), u(batch * in * item, guarded);
    Buffer bias(rows * item, guarded), dictionary(cols * in * int64_t(sizeof(V)), guarded);
    Buffer expanded(rows * cols * item, guarded), dense(rows * cols * int64_t(sizeof(V)), guarded);
    Buffer y(batch * rows * item, guarded), z(batch * rows * item, guarded), w(batch * rows * item, guarded);
    Buffer h(batch * cols * item, guarded);
    if (nnz) memcpy(values.as<char>(), kept.data(), size_t(nnz) * sizeof(V));
    fill(x.as<T>(), batch * cols);
    fill(u.as<T>(), batch * in);
    fill(bias.as<T>(), rows);
    fill(dictionary.as<V>(), cols * in);
    T* b = between(0, 1) ? bias.as<T>() : nullptr;

    int status = rocket_expand(path, type, threads, values.as<V>(), scale, mask.as<uint8_t>(), offsets.as<int64_t>(),
                               nnz, rows, cols, expanded.as<T>());
    bool same = status == OK;
    for (int64_t i = 0; i < rows * cols; i++) {
        T expected;
        from_float(weight[size_t(i)], expected);
        same &= std::fabs(to_float(expanded.as<T>()[i]) - to_float(expected)) <= INT8 * tolerance * std::fabs(weight[size_t(i)]);
    }
    expect(same, "expand", path, type, rows, cols, batch);

    // The whole matrix, and its first rows once more, as one product.
    const int64_t head = between(0, rows);
    const Part whole{values.as<V>(), scale,   mask.as<uint8_t>(), offsets.as<int64_t>(), nnz, rows, cols, b, nullptr,
                     nullptr,        -1, y.as<T>()};
    Part parts[]{whole, whole, whole};
    parts[1].rows = head;
    parts[1].y = z.as<T>();
    status = rocket_packed_linears(path, type, threads, x.as<T>(), batch, cols, parts, 2);
    expect(status == OK && close(y.as<T>(), x.as<T>(), weight, b, batch, cols, rows, tolerance) &&
               close(z.as<T>(), x.as<T>(), weight, b, batch, cols, head, tolerance),
           "packed_linears", path, type, rows, cols, batch);

    fill(dense.as<V>(), rows * cols);
    for (int64_t i = 0; i < rows * cols; i++)
        weight[size_t(i)] = to_float(dense.as<V>()[i]) * (INT8 ? to_float(scale[i / cols]) / 127 : 1);
    status = rocket_dense_linear(path, type, threads, x.as<T>(), batch, cols, dense.as<V>(), scale, rows, b, y.as<T>());
    expect(status == OK && close(y.as<T>(), x.as<T>(), weight, b, batch, cols, rows, tolerance), "dense_linear", path,
           type, rows, cols, batch);

    // A dictionary before the matrix: the same as the two products, one after the other. Its first rows once more.
    parts[0] = whole;
    parts[0].dictionary = dictionary.as<V>();
    parts[0].dictionary_scale = dictionary_scale;
    parts[0].rank = cols;
    parts[1] = parts[0];
    parts[1].rows = head;
    parts[1].y = w.as<T>();
    status = rocket_packed_linears(path, type, threads, u.as<T>(), batch, in, parts, 2);
    status |= rocket_dense_linear(path, type, 1, u.as<T>(), batch, in, dictionary.as<V>(), dictionary_scale, cols,
                                  nullptr, h.as<T>());
    parts[2].y = z.as<T>();
    status |= rocket_packed_linears(path, type, 1, h.as<T>(), batch, cols, &parts[2], 1);
    same = status == OK && (batch == 0 || memcmp(y.as<char>(), z.as<char>(), size_t(batch * rows * item)) == 0);
    for (int64_t i = 0; i < batch * head; i++)
        same &= memcmp(w.as<T>() + i, z.as<T>() + i / head * rows + i % head, sizeof(T)) == 0;
    expect(same, "packed_linears behind dictionaries", path, type, rows, cols, batch);

    // Some columns for atoms, the others for the input itself; beside it a matrix of the input alone.
    const int64_t rank = between(0, cols), rest = cols - rank;
    Buffer atoms(rank * rest * int64_t(sizeof(V)), guarded), direct(batch * rest * item, guarded);
    Buffer own(batch * rank * item, guarded);
    fill(atoms.as<V>(), rank * rest);
    fill(direct.as<T>(), batch * rest);
    parts[0].dictionary = atoms.as<V>();
    parts[0].rank = rank;
    Buffer empty(rows * words_of(rest) * 8, guarded), starts((rows + 1) * 8, guarded);
    memset(empty.as<char>(), 0, size_t(rows * words_of(rest) * 8));
    memset(starts.as<char>(), 0, size_t((rows + 1) * 8));
    parts[1] = whole;
    parts[1].cols = rest;
    parts[1].mask = empty.as<uint8_t>();
    parts[1].offsets = starts.as<int64_t>();
    parts[1].nnz = 0;
    parts[1].y = w.as<T>();
    status = rocket_packed_linears(path, type, threads, direct.as<T>(), batch, rest, parts, 2);
    status |= rocket_dense_linear(path, type, 1, direct.as<T>(), batch, rest, atoms.as<V>(), dictionary_scale, rank,
                                  nullptr, own.as<T>());
    for (int64_t i = 0; i < batch; i++) {
        memcpy(h.as<T>() + i * cols, own.as<T>() + i * rank, size_t(rank * item));
        memcpy(h.as<T>() + i * cols + rank, direct.as<T>() + i * rest, size_t(rest * item));
    }
    status |= rocket_packed_linears(path, type, 1, h.as<T>(), batch, cols, &parts[2], 1);
    same = status == OK && (batch == 0 || memcmp(y.as<char>(), z.as<char>(), size_t(batch * rows * item)) == 0);
    for (int64_t i = 0; i < batch * rows; i++) same &= to_float(w.as<T>()[i]) == (b ? to_float(b[i % rows]) : 0.0f);
    expect(same, "packed_linears beside their input", path, type, rows, cols, batch);

    parts[0].cols = cols + 1;
    expect(rocket_packed_linears(path, type, 1, direct.as<T>(), batch, rest, parts, 1) == BAD_REQUEST,
           "the check of columns", path, type, rows, cols, batch);
    if (nnz)
        expect(rocket_expand(path, type, 1, values.as<V>(), scale, mask.as<uint8_t>(), offsets.as<int64_t>(), nnz - 1,
                             rows, cols, expanded.as<T>()) == BAD_OFFSETS,
               "the check of offsets", path, type, rows, cols, batch);
}

int main() {
    int rounds = 0;
    for (int path = 0; path < PATHS; path++)
        for (int i = 0; i < 60 && available(path); i++, rounds++) {
            round<float, float>(path, FP32, i % 2, 1e-5);
            round<bf16, bf16>(path, BF16, i % 2, 8e-3);
            round<fp16, fp16>(path, FP16, i % 2, 1e-3);
            round<float, int8_t>(path, FP32, i % 2, 1e-5);
            round<bf16, int8_t>(path, BF16, i % 2, 8e-3);
            round<fp16, int8_t>(path, FP16, i % 2, 1e-3);
        }
    printf("%d rounds on %x paths: no fault\n", rounds, unsigned(rocket_paths()));
}
