// One decoding step of a dense Doge model on a CPU: all layers in one parallel region that reads every weight once.
//
// States are float; weights are float, bfloat16 or int8 with a scale per row; slots are float or bfloat16. What is
// computed is `doge.generation.torch_step`, and the slots are those of `doge.attention.cache`.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <omp.h>
#include <thread>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

struct Matrix {
    const void* data;
    const float* scale;  // per row, of int8
};

struct Layer {
    Matrix qkv, o, gate_up, down;
    const float *input_norm, *q_norm, *k_norm, *A, *dt, *input_residual, *post_norm, *post_residual;
    void *keys, *values;
    float* biases;
    int64_t* orders;
};

struct Model {
    int64_t layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, sinks, local;
    float eps, rotary_scaling;
    const float *inverse_frequencies, *norm;
    Matrix embedding, head;
    const Layer* layer;
};

namespace {

using bfloat16 = uint16_t;
constexpr float INFINITE = std::numeric_limits<float>::infinity();

inline float widen(float value) { return value; }
inline float widen(int8_t value) { return value; }
inline float widen(bfloat16 value) {
    uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}

inline void narrow(float value, float& result) { result = value; }
inline void narrow(float value, bfloat16& result) {  // to nearest, ties to even; no weight and no state is NaN
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    result = static_cast<bfloat16>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Threads that meet again and again within microseconds: they spin, and give way to others only after a while.
class Barrier {
public:
    explicit Barrier(int threads) : threads_(threads) {}
    void wait() {
        const int round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
            if (spins > 20000) std::this_thread::yield();
    }

private:
    const int threads_;
    std::atomic<int> arrived_{0}, round_{0};
};

// Eight floats, which any processor's vectors hold in one, two or four.
typedef float Vector __attribute__((vector_size(32)));

inline Vector load(const float* from) {
    Vector result;
    std::memcpy(&result, from, sizeof result);
    return result;
}
#ifdef __AVX2__
inline Vector load(const bfloat16* from) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return reinterpret_cast<Vector>(_mm256_slli_epi32(wide, 16));
}
inline Vector load(const int8_t* from) {
    const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<Vector>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(raw)));
}
#else
template <class W>
inline Vector load(const W* from) {
    Vector result;
    for (int lane = 0; lane < 8; ++lane) result[lane] = widen(from[lane]);
    return result;
}
#endif
inline float sum_of(Vector v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }

// The product of two vectors. One row of a matrix after another is what the memory is read fastest by: several at a
// time took a third longer. The four sums let the additions overlap.
template <class W>
inline float dot(const W* row, const float* vector, int64_t size) {
    Vector sums[4] = {};
    int64_t k = 0;
    for (; k + 32 <= size; k += 32)
        for (int part = 0; part < 4; ++part) sums[part] += load(row + k + 8 * part) * load(vector + k + 8 * part);
    float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; k < size; ++k) sum += widen(row[k]) * vector[k];
    return sum;
}

constexpr int64_t FEW = 4;  // vectors that meet a matrix one by one

// Vectors that a matrix is multiplied with, and, where they are not few, the same turned: number i of all of them beside
// one another, in eights.
struct Vectors {
    const float* rows;
    int64_t number, size;
    std::vector<float> turned;
    int64_t padded = 0;

    Vectors(const float* rows, int64_t number, int64_t size) : rows(rows), number(number), size(size) {
        if (number < FEW) return;
        padded = (number + 7) / 8 * 8;
        turned.assign(size * padded, 0.f);
        for (int64_t row = 0; row < number; ++row)
            for (int64_t i = 0; i < size; ++i) turned[i * padded + row] = rows[row * size + i];
    }
};

// Products of `ROWS` consecutive rows of a matrix with `EIGHTS` times eight turned vectors, where computing takes longer
// than reading: a weight meets all of them at once.
template <int ROWS, int EIGHTS, class W, class Take>
inline void products(const W* matrix, const Vectors& vectors, int64_t column, Take take) {
    Vector sums[ROWS][EIGHTS] = {};
    for (int64_t i = 0; i < vectors.size; ++i) {
        Vector own[EIGHTS];
        for (int part = 0; part < EIGHTS; ++part) own[part] = load(&vectors.turned[i * vectors.padded + column + 8 * part]);
        for (int row = 0; row < ROWS; ++row) {
            const float weight = widen(matrix[row * vectors.size + i]);
            for (int part = 0; part < EIGHTS; ++part) sums[row][part] += weight * own[part];
        }
    }
    for (int row = 0; row < ROWS; ++row)
        for (int part = 0; part < EIGHTS; ++part)
            for (int lane = 0; lane < 8; ++lane)
                if (column + 8 * part + lane < vectors.number) take(row, column + 8 * part + lane, sums[row][part][lane]);
}

