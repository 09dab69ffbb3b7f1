// Causal softmax attention of short sequences on the CPU, forward and backward, with the entropy of its weights.
//
// Of the scores s_j of a query, m is the largest, l = Σ e^(s_j - m) and t = Σ e^(s_j - m) (s_j - m):
//
//     p_j = e^(s_j - m) / l        output = Σ p_j v_j        H = ln l - t / l (nats)
//
// and with the output's gradient g, d_j = g·v_j and Δ = Σ p_j d_j, the gradient of s_j is p_j (d_j - Δ). Scores of a few
// queries at a time lie in cache; they are made again in the backward pass, which needs m and 1 / l only.
//
// Queries, keys and values are float32 (type 0) or bfloat16 (type 1), sums are float32, and made in one order whatever the
// number of threads. Plain C functions on plain pointers: the library depends on neither Python nor torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "elements.h"
#include "vectors.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int ROWS = 8;  // queries, or keys, whose products stay in registers
#else
constexpr int ROWS = 4;
#endif

constexpr int64_t WIDE = 2 * LANES;    // numbers of each of them that do
constexpr int64_t BLOCK = 32;          // queries whose weights are kept for the gradients of keys and values
constexpr int64_t SPAN = 16 * LANES;   // numbers summed in float32 before they are added to a float64 sum
constexpr float HIDDEN = -std::numeric_limits<float>::max();

inline int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

struct Shape {
    int64_t batch, n_head, group, n_token, head_dim;
    int64_t width() const { return up(head_dim, WIDE); }
    int64_t padded() const { return up(n_token, WIDE); }
};

// Tokens of one head: its head_dim numbers are contiguous.
template <class T>
struct Rows {
    T* first;
    int64_t stride;
};

// A tensor [batch, head, token, head_dim] by its strides; [batch, token, head, head_dim] in memory, as projections make
// and take it.
template <class T>
struct Heads {
    T* first;
    const int64_t* strides;
    Rows<T> of(int64_t b, int64_t h) const { return {first + b * strides[0] + h * strides[1], strides[2]}; }
};

// factor · rows start to stop as float32 [stop - start, width], filled up with zeros.
template <class T>
void widen_rows(Rows<const T> rows, int64_t start, int64_t stop, int64_t head_dim, float factor, float* to) {
    const int64_t width = up(head_dim, WIDE), whole = head_dim / LANES * LANES;
    for (int64_t row = start; row < stop; ++row, to += width) {
        const T* from = rows.first + row * rows.stride;
        for (int64_t i = 0; i < whole; i += LANES) store(to + i, load(from + i) * factor);
        for (int64_t i = whole; i < width; ++i) to[i] = i < head_dim ? widen(from[i]) * factor : 0;
    }
}

template <class T>
void narrow_row(const float* row, float factor, int64_t head_dim, T* to) {
    const int64_t whole = head_dim / LANES * LANES;
    for (int64_t i = 0; i < whole; i += LANES) store(to + i, load(row + i) * factor);
    for (int64_t i = whole; i < head_dim; ++i) put(to + i, row[i] * factor);
}

// Rows [n_row, width] as tiles [head_dim][WIDE] of WIDE rows, the last of them filled up with zeros.
void pack(const float* rows, int64_t n_row, int64_t width, int64_t head_dim, float* tiles) {
    for (int64_t start = 0; start < n_row; start += WIDE, tiles += head_dim * WIDE) {
        const int64_t n = std::min(WIDE, n_row - start);
        if (n < WIDE) std::memset(tiles, 0, sizeof(float) * head_dim * WIDE);
        for (int64_t row = 0; row < n; ++row)
            for (int64_t i = 0; i < head_dim; ++i) tiles[i * WIDE + row] = rows[(start + row) * width + i];
    }
}

