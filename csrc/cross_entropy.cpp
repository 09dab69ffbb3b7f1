// Cross-entropy of rows of logits on the CPU, and its gradient in their place.
//
// Of a row of logits x with target y, m is the largest, l = Σ e^(x_j - m), the loss m + ln l - x_y in nats, and the
// gradient e^(x_j - m) / l, less 1 at y. A block of rows that stays in cache is read three times and written once.
//
// Logits are float32 (type 0) or bfloat16 (type 1). Plain C functions on plain pointers: the library depends on neither
// Python nor torch.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "elements.h"
#include "vectors.h"

namespace {

constexpr int64_t SPAN = 64 * LANES;  // numbers summed in float32 before they are added to a float64 sum

// A row with a NaN or an infinite number in it, or with none: as the definition says, number by number.
template <class T>
double plain_row(T* x, int64_t n, int64_t target, bool with_gradient) {
    double m = -INFINITY, l = 0;
    bool is_nan = false;
    for (int64_t i = 0; i < n; ++i) {
        const double value = widen(x[i]);
        is_nan |= value != value;
        m = value > m ? value : m;
    }
    if (is_nan) m = NAN;
    for (int64_t i = 0; i < n; ++i) l += std::exp(widen(x[i]) - m);
    const double loss = m + std::log(l) - widen(x[target]);
    if (with_gradient)
        for (int64_t i = 0; i < n; ++i)
            put(x + i, static_cast<float>(std::exp(widen(x[i]) - m) / l - (i == target)));
    return loss;
}

template <class T>
double row(T* x, int64_t n, int64_t target, bool with_gradient) {
    const int64_t whole = n / LANES * LANES;
    if (whole == 0) return plain_row(x, n, target, with_gradient);
    Floats greatest = load(x), nothing = {};
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats value = load(x + i);
        greatest = larger(greatest, value);
        nothing += value * 0.0f;  // NaN where a number is not finite
    }
    float m = largest(greatest), check = sum(nothing);
    for (int64_t i = whole; i < n; ++i) {
        const float value = widen(x[i]);
        m = value > m ? value : m;
        check += value * 0.0f;
    }
    if (check != 0) return plain_row(x, n, target, with_gradient);
    double l = 0;
    for (int64_t start = 0; start < whole; start += SPAN) {
        const int64_t stop = start + SPAN < whole ? start + SPAN : whole;
        Floats weights = {};
        for (int64_t i = start; i < stop; i += LANES)
            weights += exponential(larger(load(x + i) - m, Floats{} + SMALLEST_EXPONENT));
        l += sum(weights);
    }
    for (int64_t i = whole; i < n; ++i) l += std::exp(widen(x[i]) - m);
    const float chosen = widen(x[target]);
    const double loss = static_cast<double>(m) + std::log(l) - chosen;
    if (with_gradient) {
        const float inverse = static_cast<float>(1 / l);
        for (int64_t i = 0; i < whole; i += LANES)
            store(x + i, exponential(larger(load(x + i) - m, Floats{} + SMALLEST_EXPONENT)) * inverse);
        for (int64_t i = whole; i < n; ++i) put(x + i, std::exp(widen(x[i]) - m) * inverse);
        put(x + target, static_cast<float>(std::exp(static_cast<double>(chosen) - m) / l - 1));
    }
    return loss;
}

template <class T>
void rows(T* x, int64_t n_row, int64_t n, const int64_t* targets, float* losses, int with_gradient, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n_row; ++i) {
        if (targets[i] >= 0) {
            losses[i] = static_cast<float>(row(x + i * n, n, targets[i], with_gradient != 0));
        } else {
            losses[i] = 0;
            if (with_gradient) std::memset(static_cast<void*>(x + i * n), 0, sizeof(T) * n);
        }
    }
}

}  // namespace

// What the functions below take: one more for each change of it. Python compares it with its own number.
EXPORT int normfree_interface() { return 1; }

// The loss in nats of each row of logits [n_row, n], contiguous, whose target is in [0, n); a negative target is not
// predicted, and has the loss 0. With a gradient, the gradient of each row's own loss takes the place of its logits. The
// result does not depend on the number of threads.
EXPORT void normfree_cross_entropy(int type, void* logits, int64_t n_row, int64_t n, const int64_t* targets,
                                   float* losses, int with_gradient, int threads) {
    if (type == 0)
        rows(static_cast<float*>(logits), n_row, n, targets, losses, with_gradient, threads);
    else
        rows(static_cast<bfloat16*>(logits), n_row, n, targets, losses, with_gradient, threads);
}