// Calls take(row, vector, product) for the rows [first, last) of a matrix and every vector.
template <class W, class Take>
void multiply(Matrix matrix, int64_t first, int64_t last, const Vectors& vectors, Take take) {
    const W* data = static_cast<const W*>(matrix.data);
    auto scaled = [&](int64_t row, float sum) { return matrix.scale ? sum * matrix.scale[row] : sum; };
    int64_t row = first;
    if (vectors.number >= FEW) {
        auto block = [&](auto rows) {
            auto taken = [&](int64_t r, int64_t column, float sum) { take(row + r, column, scaled(row + r, sum)); };
            const W* own = data + row * vectors.size;
            int64_t column = 0;
            for (; column + 16 <= vectors.padded; column += 16) products<rows.value, 2>(own, vectors, column, taken);
            for (; column < vectors.padded; column += 8) products<rows.value, 1>(own, vectors, column, taken);
            row += rows.value;
        };
        while (row + 6 <= last) block(std::integral_constant<int, 6>{});
        while (row < last) block(std::integral_constant<int, 1>{});
    }
    for (; row < last; ++row)
        for (int64_t column = 0; column < vectors.number; ++column) {
            const float* vector = vectors.rows + column * vectors.size;
            take(row, column, scaled(row, dot(data + row * vectors.size, vector, vectors.size)));
        }
}

void normalize(const float* states, const float* weight, float* result, int64_t size, float eps) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += states[i] * states[i];
    const float factor = 1 / std::sqrt(sum / size + eps);
    for (int64_t i = 0; i < size; ++i) result[i] = states[i] * factor * weight[i];
}

void rotate(float* states, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float low = states[i], high = states[i + half];
        states[i] = low * cosines[i] - high * sines[i];
        states[i + half] = high * cosines[i] + low * sines[i];
    }
}

float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

template <class W, class S>
class Step {
public:
    Step(const Model& model, int64_t rows, int64_t slots, int threads, const int64_t* lengths, const int64_t* tokens)
        : m(model), rows(rows), slots(slots), threads(threads), lengths(lengths), barrier(threads),
          width((m.heads + 2 * m.kv_heads) * m.head_dim), parts(rows * m.kv_heads >= 2 * threads ? 1 : threads),
          states(rows * m.hidden), joined(rows * width),
          inner(rows * m.intermediate), partial(rows * m.heads * parts * (m.head_dim + 2)),
          cosines(rows * m.head_dim / 2), sines(rows * m.head_dim / 2) {
        const W* table = static_cast<const W*>(m.embedding.data);
        for (int64_t row = 0; row < rows; ++row) {
            const float scale = m.embedding.scale ? m.embedding.scale[tokens[row]] : 1;
            for (int64_t i = 0; i < m.hidden; ++i)
                states[row * m.hidden + i] = widen(table[tokens[row] * m.hidden + i]) * scale;
            for (int64_t i = 0; i < m.head_dim / 2; ++i) {
                const float angle = static_cast<float>(lengths[row]) * m.inverse_frequencies[i];
                cosines[row * m.head_dim / 2 + i] = std::cos(angle) * m.rotary_scaling;
                sines[row * m.head_dim / 2 + i] = std::sin(angle) * m.rotary_scaling;
            }
        }
    }