// Products of N rows [N, width] with the WIDE rows of each tile: to[row · stride + tile · WIDE + i].
template <int N>
inline void dots(const float* rows, int64_t width, const float* tiles, int64_t n_tile, int64_t head_dim, float* to,
                 int64_t stride) {
    for (int64_t tile = 0; tile < n_tile; ++tile, tiles += head_dim * WIDE, to += WIDE) {
        Floats first[N] = {}, second[N] = {};
        for (int64_t i = 0; i < head_dim; ++i) {
            const Floats a = load(tiles + i * WIDE), b = load(tiles + i * WIDE + LANES);
            for (int row = 0; row < N; ++row) {
                const float factor = rows[row * width + i];
                first[row] += a * factor;
                second[row] += b * factor;
            }
        }
        for (int row = 0; row < N; ++row) {
            store(to + row * stride, first[row]);
            store(to + row * stride + LANES, second[row]);
        }
    }
}

// Adds Σ_i weights[row · row_stride + i · stride] rows[i] to each of N rows of sums; rows and sums [.., width].
template <int N>
inline void add_weighted(const float* weights, int64_t row_stride, int64_t stride, int64_t n, const float* rows,
                         int64_t width, float* sums) {
    for (int64_t column = 0; column < width; column += WIDE) {
        Floats first[N], second[N];
        for (int row = 0; row < N; ++row) {
            first[row] = load(sums + row * width + column);
            second[row] = load(sums + row * width + column + LANES);
        }
        for (int64_t i = 0; i < n; ++i) {
            const Floats a = load(rows + i * width + column), b = load(rows + i * width + column + LANES);
            for (int row = 0; row < N; ++row) {
                const float weight = weights[row * row_stride + i * stride];
                first[row] += a * weight;
                second[row] += b * weight;
            }
        }
        for (int row = 0; row < N; ++row) {
            store(sums + row * width + column, first[row]);
            store(sums + row * width + column + LANES, second[row]);
        }
    }
}

// What a query's softmax is made of, and says.
struct Softmax {
    float m, inverse_l, entropy, first;
};

// Turns n scores into e^(s_j - m), and what is behind them, up to a whole tile, into zeros.
Softmax exponentials(float* scores, int64_t n) {
    const int64_t end = up(n, WIDE);
    for (int64_t i = n; i < end; ++i) scores[i] = HIDDEN;
    Floats greatest = load(scores), nothing = {};
    for (int64_t i = 0; i < end; i += LANES) {
        const Floats s = load(scores + i);
        greatest = larger(greatest, s);
        nothing += s * 0.0f;  // NaN where a score is not finite
    }
    const float m = largest(greatest), nan = std::numeric_limits<float>::quiet_NaN();
    double l = 0, t = 0;
    for (int64_t start = 0; start < end; start += SPAN) {
        const int64_t stop = std::min(start + SPAN, end);
        Floats weights = {}, products = {};
        for (int64_t i = start; i < stop; i += LANES) {
            const Floats x = larger(load(scores + i) - m, Floats{} + SMALLEST_EXPONENT), weight = exponential(x);
            store(scores + i, weight);
            weights += weight;
            products += weight * x;
        }
        l += sum(weights);
        t += sum(products);
    }
    for (int64_t i = n; i < end; ++i) scores[i] = 0;
    const float inverse = static_cast<float>(1 / l);
    const bool is_finite = sum(nothing) == 0;
    return {m, inverse, is_finite ? static_cast<float>(std::log(l) - t / l) : nan, is_finite ? scores[0] * inverse : nan};
}

// True if a softmax with these scores is NaN: with a NaN or an infinity among them, unless -inf beside finite ones.
bool is_undefined(const float* scores, int64_t n) {
    bool any_finite = false;
    for (int64_t i = 0; i < n; ++i) {
        if (std::isnan(scores[i]) || scores[i] == INFINITY) return true;
        any_finite |= scores[i] != -INFINITY;
    }
    return !any_finite;
}

