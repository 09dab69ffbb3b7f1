// Kernels of sparse decode on the CPU (Spark Transformer, arXiv 2506.06644, Sections 2.1 and 2.2), and the dense
// products they are compared with.
//
// Everything is made of two products with the rows of a matrix: dots with a vector (dot_all, dot_rows) and a weighted
// sum of rows (sum_rows). A dense product takes all rows, a sparse one a list of them; nothing else differs, so a comparison
// of the two compares the bytes that are read and not the care that was taken.
//
// The vectors are those of GCC and Clang, so one source serves AVX-512, AVX2, NEON and machines without any: it is
// compiled once for each (hatch_build.py) and Python takes the library that fits the CPU. Plain C functions on plain
// pointers: the library depends on neither Python nor torch.
//
// Matrices are row-major, float32 (type 0) or bfloat16 (type 1); vectors, sums and results are float32.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "elements.h"

#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; }
static int omp_get_num_threads() { return 1; }
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

constexpr int64_t BLOCK = 32;        // elements that are loaded together
constexpr int64_t IN_ORDER = 4;      // rows that are read together of a matrix of which all are read
constexpr int64_t LISTED = 8;        // and of a list: each jump to a row waits for memory, and they wait together
constexpr int64_t AHEAD = 128;       // elements of a listed row that are asked for while the rows before it are read
constexpr int64_t TILE = 512;        // columns of a group of rows that stay in the first-level cache for all vectors
constexpr int64_t CHUNK = 256;       // keys of attention that one thread scores at a time

inline Floats load(const float* from) {
    Floats vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

inline void store(float* to, Floats vector) { std::memcpy(to, &vector, sizeof vector); }

// Zeros, from the start of a cache line: a vector that spans two lines takes twice as long to load.
class Room {
    struct alignas(64) Line {
        float values[16];
    };
    std::vector<Line> lines;

  public:
    explicit Room(int64_t n) : lines((n + 15) / 16) {}
    float* data() { return reinterpret_cast<float*>(lines.data()); }
};

// A block of 32 elements as two vectors. Those of bfloat16 are the even and the odd elements: a shift and a mask, where
// elements in order would need slower instructions. Vectors that meet such blocks are kept in the same order.
struct Block {
    Floats first, second;
};

inline Block load_block(const float* from) { return {load(from), load(from + 16)}; }

inline Block load_block(const bfloat16* from) {
    Words pairs;
    std::memcpy(&pairs, from, sizeof pairs);
    const Words even = pairs << 16, odd = pairs & 0xffff0000u;
    Block block;
    std::memcpy(&block.first, &even, sizeof even);
    std::memcpy(&block.second, &odd, sizeof odd);
    return block;
}

// The blocks of a vector in the order of load_block; what is left over stays as it is.
template <class T>
void to_block_order(const float* from, float* to, int64_t dim) {
    int64_t i = 0;
    for (; sizeof(T) == 2 && i + BLOCK <= dim; i += BLOCK)
        for (int64_t j = 0; j < BLOCK / 2; ++j) to[i + j] = from[i + 2 * j], to[i + 16 + j] = from[i + 2 * j + 1];
    for (; i < dim; ++i) to[i] = from[i];
}

template <class T>
void from_block_order(const float* from, float* to, int64_t dim) {
    int64_t i = 0;
    for (; sizeof(T) == 2 && i + BLOCK <= dim; i += BLOCK)
        for (int64_t j = 0; j < BLOCK / 2; ++j) to[i + 2 * j] = from[i + j], to[i + 2 * j + 1] = from[i + 16 + j];
    for (; i < dim; ++i) to[i] = from[i];
}

inline float sum(Floats x) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}

struct Range {
    int64_t start, stop;
};

// The part of n units, in steps of `step`, that this thread works on.
inline Range part(int64_t n, int64_t step, int64_t thread, int64_t n_thread) {
    const int64_t steps = (n + step - 1) / step;
    const int64_t start = steps * thread / n_thread * step, stop = steps * (thread + 1) / n_thread * step;
    return {start < n ? start : n, stop < n ? stop : n};
}

template <class T>
struct Rows {
    const T* data;
    int64_t stride;
    const int32_t* list;  // null: all rows in order

    const T* operator[](int64_t i) const { return data + (list ? list[i] : i) * stride; }
};