    void run(int thread, float* logits) {
        std::vector<float> normal(rows * std::max(m.hidden, m.head_dim));
        std::vector<float> scores(slots), mixed(rows * m.heads * m.head_dim);
        for (int64_t number = 0; number < m.layers; ++number) {
            const Layer& layer = m.layer[number];
            const Vectors before = normalize_all(layer.input_norm, normal);
            each_row(thread, width, [&](int64_t first, int64_t last) {
                multiply<W>(layer.qkv, first, last, before,
                            [&](int64_t n, int64_t row, float value) { joined[row * width + n] = value; });
            });
            for (int64_t pair = thread; pair < rows * m.kv_heads; pair += threads)
                insert(layer, pair / m.kv_heads, pair % m.kv_heads);
            barrier.wait();
            for (int64_t piece = thread; piece < rows * m.kv_heads * parts; piece += threads)
                attend(layer, piece / parts / m.kv_heads, piece / parts % m.kv_heads, piece % parts, scores);
            barrier.wait();
            for (int64_t pair = 0; pair < rows * m.heads; ++pair) combine(pair, &mixed[pair * m.head_dim]);
            const Vectors attended(mixed.data(), rows, m.heads * m.head_dim);
            each_row(thread, m.hidden, [&](int64_t first, int64_t last) {
                multiply<W>(layer.o, first, last, attended,
                            [&](int64_t n, int64_t row, float value) { add(layer.input_residual, n, row, value); });
            });
            const Vectors after = normalize_all(layer.post_norm, normal);
            each_row(thread, m.intermediate, [&](int64_t first, int64_t last) {
                Matrix up{static_cast<const W*>(layer.gate_up.data) + m.intermediate * m.hidden,
                          layer.gate_up.scale ? layer.gate_up.scale + m.intermediate : nullptr};
                multiply<W>(layer.gate_up, first, last, after,
                            [&](int64_t n, int64_t row, float value) {
                                inner[row * m.intermediate + n] = value / (1 + std::exp(-value));
                            });
                multiply<W>(up, first, last, after,
                            [&](int64_t n, int64_t row, float value) { inner[row * m.intermediate + n] *= value; });
            });
            const Vectors activated(inner.data(), rows, m.intermediate);
            each_row(thread, m.hidden, [&](int64_t first, int64_t last) {
                multiply<W>(layer.down, first, last, activated,
                            [&](int64_t n, int64_t row, float value) { add(layer.post_residual, n, row, value); });
            });
        }
        const Vectors last_states = normalize_all(m.norm, normal);
        each_row(thread, m.vocab, [&](int64_t first, int64_t last) {
            multiply<W>(m.head, first, last, last_states,
                        [&](int64_t n, int64_t row, float value) { logits[row * m.vocab + n] = value; });
        });
    }

private:
    // The thread's own rows of a matrix; all threads have done theirs when it returns.
    template <class Work>
    void each_row(int thread, int64_t number, Work work) {
        work(number * thread / threads, number * (thread + 1) / threads);
        barrier.wait();
    }

    // Every thread for itself: cheaper than to wait for another.
    Vectors normalize_all(const float* weight, std::vector<float>& result) {
        for (int64_t row = 0; row < rows; ++row)
            normalize(&states[row * m.hidden], weight, &result[row * m.hidden], m.hidden, m.eps);
        return Vectors(result.data(), rows, m.hidden);
    }

    void add(const float* residual, int64_t n, int64_t row, float value) {
        float& state = states[row * m.hidden + n];
        state = value + residual[n] * state;
    }

    // Finish the queries, key and bias of one key-value head, and give the key a slot if it enters the window.
    void insert(const Layer& layer, int64_t row, int64_t head) {
        const int64_t half = m.head_dim / 2, group = m.heads / m.kv_heads;
        float* own = &joined[row * width];
        for (int64_t query = head * group; query < (head + 1) * group; ++query) {
            float* states_of = own + query * m.head_dim;
            normalize(states_of, layer.q_norm, states_of, m.head_dim, m.eps);
            rotate(states_of, &cosines[row * half], &sines[row * half], half);
        }
        float* key = own + (m.heads + head) * m.head_dim;
        const float* values = own + (m.heads + m.kv_heads) * m.head_dim;
        normalize(key, layer.k_norm, key, m.head_dim, m.eps);
        rotate(key, &cosines[row * half], &sines[row * half], half);
        float step = 0;
        const float* weight = layer.dt + head * m.kv_heads * m.head_dim;
        for (int64_t i = 0; i < m.kv_heads * m.head_dim; ++i) step += weight[i] * values[i];
        const float bias = std::exp(layer.A[head] * softplus(step));

        const int64_t order = lengths[row], at = (row * m.kv_heads + head) * slots;
        float* biases = layer.biases + at;
        int64_t* orders = layer.orders + at;
        auto is_sink = [&](int64_t place) { return place >= 0 && place < m.sinks; };
        float lowest = INFINITE;
        int64_t slot = -1;
        for (int64_t j = 0; j < slots; ++j) {
            const bool stays = is_sink(orders[j]) || (m.local && orders[j] > order - m.local);
            const float rank = stays ? INFINITE : biases[j];
            if (slot < 0 || rank < lowest || (rank == lowest && orders[j] < orders[slot])) lowest = rank, slot = j;
        }
        if (!m.local && !is_sink(order) && bias < lowest) return;
        S* keys = static_cast<S*>(layer.keys) + (at + slot) * m.head_dim;
        S* own_values = static_cast<S*>(layer.values) + (at + slot) * m.head_dim;
        for (int64_t i = 0; i < m.head_dim; ++i) {
            narrow(key[i], keys[i]);
            narrow(values[head * m.head_dim + i], own_values[i]);
        }
        biases[slot] = bias;
        orders[slot] = order;
    }