// Σ p_j d_j of n_key weights p in place of e^(s_j - m), and p_j (d_j - Δ) in place of d_j.
void score_gradients(float* weights, float* products, int64_t n, float m, float inverse_l) {
    const int64_t end = up(n, WIDE);
    for (int64_t i = n; i < end; ++i) weights[i] = HIDDEN;
    Floats deltas = {};
    for (int64_t i = 0; i < end; i += LANES) {
        const Floats x = larger(load(weights + i) - m, Floats{} + SMALLEST_EXPONENT);
        const Floats p = exponential(x) * inverse_l;
        store(weights + i, p);
        deltas += p * load(products + i);
    }
    const float delta = sum(deltas);
    for (int64_t i = 0; i < end; i += LANES) store(products + i, load(weights + i) * (load(products + i) - delta));
    for (int64_t i = n; i < end; ++i) weights[i] = products[i] = 0;
}

template <class T>
struct Forward {
    Shape s;
    Heads<const T> q, k, v;
    float scale;
    T* output;  // [batch, token, head, head_dim]
    float *maxima, *inverses, *entropy, *first;  // [batch, head, token]

    struct Scratch {
        std::vector<float> keys, tiles, values, queries, scores, sums;
        explicit Scratch(const Shape& s)
            : keys(s.padded() * s.width()), tiles(s.padded() * s.head_dim), values(s.padded() * s.width()),
              queries(ROWS * s.width()), scores(ROWS * s.padded()), sums(ROWS * s.width()) {}
    };

    template <int N>
    void rows(int64_t b, int64_t h, int64_t start, Scratch& room) const {
        const int64_t width = s.width(), stride = s.padded(), n_tile = up(start + N, WIDE) / WIDE;
        widen_rows<T>(q.of(b, h), start, start + N, s.head_dim, scale, room.queries.data());
        dots<N>(room.queries.data(), width, room.tiles.data(), n_tile, s.head_dim, room.scores.data(), stride);
        float inverse[N];
        for (int row = 0; row < N; ++row) {
            float* scores = room.scores.data() + row * stride;
            const int64_t n = start + row + 1, place = (b * s.n_head + h) * s.n_token + start + row;
            Softmax found = exponentials(scores, n);
            std::memset(scores + up(n, WIDE), 0, sizeof(float) * (n_tile * WIDE - up(n, WIDE)));
            maxima[place] = found.m, entropy[place] = found.entropy, first[place] = found.first;
            inverses[place] = inverse[row] = found.inverse_l;
        }
        for (int row = 0; row < N; ++row) {
            const int64_t place = (b * s.n_head + h) * s.n_token + start + row;
            if (entropy[place] == entropy[place]) continue;
            // rare: the scores again, which the exponentials have replaced
            std::vector<float> scores(n_tile * WIDE);
            dots<1>(room.queries.data() + row * width, width, room.tiles.data(), n_tile, s.head_dim, scores.data(), 0);
            if (is_undefined(scores.data(), start + row + 1))
                inverses[place] = inverse[row] = std::numeric_limits<float>::quiet_NaN();
        }
        std::fill(room.sums.begin(), room.sums.begin() + N * width, 0.0f);
        add_weighted<N>(room.scores.data(), stride, 1, start + N, room.values.data(), width, room.sums.data());
        for (int row = 0; row < N; ++row)
            narrow_row(room.sums.data() + row * width, inverse[row], s.head_dim,
                       output + ((b * s.n_token + start + row) * s.n_head + h) * s.head_dim);
    }

    // All heads that share keys and values.
    void group(int64_t b, int64_t kv_head, Scratch& room) const {
        widen_rows<T>(k.of(b, kv_head), 0, s.n_token, s.head_dim, 1, room.keys.data());
        pack(room.keys.data(), s.n_token, s.width(), s.head_dim, room.tiles.data());
        widen_rows<T>(v.of(b, kv_head), 0, s.n_token, s.head_dim, 1, room.values.data());
        for (int64_t h = kv_head * s.group; h < (kv_head + 1) * s.group; ++h) {
            int64_t row = 0;
            for (; row + ROWS <= s.n_token; row += ROWS) rows<ROWS>(b, h, row, room);
            for (; row < s.n_token; ++row) rows<1>(b, h, row, room);
        }
    }
};

