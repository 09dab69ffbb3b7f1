// Entropy of attention on the CPU, in nats (ReLU's Revival, Eq. 8, without its ε): from queries and keys in one pass, and
// from attention weights that are there.
//
// The pass is an online softmax without values. Of the scores s_j of a query, m is the largest so far, l = Σ e^(s_j - m)
// and t = Σ e^(s_j - m) (s_j - m), so that
//
//     H = ln l - t / l        lse = m + ln l
//
// Both terms of H are at least 0: nothing cancels. Where m rises by d, l becomes e^-d l and t becomes e^-d (t - d l).
//
// Plain C functions on plain pointers, float32: the library depends on neither Python nor torch.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "elements.h"
#include "vectors.h"

namespace {

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int QUERIES = 8;
#else
constexpr int QUERIES = 4;
#endif

constexpr int64_t KEYS = 2 * LANES;    // keys of a tile, whose scores with QUERIES queries stay in registers
constexpr int64_t SPAN = 256 / KEYS;   // tiles whose scores are written down together
constexpr int64_t QUERY_BLOCK = 64;    // queries that one thread takes at a time
constexpr int64_t FETCH_AHEAD = 2, CACHE_LINE = 64 / sizeof(float);  // rows of weights, and the numbers in a line
constexpr float HIDDEN = -std::numeric_limits<float>::max();


// ln x for normal positive x, within 2 units in the last place of the larger of |ln x| and 1 (of Cephes).
inline Floats logarithm(Floats x) {
    const Ints bits = (Ints)x - 0x3f3504f3;  // √½: the mantissa is taken from [√½, √2)
    const Floats n = __builtin_convertvector(bits >> 23, Floats);
    const Floats r = (Floats)((bits & 0x007fffff) + 0x3f3504f3) - 1.0f;
    const Floats z = r * r;
    Floats p = r * 7.0376836292e-2f - 1.1514610310e-1f;
    p = p * r + 1.1676998740e-1f;
    p = p * r - 1.2420140846e-1f;
    p = p * r + 1.4249322787e-1f;
    p = p * r - 1.6668057665e-1f;
    p = p * r + 2.0000714765e-1f;
    p = p * r - 2.4999993993e-1f;
    p = p * r + 3.3333331174e-1f;
    p = p * (z * r) - n * 2.12194440e-4f - z * 0.5f;
    return (r + p) + n * 0.693359375f;
}

// tanh x, within 2 units in the last place; NaN stays NaN.
inline Floats hyperbolic_tangent(Floats x) {
    const Floats size = larger(x, -x), z = x * x;
    Floats p = z * -5.70498872745e-3f + 2.06390887954e-2f;  // of Cephes, for |x| < 0.625
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const Floats small = p * z * x + x;
    const Floats e = exponential(larger(size * -2.0f, Floats{} + SMALLEST_EXPONENT));
    const Floats large = (1.0f - e) / (1.0f + e);
    const Floats result = size < 0.625f ? small : x < 0.0f ? -large : large;
    return x == x ? result : x;
}

// What becomes of scale · q·k: a soft-cap, 0 for none, and numbers that are added, bias null for none. strides are those
// of sequence, head and query; keys are contiguous.
struct Scoring {
    float scale, softcap;
    const float* bias;
    const int64_t* strides;
};

struct Shape {
    int64_t batch, n_head, group, n_query, n_key, head_dim;
    int64_t q_batch, q_head, q_query;  // strides of q, whose head_dim is contiguous
    int64_t k_batch, k_head, k_key;
};

// Keys [head_dim][KEYS] of a tile; the last one is filled up with zeros.
void pack(const float* keys, int64_t stride, int64_t n_key, int64_t head_dim, float* packed) {
    for (int64_t start = 0; start < n_key; start += KEYS, packed += head_dim * KEYS) {
        const int64_t n = n_key - start < KEYS ? n_key - start : KEYS;
        if (n < KEYS) std::memset(packed, 0, sizeof(float) * head_dim * KEYS);
        for (int64_t key = 0; key < n; ++key)
            for (int64_t i = 0; i < head_dim; ++i) packed[i * KEYS + key] = keys[(start + key) * stride + i];
    }
}

// Scores of N queries with the keys of a tile: to[query · stride + key].
template <int N>
inline void score_tile(const float* const* q, const float* tile, int64_t head_dim, float scale, float* to,
                       int64_t stride) {
    Floats first[N] = {}, second[N] = {};
    for (int64_t i = 0; i < head_dim; ++i) {
        const Floats a = load(tile + i * KEYS), b = load(tile + i * KEYS + LANES);
        for (int row = 0; row < N; ++row) {
            first[row] += a * q[row][i];
            second[row] += b * q[row][i];
        }
    }
    for (int row = 0; row < N; ++row) {
        store(to + row * stride, first[row] * scale);
        store(to + row * stride + LANES, second[row] * scale);
    }
}

struct Running {
    float m = HIDDEN;
    double l = 0, t = 0;
    bool sees_any = false, is_finite = true;

