// Decoding with a dense Doge model on a CPU. A step is one parallel region that reads every weight once. Prompts are
// read by the same code, with each thread working on tokens of its own.
//
// States are float; weights are float, bfloat16 or int8 with a scale per row; slots are float or bfloat16. The results
// are those of `doge.generation.torch_step`, and the slots those of `doge.model.attention.cache`.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <functional>
#include <memory>
#include <omp.h>
#include <thread>
#include <vector>

#include "cpu_vectors.h"

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

// A barrier for threads that meet every few microseconds: they spin, and yield only after a while.
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

constexpr float LARGEST_EXPONENT = 10;  // as in `doge.model.attention.key_bias`

float softplus(float x) { return x > 20 ? x : std::log1p(std::exp(x)); }

// The forward pass of `rows` tokens. Its threads divide the rows of every matrix among them.
template <class W, class S>
class Step {
public:
    // places: each token's place in its sequence. sequences: the row of the slots that each token belongs to; without
    // it, the token's own number.
    Step(const Model& model, int64_t rows, int64_t slots, int threads, const int64_t* places, const int64_t* sequences)
        : m(model), rows(rows), slots(slots), threads(threads), places(places), sequences(sequences), barrier(threads),
          width((m.heads + 2 * m.kv_heads) * m.head_dim), parts(rows * m.kv_heads >= 2 * threads ? 1 : threads),
          states(rows * m.hidden), joined(rows * width), inner(rows * m.intermediate),
          partial(rows * m.heads * parts * (m.head_dim + 2)), cosines(rows * m.head_dim / 2),
          sines(rows * m.head_dim / 2), largest(rows) {}

    // Must be called before `layers`.
    void embed(const int64_t* tokens) {
        const W* table = static_cast<const W*>(m.embedding.data);
        for (int64_t row = 0; row < rows; ++row) {
            const float scale = m.embedding.scale ? m.embedding.scale[tokens[row]] : 1;
            for (int64_t i = 0; i < m.hidden; ++i)
                states[row * m.hidden + i] = widen(table[tokens[row] * m.hidden + i]) * scale;
            for (int64_t i = 0; i < m.head_dim / 2; ++i) {
                const float angle = static_cast<float>(places[row]) * m.inverse_frequencies[i];
                cosines[row * m.head_dim / 2 + i] = std::cos(angle) * m.rotary_scaling;
                sines[row * m.head_dim / 2 + i] = std::sin(angle) * m.rotary_scaling;
            }
        }
    }

    // The barrier `everyone` is passed when all tokens' keys have their slots; by default that of the step's threads.
    void layers(int thread, Barrier* everyone = nullptr) {
        std::vector<float> normal(rows * m.hidden), weights(slots + LANES), mixed(rows * m.heads * m.head_dim);
        for (int64_t number = 0; number < m.layers; ++number) {
            const Layer& layer = m.layer[number];
            const Vectors<W> before = normalize_all(layer.input_norm, normal);
            each_row(thread, width, [&](int64_t first, int64_t last) {
                multiply(layer.qkv, first, last, before,
                         [&](int64_t n, int64_t row, float value) { joined[row * width + n] = value; });
            });
            for (int64_t pair = thread; pair < rows * m.kv_heads; pair += threads)
                insert(layer, pair / m.kv_heads, pair % m.kv_heads);
            (everyone ? *everyone : barrier).wait();
            for (int64_t piece = thread; piece < rows * m.kv_heads * parts; piece += threads)
                attend(layer, piece / parts / m.kv_heads, piece / parts % m.kv_heads, piece % parts, weights);
            barrier.wait();
            for (int64_t pair = 0; pair < rows * m.heads; ++pair) combine(pair, &mixed[pair * m.head_dim]);
            const Vectors<W> attended(mixed.data(), rows, m.heads * m.head_dim);
            each_row(thread, m.hidden, [&](int64_t first, int64_t last) {
                multiply(layer.o, first, last, attended,
                         [&](int64_t n, int64_t row, float value) { add(layer.input_residual, n, row, value); });
            });
            const Vectors<W> after = normalize_all(layer.post_norm, normal);
            each_row(thread, m.intermediate, [&](int64_t first, int64_t last) {
                Matrix up{static_cast<const W*>(layer.gate_up.data) + m.intermediate * m.hidden,
                          layer.gate_up.scale ? layer.gate_up.scale + m.intermediate : nullptr};
                multiply(layer.gate_up, first, last, after,
                         [&](int64_t n, int64_t row, float value) { inner[row * m.intermediate + n] = value; });
                for (int64_t row = 0; row < rows; ++row) silu(&inner[row * m.intermediate], first, last);
                multiply(up, first, last, after,
                         [&](int64_t n, int64_t row, float value) { inner[row * m.intermediate + n] *= value; });
            });
            const Vectors<W> activated(inner.data(), rows, m.intermediate);
            each_row(thread, m.hidden, [&](int64_t first, int64_t last) {
                multiply(layer.down, first, last, activated,
                         [&](int64_t n, int64_t row, float value) { add(layer.post_residual, n, row, value); });
            });
        }
    }

