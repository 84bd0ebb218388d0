// Building blocks of a decoding step: registers of floats, and products of a matrix with few or many vectors.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

struct Matrix {
    const void* data;
    const float* scale;  // per row, of int8
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

// One register of floats.
#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

inline Vector load(const float* from) {
    Vector result;
    std::memcpy(&result, from, sizeof result);
    return result;
}
#if defined(__AVX512F__)
inline Vector load(const bfloat16* from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    return reinterpret_cast<Vector>(_mm512_slli_epi32(wide, 16));
}
inline Vector load(const int8_t* from) {
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<Vector>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(raw)));
}
#elif defined(__AVX2__)
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
    for (int lane = 0; lane < LANES; ++lane) result[lane] = widen(from[lane]);
    return result;
}
#endif
inline void store(Vector states, float* to) { std::memcpy(to, &states, sizeof states); }

inline float sum_of(Vector v) {
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += v[lane];
    return sum;
}

// exp(x) to the last digit or two of a float: a power of two times a polynomial. 0 below the smallest float.
inline Vector exponential(Vector x) {
    constexpr float ROUND = 12582912;  // 1.5 * 2^23: adding it rounds to whole numbers
    const Vector in_range = x < -87.f ? Vector{} - 87.f : (x > 88.f ? Vector{} + 88.f : x);
    const Vector power = (in_range * 1.44269504f + ROUND) - ROUND;
    const Vector rest = (in_range - power * 0.693359375f) + power * 2.12194440e-4f;  // log(2) in two parts
    Vector sum = rest * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes' expf
    for (const float term : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) sum = sum * rest + term;
    sum = sum * rest * rest + rest + 1.f;
    const Integers bits = (__builtin_convertvector(power, Integers) + 127) << 23;
    return x < -87.f ? Vector{} : sum * reinterpret_cast<Vector>(bits);
}

// The dot product of two vectors. Reading one row of a matrix after another is fastest: reading several at a time took a
// third longer. The four sums let the additions overlap.
template <class W>
inline float dot(const W* row, const float* vector, int64_t size) {
    Vector sums[4] = {};
    int64_t k = 0;
    for (; k + 4 * LANES <= size; k += 4 * LANES)
        for (int part = 0; part < 4; ++part)
            sums[part] += load(row + k + LANES * part) * load(vector + k + LANES * part);
    float sum = sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
    for (; k < size; ++k) sum += widen(row[k]) * vector[k];
    return sum;
}

constexpr int64_t FEW = 4;  // up to so many vectors are multiplied with a matrix one by one

// How numbers of several vectors are multiplied with one of a matrix: `Number` holds a vector's numbers of one product.
template <class W>
struct Meeting {
    using Number = float;
    using Weight = float;
    static constexpr int64_t TOGETHER = 1;
    static Number take(const float* states) { return *states; }
    static Vector add(Vector sum, Vector numbers, const float* weight) { return sum + *weight * numbers; }
};
#ifdef __AVX512BF16__
// Pairs of bfloat16, summed in float; PyTorch rounds the states to bfloat16 too.
template <>
struct Meeting<bfloat16> {
    using Number [[gnu::may_alias]] = uint32_t;  // written into registers of floats
    using Weight = bfloat16;
    static constexpr int64_t TOGETHER = 2;
    static Number take(const float* states) {
        bfloat16 pair[2];
        narrow(states[0], pair[0]);
        narrow(states[1], pair[1]);
        Number result;
        std::memcpy(&result, pair, sizeof result);
        return result;
    }
    static Vector add(Vector sum, Vector numbers, const bfloat16* weight) {
        int pair;
        std::memcpy(&pair, weight, sizeof pair);
        return reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum),
            reinterpret_cast<__m512bh>(numbers), reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair))));
    }
};
#endif

// Vectors that a matrix is multiplied with and, if there are many, their transpose in whole registers: number i of all
// vectors next to each other.
template <class W>
struct Vectors {
    using Meet = Meeting<W>;
    const float* rows;
    int64_t number, size;
    std::vector<Vector> turned;  // aligned to whole registers
    int64_t padded = 0;

    Vectors(const float* rows, int64_t number, int64_t size) : rows(rows), number(number), size(size) {
        if (number < FEW) return;
        padded = (number + LANES - 1) / LANES * LANES;
        turned.resize(size / Meet::TOGETHER * padded / LANES);
        auto* numbers = reinterpret_cast<typename Meet::Number*>(turned.data());
        for (int64_t i = 0; i < size / Meet::TOGETHER; ++i)
            for (int64_t row = 0; row < number; ++row)
                numbers[i * padded + row] = Meet::take(rows + row * size + i * Meet::TOGETHER);
    }
};