    // Takes in scores start to stop; what is around them is overwritten up to a whole vector.
    void add(float* scores, int64_t start, int64_t stop, const uint8_t* allowed, float softcap, const float* bias) {
        const int64_t from = start / LANES * LANES, to = (stop + LANES - 1) / LANES * LANES;
        if (softcap > 0)
            for (int64_t i = from; i < to; i += LANES)
                store(scores + i, hyperbolic_tangent(load(scores + i) / softcap) * softcap);
        if (bias)
            for (int64_t i = start; i < stop; ++i) scores[i] += bias[i];
        for (int64_t i = from; i < start; ++i) scores[i] = HIDDEN;
        for (int64_t i = stop; i < to; ++i) scores[i] = HIDDEN;
        bool sees = !allowed;
        if (allowed)
            for (int64_t i = start; i < stop; ++i) {
                sees |= allowed[i] != 0;
                scores[i] = allowed[i] ? scores[i] : HIDDEN;
            }
        if (!sees) return;
        sees_any = true;
        Floats greatest = load(scores + from), nothing = {};
        for (int64_t i = from; i < to; i += LANES) {
            const Floats s = load(scores + i);
            greatest = larger(greatest, s);
            nothing += s * 0.0f;  // NaN where a score is not finite
        }
        is_finite &= sum(nothing) == 0;
        const float most = largest(greatest);
        if (most > m) {
            const double d = static_cast<double>(m) - most, factor = std::exp(d);
            t = l == 0 ? 0 : factor * (t + d * l);
            l *= factor;
            m = most;
        }
        Floats weights = {}, products = {};
        for (int64_t i = from; i < to; i += LANES) {
            const Floats x = larger(load(scores + i) - m, Floats{} + SMALLEST_EXPONENT), weight = exponential(x);
            weights += weight;
            products += weight * x;
        }
        l += sum(weights);
        t += sum(products);
    }
};

template <int N>
void query_group(const Shape& s, const float* q, const float* packed, int64_t start, const int64_t* first,
                 const int64_t* last, const uint8_t* allowed, int64_t allowed_stride, const Scoring& scoring,
                 const float* bias, Running* running, int64_t tile_start, int64_t tile_stop) {
    alignas(64) float scores[N * SPAN * KEYS];
    const float* rows[N];
    for (int row = 0; row < N; ++row) rows[row] = q + (start + row) * s.q_query;
    // of rows in order, the first key of the first and the last key of the last bound what any of them sees
    const int64_t group_start = first[start] / KEYS, group_stop = (last[start + N - 1] + KEYS - 1) / KEYS;
    tile_start = tile_start > group_start ? tile_start : group_start;
    tile_stop = tile_stop < group_stop ? tile_stop : group_stop;
    for (int64_t tile = tile_start; tile < tile_stop; ++tile)
        score_tile<N>(rows, packed + tile * s.head_dim * KEYS, s.head_dim, scoring.scale,
                      scores + (tile - tile_start) * KEYS, SPAN * KEYS);
    for (int row = 0; row < N; ++row) {
        const int64_t key = tile_start * KEYS;
        const int64_t from = first[start + row] > key ? first[start + row] : key;
        const int64_t to = last[start + row] < tile_stop * KEYS ? last[start + row] : tile_stop * KEYS;
        if (from < to)
            running[row].add(scores + row * SPAN * KEYS, from - key, to - key,
                             allowed ? allowed + (start + row) * allowed_stride + key : nullptr, scoring.softcap,
                             bias ? bias + (start + row) * scoring.strides[2] + key : nullptr);
    }
}

}  // namespace