    // Every row's logits or, if these are not wanted, the token with the largest.
    void finish(int thread, float* logits, int64_t* chosen) {
        std::vector<float> normal(rows * m.hidden);
        const Vectors<W> last_states = normalize_all(m.norm, normal);
        Best best(rows);
        each_row(thread, m.vocab, [&](int64_t first, int64_t last) {
            if (!logits) return multiply(m.head, first, last, last_states, std::ref(best));
            multiply(m.head, first, last, last_states,
                     [&](int64_t n, int64_t row, float value) { logits[row * m.vocab + n] = value; });
        });
        if (!logits) choose(thread, best, chosen);
    }

    float* states_of(int64_t row) { return &states[row * m.hidden]; }

private:
    // Computes the thread's own rows of a matrix; returns when all threads have computed theirs.
    template <class Work>
    void each_row(int thread, int64_t number, Work work) {
        work(number * thread / threads, number * (thread + 1) / threads);
        barrier.wait();
    }

    int64_t sequence(int64_t row) const { return sequences ? sequences[row] : row; }

    // Picks the largest of the threads' maxima over their parts of the vocabulary.
    void choose(int thread, const Best& best, int64_t* chosen) {
        for (int turn = 0; turn < threads; ++turn, barrier.wait()) {
            if (turn != thread) continue;
            for (int64_t row = 0; row < rows; ++row)
                if (turn == 0 || best.value(row) > largest[row])
                    largest[row] = best.value(row), chosen[row] = best.row(row);
        }
    }

    // Every thread computes this for itself, which is cheaper than waiting for another.
    Vectors<W> normalize_all(const float* weight, std::vector<float>& result) {
        for (int64_t row = 0; row < rows; ++row)
            normalize(&states[row * m.hidden], weight, &result[row * m.hidden], m.hidden, m.eps);
        return Vectors<W>(result.data(), rows, m.hidden);
    }

    void add(const float* residual, int64_t n, int64_t row, float value) {
        float& state = states[row * m.hidden + n];
        state = value + residual[n] * state;
    }

    // Finishes the queries, key and bias of one key-value head, and stores the key if it enters the window.
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
        const float exponent = layer.A[head] * softplus(step), within = std::min(exponent, LARGEST_EXPONENT);
        const float bias = std::exp(within) * (1 + (exponent - within));

        const int64_t order = places[row], at = (sequence(row) * m.kv_heads + head) * slots;
        float* biases = layer.biases + at;
        int64_t* orders = layer.orders + at;
        auto is_sink = [&](int64_t place) { return place < m.sinks; };
        int64_t slot = order;  // slots are filled in order until none is empty
        if (order >= slots) {
            float lowest = INFINITE;
            slot = 0;
            for (int64_t j = 0; j < slots; ++j) {
                const bool stays = is_sink(orders[j]) || (m.local && orders[j] > order - m.local);
                const float rank = stays ? INFINITE : biases[j];
                if (rank < lowest || (rank == lowest && orders[j] < orders[slot])) lowest = rank, slot = j;
            }
            if (!m.local && !is_sink(order) && bias < lowest) return;
        }
        S* keys = static_cast<S*>(layer.keys) + (at + slot) * m.head_dim;
        S* own_values = static_cast<S*>(layer.values) + (at + slot) * m.head_dim;
        for (int64_t i = 0; i < m.head_dim; ++i) {
            narrow(key[i], keys[i]);
            narrow(values[head * m.head_dim + i], own_values[i]);
        }
        biases[slot] = bias;
        orders[slot] = order;
    }

    // Attends from a group's queries to a part of the slots: largest score, sum of weights, weighted sum of values.
    void attend(const Layer& layer, int64_t row, int64_t head, int64_t part, std::vector<float>& weights) {
        const int64_t group = m.heads / m.kv_heads, filled = std::min(slots, places[row] + 1);
        const int64_t first = filled * part / parts, number = filled * (part + 1) / parts - first;
        const int64_t at = (sequence(row) * m.kv_heads + head) * slots + first;
        const S* keys = static_cast<const S*>(layer.keys) + at * m.head_dim;
        const S* values = static_cast<const S*>(layer.values) + at * m.head_dim;
        const float* biases = layer.biases + at;
        const float scale = 1 / std::sqrt(static_cast<float>(m.head_dim));
        for (int64_t query = head * group; query < (head + 1) * group; ++query) {
            const float* states_of = &joined[row * width + query * m.head_dim];
            float* result = &partial[((row * m.heads + query) * parts + part) * (m.head_dim + 2)];
            float largest = -INFINITE;
            for (int64_t j = 0; j < number; ++j) {
                weights[j] = dot(keys + j * m.head_dim, states_of, m.head_dim) * scale + biases[j];
                largest = std::max(largest, weights[j]);
            }
            Vector sums = {};
            for (int64_t j = number; j % LANES; ++j) weights[j] = -INFINITE;
            for (int64_t j = 0; j < number; j += LANES) {
                const Vector found = exponential(load(&weights[j]) - largest);
                sums += found;
                store(found, &weights[j]);
            }
            result[0] = largest;
            result[1] = sum_of(sums);
            int64_t i = 0;
            for (; i + 8 * LANES <= m.head_dim; i += 8 * LANES)
                mix<8>(values + i, weights.data(), number, m.head_dim, result + 2 + i);
            for (; i + LANES <= m.head_dim; i += LANES)
                mix<1>(values + i, weights.data(), number, m.head_dim, result + 2 + i);
            for (; i < m.head_dim; ++i) {
                result[2 + i] = 0;
                for (int64_t j = 0; j < number; ++j) result[2 + i] += weights[j] * widen(values[j * m.head_dim + i]);
            }
        }
    }

    // Combines the parts of one head of one row; every thread computes this for itself.
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
    const int64_t *places, *sequences;
    Barrier barrier;
    const int64_t width, parts;
    std::vector<float> states, joined, inner, partial, cosines, sines, largest;
};

}  // namespace