    // Attention of a group's queries to a part of the slots: largest score, sum of weights, weighted sum of values.
    void attend(const Layer& layer, int64_t row, int64_t head, int64_t part, std::vector<float>& scores) {
        const int64_t group = m.heads / m.kv_heads, at = (row * m.kv_heads + head) * slots;
        const int64_t first = slots * part / parts, last = slots * (part + 1) / parts;
        const S* keys = static_cast<const S*>(layer.keys) + at * m.head_dim;
        const S* values = static_cast<const S*>(layer.values) + at * m.head_dim;
        const float* biases = layer.biases + at;
        const float scale = 1 / std::sqrt(static_cast<float>(m.head_dim));
        for (int64_t query = head * group; query < (head + 1) * group; ++query) {
            const float* states_of = &joined[row * width + query * m.head_dim];
            float* result = &partial[((row * m.heads + query) * parts + part) * (m.head_dim + 2)];
            std::fill(result, result + m.head_dim + 2, 0.f);
            float largest = -INFINITE;
            for (int64_t j = first; j < last; ++j) {
                if (biases[j] == -INFINITE) {
                    scores[j] = -INFINITE;
                    continue;
                }
                scores[j] = dot(keys + j * m.head_dim, states_of, m.head_dim) * scale + biases[j];
                largest = std::max(largest, scores[j]);
            }
            result[0] = largest;
            for (int64_t j = first; j < last; ++j) {
                if (scores[j] == -INFINITE) continue;
                const float weight = std::exp(scores[j] - largest);
                result[1] += weight;
                for (int64_t i = 0; i < m.head_dim; ++i) result[2 + i] += weight * widen(values[j * m.head_dim + i]);
            }
        }
    }

    // The parts of one row's head together; every thread for itself.
    void combine(int64_t pair, float* result) {
        const float* found = &partial[pair * parts * (m.head_dim + 2)];
        float largest = -INFINITE, sum = 0;
        for (int64_t part = 0; part < parts; ++part) largest = std::max(largest, found[part * (m.head_dim + 2)]);
        std::fill(result, result + m.head_dim, 0.f);
        for (int64_t part = 0; part < parts; ++part) {
            const float* own = found + part * (m.head_dim + 2);
            if (own[1] == 0) continue;
            const float factor = std::exp(own[0] - largest);
            sum += factor * own[1];
            for (int64_t i = 0; i < m.head_dim; ++i) result[i] += factor * own[2 + i];
        }
        for (int64_t i = 0; i < m.head_dim; ++i) result[i] /= sum;
    }

    const Model& m;
    const int64_t rows, slots;
    const int threads;
    const int64_t* lengths;
    Barrier barrier;
    const int64_t width, parts;
    std::vector<float> states, joined, inner, partial, cosines, sines;
};

}  // namespace

// tokens, lengths: (rows); logits: (rows, vocab). Every layer's slots are (rows, kv_heads, slots).
// WEIGHT and SLOT are the types that the library is compiled for.
extern "C" void doge_step(const Model* model, int64_t rows, int64_t slots, int64_t threads, const int64_t* tokens,
                          const int64_t* lengths, float* logits) {
    std::unique_ptr<Step<WEIGHT, SLOT>> step;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        step = std::make_unique<Step<WEIGHT, SLOT>>(*model, rows, slots, omp_get_num_threads(), lengths, tokens);
        step->run(omp_get_thread_num(), logits);
    }
}