// Asks for the first elements of a row; the CPU itself asks for those that follow, once they are read in order.
template <class T>
inline void fetch(const T* row, int64_t n) {
    for (int64_t i = 0; i < n && i < AHEAD; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

// out[v][row] = rows[row] · vectors[v] of N rows and M vectors (in block order).
template <int N, int M, class T>
inline void dot_block(const T* const* rows, const float* vectors, int64_t dim, float* out, int64_t out_stride) {
    Floats first[N][M] = {}, second[N][M] = {};
    const int64_t whole = dim / BLOCK * BLOCK;
    for (int64_t i = 0; i < whole; i += BLOCK)
        for (int row = 0; row < N; ++row) {
            const Block block = load_block(rows[row] + i);
            for (int v = 0; v < M; ++v) {
                first[row][v] += block.first * load(vectors + v * dim + i);
                second[row][v] += block.second * load(vectors + v * dim + i + 16);
            }
        }
    for (int row = 0; row < N; ++row)
        for (int v = 0; v < M; ++v) {
            float rest = 0;
            for (int64_t i = whole; i < dim; ++i) rest += widen(rows[row][i]) * vectors[v * dim + i];
            out[v * out_stride + row] = sum(first[row][v] + second[row][v]) + rest;
        }
}

// out[v][i] = rows[i] · vectors[v] for rows start to stop, several rows at a time.
template <class T>
void dot_rows(Rows<T> rows, Range range, const float* vectors, int64_t n_vector, int64_t dim, float* out,
              int64_t out_stride) {
    const T* group[LISTED];
    int64_t i = range.start;
    for (; i + LISTED <= range.stop; i += LISTED) {
        for (int64_t row = 0; row < LISTED; ++row) {
            group[row] = rows[i + row];
            if (i + LISTED + row < range.stop) fetch(rows[i + LISTED + row], dim);
        }
        for (int64_t v = 0; v < n_vector; ++v)
            dot_block<LISTED, 1>(group, vectors + v * dim, dim, out + v * out_stride + i, 0);
    }
    for (; i < range.stop; ++i) {
        group[0] = rows[i];
        for (int64_t v = 0; v < n_vector; ++v)
            dot_block<1, 1>(group, vectors + v * dim, dim, out + v * out_stride + i, 0);
    }
}

// The same for all rows in order: with few vectors one stream, at the memory's speed. More of them are what is read
// most, and have to meet several rows once read.
template <class T>
void dot_all(const T* matrix, Range range, const float* vectors, int64_t n_vector, int64_t dim, float* out,
             int64_t out_stride) {
    if (n_vector > 4) return dot_rows<T>({matrix, dim, nullptr}, range, vectors, n_vector, dim, out, out_stride);
    for (int64_t i = range.start; i < range.stop; ++i) {
        const T* row = matrix + i * dim;
        switch (n_vector) {
            case 1: dot_block<1, 1>(&row, vectors, dim, out + i, out_stride); break;
            case 2: dot_block<1, 2>(&row, vectors, dim, out + i, out_stride); break;
            case 3: dot_block<1, 3>(&row, vectors, dim, out + i, out_stride); break;
            case 4: dot_block<1, 4>(&row, vectors, dim, out + i, out_stride); break;
        }
    }
}

// sums += Σ weights[row] · rows[row] for N rows and `width` columns, sums in block order.
template <int N, class T>
inline void sum_group(const T* const* rows, const float* weights, int64_t width, float* sums) {
    const int64_t whole = width / BLOCK * BLOCK;
    for (int64_t c = 0; c < whole; c += BLOCK) {
        Floats first = load(sums + c), second = load(sums + c + 16);
        for (int row = 0; row < N; ++row) {
            const Block block = load_block(rows[row] + c);
            first += block.first * weights[row];
            second += block.second * weights[row];
        }
        store(sums + c, first);
        store(sums + c + 16, second);
    }
    for (int64_t c = whole; c < width; ++c)
        for (int row = 0; row < N; ++row) sums[c] += widen(rows[row][c]) * weights[row];
}

// sums[v][c] += Σ_i weights[v][i] · rows[i][c] for columns start to stop, which begins a block, N rows at a time.
template <int N, class T>
void sum_groups(Rows<T> rows, int64_t n_row, Range columns, const float* weights, int64_t weight_stride,
                int64_t n_vector, float* sums, int64_t sum_stride) {
    const int64_t whole = columns.stop - columns.start, tile = n_vector > 1 && whole > TILE ? TILE : whole;
    const T* group[N];
    for (int64_t i = 0; i < n_row; i += N) {
        const int64_t n = n_row - i < N ? n_row - i : N;
        for (int64_t row = i + N; rows.list && row < i + 2 * N && row < n_row; ++row)
            fetch(rows[row] + columns.start, whole);
        for (int64_t start = columns.start; start < columns.stop; start += tile) {
            const int64_t width = columns.stop - start < tile ? columns.stop - start : tile;
            for (int64_t row = 0; row < n; ++row) group[row] = rows[i + row] + start;
            for (int64_t v = 0; v < n_vector; ++v) {
                const float* w = weights + v * weight_stride + i;
                float* s = sums + v * sum_stride + start;
                if (n == N)
                    sum_group<N>(group, w, width, s);
                else
                    for (int64_t row = 0; row < n; ++row) sum_group<1>(group + row, w + row, width, s);
            }
        }
    }
}

template <class T>
void sum_rows(Rows<T> rows, int64_t n_row, Range columns, const float* weights, int64_t weight_stride,
              int64_t n_vector, float* sums, int64_t sum_stride) {
    if (rows.list)
        sum_groups<LISTED>(rows, n_row, columns, weights, weight_stride, n_vector, sums, sum_stride);
    else
        sum_groups<IN_ORDER>(rows, n_row, columns, weights, weight_stride, n_vector, sums, sum_stride);
}

// mean + std · quantile of n numbers; with ±inf or NaN among them, NaN.
double threshold(const float* x, int64_t n, double quantile) {
    double total = 0, squares = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < n; ++i) total += x[i];
    const double mean = total / n;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; ++i) squares += (x[i] - mean) * (x[i] - mean);
    return mean + std::sqrt(squares / n) * quantile;
}