template <class T>
struct Backward {
    Shape s;
    Heads<const T> q, k, v, output_gradient;
    float scale;
    const float *maxima, *inverses;
    T *q_gradient, *k_gradient, *v_gradient;  // [batch, token, head, head_dim]

    struct Scratch {
        std::vector<float> keys, key_tiles, values, value_tiles, queries, gradients, weights, products, sums;
        std::vector<float> key_sums, value_sums;
        explicit Scratch(const Shape& s)
            : keys(s.padded() * s.width()), key_tiles(s.padded() * s.head_dim), values(s.padded() * s.width()),
              value_tiles(s.padded() * s.head_dim), queries(BLOCK * s.width()), gradients(BLOCK * s.width()),
              weights(BLOCK * s.padded()), products(BLOCK * s.padded()), sums(ROWS * s.width()),
              key_sums(s.padded() * s.width()), value_sums(s.padded() * s.width()) {}
    };

    template <int N>
    void rows(int64_t b, int64_t h, int64_t start, int64_t row_in_block, int64_t n_seen, Scratch& room) const {
        const int64_t width = s.width(), stride = s.padded(), n_tile = up(start + N, WIDE) / WIDE;
        float* weights = room.weights.data() + row_in_block * stride;
        float* products = room.products.data() + row_in_block * stride;
        dots<N>(room.queries.data() + row_in_block * width, width, room.key_tiles.data(), n_tile, s.head_dim, weights,
                stride);
        dots<N>(room.gradients.data() + row_in_block * width, width, room.value_tiles.data(), n_tile, s.head_dim,
                products, stride);
        for (int row = 0; row < N; ++row) {
            const int64_t n = start + row + 1, place = (b * s.n_head + h) * s.n_token + start + row, end = up(n, WIDE);
            score_gradients(weights + row * stride, products + row * stride, n, maxima[place], inverses[place]);
            std::memset(weights + row * stride + end, 0, sizeof(float) * (n_seen - end));
            std::memset(products + row * stride + end, 0, sizeof(float) * (n_seen - end));
        }
        std::fill(room.sums.begin(), room.sums.begin() + N * width, 0.0f);
        add_weighted<N>(products, stride, 1, start + N, room.keys.data(), width, room.sums.data());
        for (int row = 0; row < N; ++row)
            narrow_row(room.sums.data() + row * width, scale, s.head_dim,
                       q_gradient + ((b * s.n_token + start + row) * s.n_head + h) * s.head_dim);
    }

    void block(int64_t b, int64_t h, int64_t start, Scratch& room) const {
        const int64_t stop = std::min(start + BLOCK, s.n_token), width = s.width(), stride = s.padded();
        const int64_t n_seen = up(stop, WIDE);
        widen_rows<T>(q.of(b, h), start, stop, s.head_dim, scale, room.queries.data());
        widen_rows<T>(output_gradient.of(b, h), start, stop, s.head_dim, 1, room.gradients.data());
        int64_t row = start;
        for (; row + ROWS <= stop; row += ROWS) rows<ROWS>(b, h, row, row - start, n_seen, room);
        for (; row < stop; ++row) rows<1>(b, h, row, row - start, n_seen, room);
        for (int64_t key = 0; key < n_seen; key += ROWS) {
            add_weighted<ROWS>(room.products.data() + key, 1, stride, stop - start, room.queries.data(), width,
                               room.key_sums.data() + key * width);
            add_weighted<ROWS>(room.weights.data() + key, 1, stride, stop - start, room.gradients.data(), width,
                               room.value_sums.data() + key * width);
        }
    }