// What the functions below take: one more for each change of it. Python compares it with its own number.
EXPORT int normfree_interface() { return 3; }

// Entropy and logsumexp [batch, n_head, n_query] of q [batch, n_head, n_query, head_dim] and k [batch, n_head / group,
// n_key, head_dim]; shape: batch, n_head, group, n_query, n_key, head_dim, then the strides of q and k but for the last.
// Query i sees keys first[i] to last[i], both of them rising with i, and of these the allowed ones: allowed may be null,
// mask has its strides of sequence, head and query. The scores are softcap · tanh(scale · q·k / softcap) + bias, without
// tanh where softcap is 0; bias is float32 and may be null, bias_strides are as those of mask. Queries that see no key have
// NaN and -inf; those that see a score that is not finite have NaN.
EXPORT void normfree_attention_entropy(const float* q, const float* k, const int64_t* shape, const int64_t* first,
                                       const int64_t* last, const uint8_t* allowed, const int64_t* mask, float scale,
                                       float softcap, const float* bias, const int64_t* bias_strides,
                                       float* entropy, float* lse, int threads) {
    const Shape s = {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5],
                     shape[6], shape[7], shape[8], shape[9], shape[10], shape[11]};
    const Scoring scoring = {scale, softcap, bias, bias_strides};
    const int64_t n_kv_head = s.n_head / s.group, n_tile = (s.n_key + KEYS - 1) / KEYS;
    const int64_t packed_size = n_tile * KEYS * s.head_dim, n_block = (s.n_query + QUERY_BLOCK - 1) / QUERY_BLOCK;
    std::vector<float> packed(s.batch * n_kv_head * packed_size);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for
        for (int64_t i = 0; i < s.batch * n_kv_head; ++i)
            pack(k + i / n_kv_head * s.k_batch + i % n_kv_head * s.k_head, s.k_key, s.n_key, s.head_dim,
                 packed.data() + i * packed_size);
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < s.batch * s.n_head * n_block; ++task) {
            // under causality the last queries see the most keys
            const int64_t block = n_block - 1 - task / (s.batch * s.n_head), i = task % (s.batch * s.n_head);
            const int64_t b = i / s.n_head, h = i % s.n_head, start = block * QUERY_BLOCK;
            const int64_t stop = start + QUERY_BLOCK < s.n_query ? start + QUERY_BLOCK : s.n_query;
            const float* queries = q + b * s.q_batch + h * s.q_head;
            const float* keys = packed.data() + (b * n_kv_head + h / s.group) * packed_size;
            const uint8_t* seen = allowed ? allowed + b * mask[0] + h * mask[1] : nullptr;
            const int64_t query_stride = allowed ? mask[2] : 0;
            const float* added = bias ? bias + b * bias_strides[0] + h * bias_strides[1] : nullptr;
            Running running[QUERY_BLOCK];
            for (int64_t tile = first[start] / KEYS; tile * KEYS < last[stop - 1]; tile += SPAN) {
                const int64_t tile_stop = tile + SPAN < n_tile ? tile + SPAN : n_tile;
                int64_t row = start;
                for (; row + QUERIES <= stop; row += QUERIES)
                    query_group<QUERIES>(s, queries, keys, row, first, last, seen, query_stride, scoring, added,
                                         running + row - start, tile, tile_stop);
                for (; row < stop; ++row)
                    query_group<1>(s, queries, keys, row, first, last, seen, query_stride, scoring, added,
                                   running + row - start, tile, tile_stop);
            }
            for (int64_t row = start; row < stop; ++row) {
                const Running& of = running[row - start];
                const double log_l = std::log(of.l);
                const int64_t place = i * s.n_query + row;
                const float nan = std::numeric_limits<float>::quiet_NaN();
                entropy[place] = of.sees_any && of.is_finite ? static_cast<float>(log_l - of.t / of.l) : nan;
                lse[place] = !of.is_finite ? nan : of.sees_any ? static_cast<float>(of.m + log_l) : -INFINITY;
            }
        }
    }
}