enum Activation { ELSEWHERE, GELU, GELU_TANH, RELU, SILU };

inline float activated(Activation activation, float x) {
    switch (activation) {
        case GELU: return 0.5f * x * (1.0f + std::erf(x * 0.70710678118654752f));
        case GELU_TANH: return 0.5f * x * (1.0f + std::tanh(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case SILU: return x / (1.0f + std::exp(-x));
        default: return x > 0 || x != x ? x : 0.0f;
    }
}

// What is kept of each of n queries, of n_row rows: in the first counts[v] places of row v of [n, n_row]. A query with a
// count below 0 is NaN.
struct Kept {
    int64_t n_row;
    const int32_t *indices, *counts;
    const float* weights;
};

// out[v] = Σ_i weights[v, i] · matrix[indices[v, i]] for the thread's part of the columns.
template <class T>
void sum_kept(const T* matrix, int64_t n, int64_t dim, const Kept& kept, Range columns, float* sums, float* out) {
    for (int64_t v = 0; v < n; ++v) {
        const int64_t n_row = kept.n_row;
        sum_rows<T>({matrix, dim, kept.indices + v * n_row}, kept.counts[v], columns, kept.weights + v * n_row, 0, 1,
                    sums + v * dim, 0);
        float* result = out + v * dim + columns.start;
        from_block_order<T>(sums + v * dim + columns.start, result, columns.stop - columns.start);
        for (int64_t c = 0; kept.counts[v] < 0 && c < columns.stop - columns.start; ++c) result[c] = NAN;
    }
}

template <class T>
struct FeedForward {
    const T *predictor, *rest, *output;
    const float *predictor_bias, *rest_bias;
    int64_t n, r, rest_dim, n_inner, out_dim;
    double quantile;
    Activation activation;
};

// What is worked in, [n, n_inner] each, and counts [n].
struct Scratch {
    float *scores, *weights, *multipliers;
    int32_t *indices, *counts;
};

// The neurons of one query above the threshold: indices and score - threshold.
template <class T>
int32_t select(const FeedForward<T>& ffn, const float* scores, int32_t* indices, float* excess) {
    const bool keeps_all = std::isinf(ffn.quantile);
    const double theta = keeps_all ? 0 : threshold(scores, ffn.n_inner, ffn.quantile);
    int32_t count = 0;
    for (int64_t i = 0; i < ffn.n_inner; ++i) {
        indices[count] = static_cast<int32_t>(i);
        excess[count] = static_cast<float>(scores[i] - theta);
        count += keeps_all || scores[i] > theta;
    }
    return std::isnan(theta) ? -1 : count;
}

// The thread's part of a query's neurons: multipliers, and weights where the activation is known.
template <class T>
void multiply(const FeedForward<T>& ffn, const float* rest_q, Range range, const int32_t* list, float* multipliers,
              float* weights) {
    dot_rows<T>({ffn.rest, ffn.rest_dim, list}, range, rest_q, 1, ffn.rest_dim, multipliers, 0);
    for (int64_t i = range.start; i < range.stop; ++i) {
        if (ffn.rest_bias) multipliers[i] += ffn.rest_bias[list[i]];
        if (ffn.activation != ELSEWHERE) weights[i] = activated(ffn.activation, weights[i]) * multipliers[i];
    }
}

template <class T>
void feed_forward(const FeedForward<T>& ffn, const float* q, const Scratch& scratch, float* out, int threads) {
    const int64_t n = ffn.n, r = ffn.r, rest_dim = ffn.rest_dim, n_inner = ffn.n_inner, dim = r + rest_dim;
    Room predictor_q(n * r), rest_q(n * rest_dim), sums(n * ffn.out_dim);
    for (int64_t v = 0; v < n; ++v) {
        to_block_order<T>(q + v * dim, predictor_q.data() + v * r, r);
        to_block_order<T>(q + v * dim + r, rest_q.data() + v * rest_dim, rest_dim);
    }
#pragma omp parallel num_threads(threads)
    {
        const int64_t thread = omp_get_thread_num(), n_thread = omp_get_num_threads();
        const Range neurons = part(n_inner, BLOCK, thread, n_thread);
        dot_all(ffn.predictor, neurons, predictor_q.data(), n, r, scratch.scores, n_inner);
        for (int64_t v = 0; ffn.predictor_bias && v < n; ++v)
            for (int64_t i = neurons.start; i < neurons.stop; ++i)
                scratch.scores[v * n_inner + i] += ffn.predictor_bias[i];
#pragma omp barrier
#pragma omp for
        for (int64_t v = 0; v < n; ++v) {
            const int64_t row = v * n_inner;
            scratch.counts[v] = select(ffn, scratch.scores + row, scratch.indices + row, scratch.weights + row);
        }
        for (int64_t v = 0; v < n; ++v) {
            const Range range = part(scratch.counts[v] < 0 ? 0 : scratch.counts[v], LISTED, thread, n_thread);
            const int64_t row = v * n_inner;
            multiply(ffn, rest_q.data() + v * rest_dim, range, scratch.indices + row, scratch.multipliers + row,
                     scratch.weights + row);
        }
        if (ffn.activation != ELSEWHERE) {
#pragma omp barrier
            sum_kept(ffn.output, n, ffn.out_dim, {n_inner, scratch.indices, scratch.counts, scratch.weights},
                     part(ffn.out_dim, BLOCK, thread, n_thread), sums.data(), out);
        }
    }
}

template <class T>
void weighted_rows(const T* matrix, int64_t n, int64_t n_row, int64_t dim, const int32_t* indices,
                   const int32_t* counts, const float* weights, float* out, int threads) {
    Room sums(n * dim);
#pragma omp parallel num_threads(threads)
    {
        const Range columns = part(dim, BLOCK, omp_get_thread_num(), omp_get_num_threads());
        if (indices)
            sum_kept(matrix, n, dim, {n_row, indices, counts, weights}, columns, sums.data(), out);
        else {
            sum_rows<T>({matrix, dim, nullptr}, n_row, columns, weights, n_row, n, sums.data(), dim);
            for (int64_t v = 0; v < n; ++v)
                from_block_order<T>(sums.data() + v * dim + columns.start, out + v * dim + columns.start,
                                    columns.stop - columns.start);
        }
    }
}

template <class T>
void all_dots(const T* matrix, int64_t n, int64_t n_row, int64_t dim, const float* vectors, float* out, int threads) {
    Room ordered(n * dim);
    for (int64_t v = 0; v < n; ++v) to_block_order<T>(vectors + v * dim, ordered.data() + v * dim, dim);
#pragma omp parallel num_threads(threads)
    dot_all(matrix, part(n_row, 4, omp_get_thread_num(), omp_get_num_threads()), ordered.data(), n, dim, out, n_row);
}

struct AttentionShape {
    int64_t batch, n_kv_head, group, n_key, r, rest_dim, value_dim;
    // of the sequence and of the key and value head, in elements
    int64_t predictor_batch, predictor_head, rest_batch, rest_head, value_batch, value_head;
};

inline float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// `normal_quantile`: Φ⁻¹(1 - k / m) for m = 0 .. n_key visible keys, -inf where all are kept.
template <class T>
void attend(const AttentionShape& s, const T* predictor, const T* rest, const T* value, const float* q,
            const uint8_t* visible, const double* normal_quantile, double predictor_scale, double rest_scale,
            float* scores, int32_t* counts, float* out, int threads) {
    const int64_t head_dim = s.r + s.rest_dim, n_head = s.n_kv_head * s.group;
    const int64_t n_chunk = (s.n_key + CHUNK - 1) / CHUNK;
    Room predictor_q(s.batch * n_head * s.r), rest_q(s.batch * n_head * s.rest_dim);
    for (int64_t i = 0; i < s.batch * n_head; ++i) {
        to_block_order<T>(q + i * head_dim, predictor_q.data() + i * s.r, s.r);
        to_block_order<T>(q + i * head_dim + s.r, rest_q.data() + i * s.rest_dim, s.rest_dim);
    }
#pragma omp parallel num_threads(threads)
    {
#pragma omp for collapse(3)
        for (int64_t b = 0; b < s.batch; ++b)
            for (int64_t h = 0; h < s.n_kv_head; ++h)
                for (int64_t chunk = 0; chunk < n_chunk; ++chunk) {
                    const int64_t first = (b * s.n_kv_head + h) * s.group, start = chunk * CHUNK;
                    const Range range = {start, start + CHUNK < s.n_key ? start + CHUNK : s.n_key};
                    dot_all(predictor + b * s.predictor_batch + h * s.predictor_head, range,
                            predictor_q.data() + first * s.r, s.group, s.r, scores + first * s.n_key, s.n_key);
                }
        std::vector<int32_t> kept(s.n_key);
        std::vector<float> seen(s.n_key), weights(s.n_key), products(s.n_key);
        Room sums(s.value_dim);
#pragma omp for
        for (int64_t i = 0; i < s.batch * n_head; ++i) {
            const int64_t b = i / n_head, h = i % n_head / s.group;
            const uint8_t* mask = visible ? visible + b * s.n_key : nullptr;
            float* x = scores + i * s.n_key;
            float* result = out + i * s.value_dim;
            int64_t n_seen = 0;
            for (int64_t key = 0; key < s.n_key; ++key)
                if (!mask || mask[key]) seen[n_seen++] = static_cast<float>(x[key] * predictor_scale);
            // the largest is always kept; with a NaN or an infinity among them, as with k keys or fewer, all are
            const double quantile = normal_quantile[n_seen];
            const double theta = std::isinf(quantile) ? quantile : threshold(seen.data(), n_seen, quantile);
            float greatest = -std::numeric_limits<float>::infinity();
            for (int64_t position = 0; position < n_seen; ++position)
                greatest = seen[position] > greatest ? seen[position] : greatest;
            int64_t n_kept = 0, position = 0;
            for (int64_t key = 0; key < s.n_key; ++key) {
                if (mask && !mask[key]) continue;
                const float score = seen[position++];
                if (!(score <= theta) || score == greatest) {
                    kept[n_kept] = static_cast<int32_t>(key);
                    weights[n_kept++] = score;
                }
            }
            counts[i] = static_cast<int32_t>(n_kept);
            dot_rows<T>({rest + b * s.rest_batch + h * s.rest_head, s.rest_dim, kept.data()}, {0, n_kept},
                        rest_q.data() + i * s.rest_dim, 1, s.rest_dim, products.data(), 0);
            double total = 0;
            for (int64_t j = 0; j < n_kept; ++j) {
                const float weight = std::exp(weights[j] - greatest);
                total += weight;
                weights[j] = weight * softplus(static_cast<float>(products[j] * rest_scale));
            }
            std::memset(sums.data(), 0, s.value_dim * sizeof(float));
            sum_rows<T>({value + b * s.value_batch + h * s.value_head, s.value_dim, kept.data()}, n_kept,
                        {0, s.value_dim}, weights.data(), 0, 1, sums.data(), 0);
            from_block_order<T>(sums.data(), result, s.value_dim);
            for (int64_t c = 0; c < s.value_dim; ++c) result[c] = static_cast<float>(result[c] / total);
        }
    }
}

}  // namespace

// What the functions below take: one more for each change of it. Python compares it with its own number.
EXPORT int normfree_interface() { return 2; }

// 1 where the library was compiled with OpenMP.
EXPORT int normfree_is_parallel() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

// A sparse FFN for n queries q [n, r + rest_dim]: predictor [n_inner, r], rest [n_inner, rest_dim], output [n_inner,
// out_dim], one row a neuron; shape: n, r, rest_dim, n_inner, out_dim. The biases may be null; activation is one of
// Activation. With ELSEWHERE, out [n, out_dim] is not written: scratch [4, n, n_inner] and counts [n] say what to do. Of
// each query, the neurons above the threshold: counts[v] of them (-1: the threshold is NaN), and in the first counts[v]
// places of row v score - threshold (scratch[1]), K2ᵀ q (scratch[2]), and their indices (scratch[3], int32).
EXPORT void normfree_feed_forward(int type, int activation, const void* predictor, const void* rest,
                                  const void* output, const int64_t* shape, double quantile, const float* q,
                                  const float* predictor_bias, const float* rest_bias, float* scratch,
                                  int32_t* counts, float* out, int threads) {
    const auto run = [&](auto element) {
        using T = decltype(element);
        const FeedForward<T> ffn = {static_cast<const T*>(predictor), static_cast<const T*>(rest),
                                    static_cast<const T*>(output), predictor_bias, rest_bias, shape[0], shape[1],
                                    shape[2], shape[3], shape[4], quantile, static_cast<Activation>(activation)};
        const int64_t size = ffn.n * ffn.n_inner;
        feed_forward<T>(ffn, q, {scratch, scratch + size, scratch + 2 * size,
                                 reinterpret_cast<int32_t*>(scratch + 3 * size), counts}, out, threads);
    };
    type == 0 ? run(float()) : run(bfloat16());
}

// out[v] = Σ_i weights[v, i] · matrix[indices[v, i]]: matrix [n_row, dim], weights and indices [n, n_row], of which the
// first counts[v] places count (below 0: NaN). All rows where indices and counts are null.
EXPORT void normfree_weighted_rows(int type, const void* matrix, int64_t n, int64_t n_row, int64_t dim,
                                   const int32_t* indices, const int32_t* counts, const float* weights, float* out,
                                   int threads) {
    const auto run = [&](auto element) {
        using T = decltype(element);
        weighted_rows<T>(static_cast<const T*>(matrix), n, n_row, dim, indices, counts, weights, out, threads);
    };
    type == 0 ? run(float()) : run(bfloat16());
}

// out[v, i] = matrix[i] · vectors[v], matrix [n_row, dim]: the dense product.
EXPORT void normfree_all_dots(int type, const void* matrix, int64_t n, int64_t n_row, int64_t dim,
                              const float* vectors, float* out, int threads) {
    const auto run = [&](auto element) {
        using T = decltype(element);
        all_dots<T>(static_cast<const T*>(matrix), n, n_row, dim, vectors, out, threads);
    };
    type == 0 ? run(float()) : run(bfloat16());
}

// Sparse attention of one query a head: q [batch, n_kv_head · group, r + rest_dim], out [.., value_dim], counts [..]
// the keys that were kept; scores [.., n_key] is room to work in. Strides in elements, shape[7..12]: of sequence and
// head of predictor keys, rest keys and values, whose tokens are contiguous rows. visible [batch, n_key] may be null.
EXPORT void normfree_attend(int type, const void* predictor, const void* rest, const void* value, const int64_t* shape,
                            const float* q, const uint8_t* visible, const double* normal_quantile,
                            double predictor_scale, double rest_scale, float* scores, int32_t* counts,
                            float* out, int threads) {
    const AttentionShape s = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6],
                              shape[7], shape[8], shape[9], shape[10], shape[11], shape[12]};
    const auto run = [&](auto element) {
        using T = decltype(element);
        attend<T>(s, static_cast<const T*>(predictor), static_cast<const T*>(rest), static_cast<const T*>(value), q,
                  visible, normal_quantile, predictor_scale, rest_scale, scores, counts, out, threads);
    };
    type == 0 ? run(float()) : run(bfloat16());
}