    void group(int64_t b, int64_t kv_head, Scratch& room) const {
        const int64_t width = s.width(), n_kv_head = s.n_head / s.group;
        widen_rows<T>(k.of(b, kv_head), 0, s.n_token, s.head_dim, 1, room.keys.data());
        pack(room.keys.data(), s.n_token, width, s.head_dim, room.key_tiles.data());
        widen_rows<T>(v.of(b, kv_head), 0, s.n_token, s.head_dim, 1, room.values.data());
        pack(room.values.data(), s.n_token, width, s.head_dim, room.value_tiles.data());
        std::fill(room.key_sums.begin(), room.key_sums.end(), 0.0f);
        std::fill(room.value_sums.begin(), room.value_sums.end(), 0.0f);
        for (int64_t h = kv_head * s.group; h < (kv_head + 1) * s.group; ++h)
            for (int64_t start = 0; start < s.n_token; start += BLOCK) block(b, h, start, room);
        for (int64_t key = 0; key < s.n_token; ++key) {
            const int64_t place = ((b * s.n_token + key) * n_kv_head + kv_head) * s.head_dim;
            narrow_row(room.key_sums.data() + key * width, 1, s.head_dim, k_gradient + place);
            narrow_row(room.value_sums.data() + key * width, 1, s.head_dim, v_gradient + place);
        }
    }
};

template <class Pass>
void all_groups(const Pass& pass, int threads) {
    const int64_t n_kv_head = pass.s.n_head / pass.s.group;
#pragma omp parallel num_threads(threads)
    {
        typename Pass::Scratch room(pass.s);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < pass.s.batch * n_kv_head; ++i) pass.group(i / n_kv_head, i % n_kv_head, room);
    }
}

}  // namespace

// What the functions below take: one more for each change of it. Python compares it with its own number.
EXPORT int normfree_interface() { return 1; }

// Attention of q [batch, n_head, n_token, head_dim] to k and v [batch, n_head / group, n_token, head_dim], each query to
// the keys up to its own; shape: batch, n_head, group, n_token, head_dim; strides: of batch, head and token, of q, k and v.
// output [batch, n_token, n_head, head_dim]; and [batch, n_head, n_token]: m, 1 / l, the entropy in nats and the weight of
// the first key. Where a score is not finite, entropy and weight are NaN; the output is what a softmax makes of it.
EXPORT void normfree_attention(int type, const void* q, const void* k, const void* v, const int64_t* shape,
                               const int64_t* strides, float scale, void* output, float* maxima, float* inverses,
                               float* entropy, float* first, int threads) {
    const Shape s = {shape[0], shape[1], shape[2], shape[3], shape[4]};
    const auto run = [&](auto element) {
        using T = decltype(element);
        const auto heads = [&](const void* x, int i) { return Heads<const T>{static_cast<const T*>(x), strides + 3 * i}; };
        all_groups(Forward<T>{s, heads(q, 0), heads(k, 1), heads(v, 2), scale, static_cast<T*>(output), maxima, inverses,
                              entropy, first},
                   threads);
    };
    type == 0 ? run(float()) : run(bfloat16());
}

// Gradients of q, k and v, each [batch, n_token, heads, head_dim], from that of the output, whose strides are the last
// three; maxima and inverses are those of the forward pass.
EXPORT void normfree_attention_backward(int type, const void* q, const void* k, const void* v,
                                        const void* output_gradient, const int64_t* shape, const int64_t* strides,
                                        float scale, const float* maxima, const float* inverses, void* q_gradient,
                                        void* k_gradient, void* v_gradient, int threads) {
    const Shape s = {shape[0], shape[1], shape[2], shape[3], shape[4]};
    const auto run = [&](auto element) {
        using T = decltype(element);
        const auto heads = [&](const void* x, int i) { return Heads<const T>{static_cast<const T*>(x), strides + 3 * i}; };
        all_groups(Backward<T>{s, heads(q, 0), heads(k, 1), heads(v, 2), heads(output_gradient, 3), scale, maxima,
                               inverses, static_cast<T*>(q_gradient), static_cast<T*>(k_gradient),
                               static_cast<T*>(v_gradient)},
                   threads);
    };
    type == 0 ? run(float()) : run(bfloat16());
}