// Of each row of weights [n_row, n_key], contiguous: the entropy of its first lengths[i % period] entries, the others
// being 0, and its first entry. A NaN makes the entropy NaN. Returns 1 where the sum of a row is further than max_error
// from 1, plus 2 where an entry is not above 0.
EXPORT int normfree_weights_entropy(const float* weights, int64_t n_row, int64_t n_key, const int64_t* lengths,
                                    int64_t period, float max_error, float* entropy, float* firsts, int threads) {
    constexpr int NO_DISTRIBUTION = 1, NOT_POSITIVE = 2;
    Ints lane;
    for (int i = 0; i < LANES; ++i) lane[i] = i;
    int found = 0;
#pragma omp parallel for num_threads(threads) reduction(| : found)
    for (int64_t i = 0; i < n_row; ++i) {
        const float* row = weights + i * n_key;
        // short pieces far apart are not what processors fetch by themselves
        for (int64_t j = 0; j < lengths[(i + FETCH_AHEAD) % period]; j += CACHE_LINE)
            __builtin_prefetch(row + FETCH_AHEAD * n_key + j);
        const int64_t n = lengths[i % period], whole = n / LANES * LANES;
        Floats products = {}, total = {}, least = Floats{} + 1.0f;
        const Floats tiny = Floats{} + std::numeric_limits<float>::min();
        const auto add = [&](Floats p) {
            total += p;
            products += p * logarithm(larger(p, tiny));  // p ln p is nothing at the smallest normal number
        };
        for (int64_t j = 0; j < whole; j += LANES) {
            const Floats p = load(row + j);
            least = p < least ? p : least;
            add(p);
        }
        if (whole < n) {
            Floats p = {};
            std::memcpy(&p, row + whole, sizeof(float) * (whole + LANES <= n_key ? LANES : n_key - whole));
            const Ints counts = lane < static_cast<int32_t>(n - whole);
            const Floats rest = counts ? p : Floats{} + 1.0f;
            least = rest < least ? rest : least;
            add(counts ? p : Floats{});
        }
        const float sum_of_all = sum(total), h = -sum(products);
        const float smallest = folded<VECTOR_BYTES>(least, [](auto a, auto b) { return a < b ? a : b; });
        if (std::abs(sum_of_all - 1) > max_error) found |= NO_DISTRIBUTION;
        // a NaN in a row leaves the smallest of it as it is
        if (!(smallest > 0 && sum_of_all > 0)) found |= NOT_POSITIVE;
        entropy[i] = h < 0 ? 0 : h;
        firsts[i] = row[0];
    }
    return found;
}

// Adds the queries of one call to the sums of a layer. entropy [batch, n_head, n_query], and share alike or null, are
// summed over batch, share over its queries too; rows [n_query] and bound [n_query], or [n_head, n_query] with
// bound_stride n_query, are sums over batch already. Of the sums, positions are the last dimension, stride those of one
// head, and the pointers are those of the first query: all_rows, all_bound and all_entropy [n_head]; sinks [n_head].
// Returns 1, and has added nothing, where an entropy or a share is NaN.
EXPORT int normfree_add_queries(int64_t batch, int64_t n_head, int64_t n_query, const float* entropy,
                                const float* share, const int64_t* rows, const double* bound, int64_t bound_stride,
                                int64_t stride, int64_t* all_rows, double* all_bound, double* all_entropy,
                                double* sinks) {
    const int64_t size = n_head * n_query;
    std::vector<double> sums(size), shares(size);
    for (int64_t b = 0; b < batch; ++b)
        for (int64_t i = 0; i < size; ++i) {
            sums[i] += entropy[b * size + i];
            if (share) shares[i] += share[b * size + i];
        }
    for (int64_t i = 0; i < size; ++i)
        if (std::isnan(sums[i]) || std::isnan(shares[i])) return 1;
    for (int64_t i = 0; i < n_query; ++i) all_rows[i] += rows[i];
    for (int64_t h = 0; h < n_head; ++h) {
        for (int64_t i = 0; i < n_query; ++i) {
            all_bound[h * stride + i] += bound[h * bound_stride + i];
            all_entropy[h * stride + i] += sums[h * n_query + i];
            sinks[h] += shares[h * n_query + i];
        }
    }
    return 0;
}