// tokens, places, chosen: (rows); logits: (rows, vocab), or none, and `chosen` are the tokens of the largest. Every
// layer's slots are (rows, kv_heads, slots). WEIGHT and SLOT are the types that the library is compiled for.
extern "C" void doge_step(const Model* model, int64_t rows, int64_t slots, int64_t threads, const int64_t* tokens,
                          const int64_t* places, float* logits, int64_t* chosen) {
    std::unique_ptr<Step<WEIGHT, SLOT>> step;
#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        {
            step = std::make_unique<Step<WEIGHT, SLOT>>(*model, rows, slots, omp_get_num_threads(), places, nullptr);
            step->embed(tokens);
        }
        step->layers(omp_get_thread_num());
        step->finish(omp_get_thread_num(), logits, chosen);
    }
}

// Reads concatenated sequences, none of them longer than the slots: tokens, places and the sequences they belong
// to (number). logits: (rows, vocab) of the last tokens, which `ends` numbers.
extern "C" void doge_read(const Model* model, int64_t rows, int64_t slots, int64_t threads, const int64_t* tokens,
                          const int64_t* places, const int64_t* sequences, int64_t number, const int64_t* ends,
                          float* logits) {
    constexpr int64_t TOGETHER = 128;  // tokens of a thread, so that its results stay in its cache
    std::unique_ptr<Barrier> everyone;
    std::unique_ptr<Step<WEIGHT, SLOT>> few, last;
#pragma omp parallel num_threads(threads)
    {
        const int team = omp_get_num_threads(), me = omp_get_thread_num();
        auto keep = [&](Step<WEIGHT, SLOT>& step, int64_t first, int64_t end) {
            for (int64_t row = 0; row < rows; ++row)
                if (first <= ends[row] && ends[row] < end)
                    std::copy_n(step.states_of(ends[row] - first), model->hidden, last->states_of(row));
        };
#pragma omp single
        {
            everyone = std::make_unique<Barrier>(team);
            last = std::make_unique<Step<WEIGHT, SLOT>>(*model, rows, slots, team, nullptr, nullptr);
            if (number < 2 * LANES * team) {  // too few to divide among the threads: together they read each matrix once
                few = std::make_unique<Step<WEIGHT, SLOT>>(*model, number, slots, team, places, sequences);
                few->embed(tokens);
            }
        }
        if (few) few->layers(me);
        for (int64_t begin = 0; begin < number && !few; begin += TOGETHER * team) {
            const int64_t size = std::min(number - begin, TOGETHER * team);
            const int64_t first = begin + size * me / team, end = begin + size * (me + 1) / team;
            Step<WEIGHT, SLOT> own(*model, end - first, slots, 1, places + first, sequences + first);
            own.embed(tokens + first);
            own.layers(0, everyone.get());
            keep(own, first, end);
        }
        everyone->wait();
        if (few && me == 0) keep(*few, 0, number);
        everyone->wait();
        last->finish(me, logits, nullptr);
    }
}
