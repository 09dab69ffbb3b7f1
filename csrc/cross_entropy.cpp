// Cross-entropy of rows of logits on the CPU, and its gradient in their place.
//
// Of a row of logits x with target y, m is the largest, l = Σ e^(x_j - m), the loss m + ln l - x_y in nats, and the
// gradient e^(x_j - m) / l, less 1 at y. A block of rows that stays in cache is read three times and written once.
//
// Distillation mixes in the divergence from a teacher's logits z at a temperature τ: with p = softmax(z / τ) and
// q = softmax(x / τ) it is Σ p_j (ln p_j - ln q_j), and its gradient (q - p) / τ.
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
    const double shift = m == INFINITY ? 0 : m;  // an infinite logit makes every other token's loss infinite
    for (int64_t i = 0; i < n; ++i) l += std::exp(widen(x[i]) - shift);
    const double loss = shift + std::log(l) - widen(x[target]);
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

struct Mixture {
    double share, temperature;
};

struct Values {
    double loss, divergence;
};

// The log-probabilities of a row at a temperature are (x_j - m) / τ - log_sum.
struct Softened {
    double m, log_sum;
};

template <class T>
Softened softened(const T* x, int64_t n, double temperature) {
    double m = -INFINITY, l = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double value = widen(x[i]);
        m = value > m || value != value ? value : m;
    }
    for (int64_t i = 0; i < n; ++i) l += std::exp((widen(x[i]) - m) / temperature);
    return {m, std::log(l)};
}

template <class T>
Values plain_mixed_row(T* x, const T* z, int64_t n, int64_t target, Mixture mix, bool with_gradient) {
    const double loss = plain_row(x, n, target, false);
    const Softened own = softened(x, n, mix.temperature), teacher = softened(z, n, mix.temperature);
    const Softened hard = softened(x, n, 1);
    double divergence = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double value = widen(x[i]);
        const double log_q = (value - own.m) / mix.temperature - own.log_sum;
        const double log_p = (widen(z[i]) - teacher.m) / mix.temperature - teacher.log_sum;
        const double p = std::exp(log_p);
        if (p != 0) divergence += p * (log_p - log_q);
        if (with_gradient) {
            const double of_loss = std::exp(value - hard.m - hard.log_sum) - (i == target);
            const double of_divergence = std::exp(log_q) - p;
            put(x + i, static_cast<float>((1 - mix.share) * of_loss + mix.share * mix.temperature * of_divergence));
        }
    }
    return {loss, divergence};
}

// The largest number of a row and, in `check`, NaN where one of the `whole` first is not finite.
template <class T>
float greatest(const T* x, int64_t whole, Floats& check) {
    Floats found = load(x);
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats value = load(x + i);
        found = larger(found, value);
        check += value * 0.0f;
    }
    return largest(found);
}