// Products of `ROWS` consecutive rows of a matrix with `PARTS` registers of transposed vectors, for when computing takes
// longer than reading: each weight is multiplied with all of them at once. The next rows, `ahead`, are prefetched.
template <int ROWS, int PARTS, class W, class Take>
inline void products(const typename Meeting<W>::Weight* matrix, const W* ahead, const Vectors<W>& vectors,
                     int64_t column, Take take) {
    using Meet = Meeting<W>;
    const int64_t size = vectors.size, across = vectors.padded / LANES;
    const Vector* turned = &vectors.turned[column / LANES];
    Vector sums[ROWS][PARTS] = {};
    for (int64_t i = 0; i < size; i += Meet::TOGETHER, turned += across) {
        __builtin_prefetch(ahead + i * ROWS);
        for (int row = 0; row < ROWS; ++row)
            for (int part = 0; part < PARTS; ++part)
                sums[row][part] = Meet::add(sums[row][part], turned[part], matrix + row * size + i);
    }
    for (int part = 0; part < PARTS; ++part)
        for (int row = 0; row < ROWS; ++row) take(row, column + LANES * part, sums[row][part]);
}

// Numbers converted to the type they are multiplied in; `room` holds them if they are of another type.
inline const float* as_weights(const float* numbers, int64_t, std::vector<float>&) { return numbers; }
#ifdef __AVX512BF16__
inline const bfloat16* as_weights(const bfloat16* numbers, int64_t, std::vector<float>&) { return numbers; }
#endif
template <class W>
const float* as_weights(const W* numbers, int64_t number, std::vector<float>& room) {
    room.resize(number);
    int64_t i = 0;
    for (; i + LANES <= number; i += LANES) store(load(numbers + i), &room[i]);
    for (; i < number; ++i) room[i] = widen(numbers[i]);
    return room.data();
}

// Calls take(row, vector, product) for the rows [first, last) of a matrix and every vector; or, if `take` accepts
// registers, with the products of as many vectors as a register holds, starting from `vector`.
template <class W, class Take>
void multiply(Matrix matrix, int64_t first, int64_t last, const Vectors<W>& vectors, Take take) {
    constexpr int ROWS = LANES == 16 ? 8 : 6;  // with two registers of vectors, as many sums as there are registers for
    const W* data = static_cast<const W*>(matrix.data);
    auto scale = [&](int64_t row) { return matrix.scale ? matrix.scale[row] : 1.f; };
    int64_t row = first;
    if (vectors.number >= FEW) {
        std::vector<float> room;
        auto taken = [&](int64_t r, int64_t column, Vector sums) {
            sums *= scale(row + r);
            if constexpr (std::is_invocable_v<Take, int64_t, int64_t, Vector>)
                take(row + r, column, sums);
            else
                for (int lane = 0; lane < LANES; ++lane)
                    if (column + lane < vectors.number) take(row + r, column + lane, sums[lane]);
        };
        auto block = [&](auto rows) {
            const W* raw = data + row * vectors.size;
            const W* ahead = raw + rows.value * vectors.size;
            const auto* own = as_weights(raw, rows.value * vectors.size, room);
            int64_t column = 0;
            for (; column + 2 * LANES <= vectors.padded; column += 2 * LANES)
                products<rows.value, 2>(own, ahead, vectors, column, taken);
            if (column < vectors.padded) products<rows.value, 1>(own, ahead, vectors, column, taken);
            row += rows.value;
        };
        while (row + ROWS <= last) block(std::integral_constant<int, ROWS>{});
        while (row < last) block(std::integral_constant<int, 1>{});
    }
    for (; row < last; ++row)
        for (int64_t column = 0; column < vectors.number; ++column) {
            const float* vector = vectors.rows + column * vectors.size;
            take(row, column, dot(data + row * vectors.size, vector, vectors.size) * scale(row));
        }
}

// The largest of each vector's products and its row, the first among equals.
class Best {
public:
    explicit Best(int64_t number)
        : values_(number / LANES + 1, Vector{} - INFINITE), rows_(number / LANES + 1) {}
    void operator()(int64_t row, int64_t column, float value) {
        if (value <= this->value(column)) return;
        values_[column / LANES][column % LANES] = value;
        rows_[column / LANES][column % LANES] = static_cast<int32_t>(row);
    }
    void operator()(int64_t row, int64_t column, Vector found) {
        Vector& values = values_[column / LANES];
        Integers& rows = rows_[column / LANES];
        rows = found > values ? Integers{} + static_cast<int32_t>(row) : rows;
        values = found > values ? found : values;
    }
    float value(int64_t column) const { return values_[column / LANES][column % LANES]; }
    int64_t row(int64_t column) const { return rows_[column / LANES][column % LANES]; }

private:
    std::vector<Vector> values_;
    std::vector<Integers> rows_;
};

// The weighted sum of rows of `PARTS` registers.
template <int PARTS, class S>
inline void mix(const S* values, const float* weights, int64_t number, int64_t stride, float* result) {
    Vector sums[PARTS] = {};
    for (int64_t j = 0; j < number; ++j)
        for (int part = 0; part < PARTS; ++part) sums[part] += weights[j] * load(values + j * stride + LANES * part);
    for (int part = 0; part < PARTS; ++part) store(sums[part], result + LANES * part);
}

// x / (1 + exp(-x)) of states [first, last), in place.
void silu(float* states, int64_t first, int64_t last) {
    int64_t i = first;
    for (; i + LANES <= last; i += LANES) {
        const Vector own = load(states + i);
        store(own / (1.f + exponential(-own)), states + i);
    }
    for (; i < last; ++i) states[i] /= 1 + std::exp(-states[i]);
}

}  // namespace