template <class T>
Values mixed_row(T* x, const T* z, int64_t n, int64_t target, Mixture mix, bool with_gradient) {
    const int64_t whole = n / LANES * LANES;
    if (whole == 0) return plain_mixed_row(x, z, n, target, mix, with_gradient);
    Floats nothing = {};
    float m = greatest(x, whole, nothing), m_teacher = greatest(z, whole, nothing), check = sum(nothing);
    for (int64_t i = whole; i < n; ++i) {
        m = std::fmax(m, widen(x[i]));
        m_teacher = std::fmax(m_teacher, widen(z[i]));
        check += widen(x[i]) * 0.0f + widen(z[i]) * 0.0f;
    }
    if (check != 0) return plain_mixed_row(x, z, n, target, mix, with_gradient);
    const float inverse_temperature = static_cast<float>(1 / mix.temperature);
    const Floats smallest = Floats{} + SMALLEST_EXPONENT;
    // Sums over e^(x - m), over the same of both models at the temperature, and over the teacher's, each times how far
    // its exponent lies above the student's.
    double l = 0, l_own = 0, l_teacher = 0, apart = 0;
    for (int64_t start = 0; start < whole; start += SPAN) {
        const int64_t stop = start + SPAN < whole ? start + SPAN : whole;
        Floats hard = {}, own = {}, teacher = {}, distance = {};
        for (int64_t i = start; i < stop; i += LANES) {
            const Floats below = load(x + i) - m;
            const Floats exponent = below * inverse_temperature;
            const Floats exponent_teacher = (load(z + i) - m_teacher) * inverse_temperature;
            const Floats weight = exponential(larger(exponent_teacher, smallest));
            hard += exponential(larger(below, smallest));
            own += exponential(larger(exponent, smallest));
            teacher += weight;
            distance += weight * (exponent_teacher - exponent);
        }
        l += sum(hard);
        l_own += sum(own);
        l_teacher += sum(teacher);
        apart += sum(distance);
    }
    for (int64_t i = whole; i < n; ++i) {
        const double below = static_cast<double>(widen(x[i])) - m;
        const double exponent = below / mix.temperature;
        const double exponent_teacher = (static_cast<double>(widen(z[i])) - m_teacher) / mix.temperature;
        const double weight = std::exp(exponent_teacher);
        l += std::exp(below);
        l_own += std::exp(exponent);
        l_teacher += weight;
        apart += weight * (exponent_teacher - exponent);
    }
    const double loss = static_cast<double>(m) + std::log(l) - widen(x[target]);
    const double divergence = apart / l_teacher + std::log(l_own) - std::log(l_teacher);
    if (with_gradient) {
        const double of_loss = (1 - mix.share) / l, slope = mix.share * mix.temperature;
        const float a = static_cast<float>(of_loss), b = static_cast<float>(slope / l_own);
        const float c = static_cast<float>(slope / l_teacher);
        const auto gradient = [&](float value, float teacher) {
            return a * std::exp(value - m) + b * std::exp((value - m) * inverse_temperature) -
                   c * std::exp((teacher - m_teacher) * inverse_temperature);
        };
        const float of_target =
            static_cast<float>(gradient(widen(x[target]), widen(z[target])) - (1 - mix.share));
        for (int64_t i = 0; i < whole; i += LANES) {
            const Floats below = load(x + i) - m;
            const Floats exponent_teacher = (load(z + i) - m_teacher) * inverse_temperature;
            store(x + i, exponential(larger(below, smallest)) * a +
                             exponential(larger(below * inverse_temperature, smallest)) * b -
                             exponential(larger(exponent_teacher, smallest)) * c);
        }
        for (int64_t i = whole; i < n; ++i) put(x + i, gradient(widen(x[i]), widen(z[i])));
        put(x + target, of_target);
    }
    return {loss, divergence};
}

template <class T>
void mixed_rows(T* x, const T* z, int64_t n_row, int64_t n, const int64_t* targets, Mixture mix, float* losses,
                float* divergences, int with_gradient, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < n_row; ++i) {
        Values values = {0, 0};
        if (targets[i] >= 0)
            values = mixed_row(x + i * n, z + i * n, n, targets[i], mix, with_gradient != 0);
        else if (with_gradient)
            std::memset(static_cast<void*>(x + i * n), 0, sizeof(T) * n);
        losses[i] = static_cast<float>(values.loss);
        divergences[i] = static_cast<float>(values.divergence);
    }
}

}  // namespace

// What the functions below take: one more for each change of it. Python compares it with its own number.
EXPORT int normfree_interface() { return 2; }

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

// The same with a teacher's logits [n_row, n], which stay as they are: losses, divergences from the teacher, and the
// gradient of (1 - share) · loss + share · temperature² · divergence.
EXPORT void normfree_mixed_cross_entropy(int type, void* logits, const void* teacher, int64_t n_row, int64_t n,
                                         const int64_t* targets, double share, double temperature, float* losses,
                                         float* divergences, int with_gradient, int threads) {
    const Mixture mix = {share, temperature};
    if (type == 0)
        mixed_rows(static_cast<float*>(logits), static_cast<const float*>(teacher), n_row, n, targets, mix, losses,
                   divergences, with_gradient, threads);
    else
        mixed_rows(static_cast<bfloat16*>(logits), static_cast<const bfloat16*>(teacher), n_row, n, targets, mix,
                   losses, divergences, with_gradient, threads);
}
