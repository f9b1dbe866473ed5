// Sums of products with keys and of weighted values as ggml computes them in half precision, to the last
// bit, in registers. Only for CPUs that have conversions to half precision but no arithmetic in it.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "ggml-cpu-impl.h"
#include "simd-mappings.h"
#include "weights.h"

namespace ai4all::kernels {

namespace {

// The arithmetic of ggml's vectors of half precision: numbers in single, sums rounded to half after
// every step. Here they stay in registers meanwhile.
#if defined(__AVX512F__)
constexpr int lanes = 16;
using vec           = __m512;
inline vec load(const float * from) {
    return _mm512_loadu_ps(from);
}
inline vec widen(const ggml_fp16_t * from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
}
inline void store(float * to, vec x) {
    _mm512_storeu_ps(to, x);
}
inline vec all(float x) {
    return _mm512_set1_ps(x);
}
inline vec mul(vec a, vec b) {
    return _mm512_mul_ps(a, b);
}
inline vec fma(vec a, vec b, vec c) {
    return _mm512_fmadd_ps(a, b, c);
}
inline vec halve(vec x) {
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, 0));
}
#else
constexpr int lanes = 8;
using vec           = __m256;
inline vec load(const float * from) {
    return _mm256_loadu_ps(from);
}
inline vec widen(const ggml_fp16_t * from) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
}
inline void store(float * to, vec x) {
    _mm256_storeu_ps(to, x);
}
inline vec all(float x) {
    return _mm256_set1_ps(x);
}
inline vec mul(vec a, vec b) {
    return _mm256_mul_ps(a, b);
}
inline vec fma(vec a, vec b, vec c) {
    return _mm256_fmadd_ps(a, b, c);
}
inline vec halve(vec x) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, 0));
}
#endif
constexpr int wide = 64 / lanes;
constexpr int step = 4 * lanes;  // ggml adds products up in four vectors, and a rest one by one

// Widen rows of a cache, a block of cells; the `n_next` after it are fetched meanwhile. No hardware sees a
// pattern in one head's part of each cell.
void widen_block(const char * from, size_t stride, int64_t dim, int n, int n_next, float * to) {
    for (int i = 0; i < n; ++i) {
        const auto * row  = reinterpret_cast<const ggml_fp16_t *>(from + i * stride);
        const char * next = from + (i + n) * stride;
        for (size_t at = 0; i < n_next && at < dim * sizeof(ggml_fp16_t); at += 64) {
            _mm_prefetch(next + at, _MM_HINT_T0);
        }
        for (int64_t d = 0; d < dim; d += lanes) {
            store(to + i * dim + d, widen(row + d));
        }
    }
}

// The product of a query with a key, in four vectors: in the order of ggml_vec_dot_f16.
inline void multiply(const float * query, const float * key, int64_t dim, vec (&sum)[4]) {
    for (vec & part : sum) {
        part = all(0.0f);
    }
    for (int64_t d = 0; d < dim; d += step) {
        for (int j = 0; j < 4; ++j) {
            sum[j] = fma(load(key + d + j * lanes), load(query + d + j * lanes), sum[j]);
        }
    }
}

// Products with the keys of a block. A `fixed_dim` that is not 0 is known to the compiler.
template <int fixed_dim>
void score(const float * query, const float * keys, int64_t any_dim, int n, float * scores) {
    const int64_t dim  = fixed_dim ? fixed_dim : any_dim;
    const int64_t even = dim / step * step;
    int           i    = 0;
#if !defined(__AVX512F__)
    // Four at a time: the same sums as GGML_F16_DOT_VEC_REDUCE has, of four vectors in one.
    for (; even == dim && i + 4 <= n; i += 4) {
        __m128 quarter[4];
        for (int c = 0; c < 4; ++c) {
            vec sum[4];
            multiply(query, keys + (i + c) * dim, dim, sum);
            const vec all_of = _mm256_add_ps(_mm256_add_ps(sum[0], sum[2]), _mm256_add_ps(sum[1], sum[3]));
            quarter[c]       = _mm_add_ps(_mm256_castps256_ps128(all_of), _mm256_extractf128_ps(all_of, 1));
        }
        _mm_storeu_ps(scores + i,
                      _mm_hadd_ps(_mm_hadd_ps(quarter[0], quarter[1]), _mm_hadd_ps(quarter[2], quarter[3])));
    }
#endif
    for (; i < n; ++i) {
        const float * key = keys + i * dim;
        vec           sum[4];
        multiply(query, key, even, sum);
        ggml_float product;
        GGML_F16_DOT_VEC_REDUCE(product, sum);
        for (int64_t d = even; d < dim; ++d) {
            product += static_cast<ggml_float>(key[d] * query[d]);
        }
        scores[i] = static_cast<float>(product);
    }
}

// Add weighted values to the sum: `n_vectors` of its columns at a time.
template <int n_vectors>
void add_values(const weights & by, const float * values, int64_t dim, float * to) {
    vec sum[n_vectors];
    for (int j = 0; j < n_vectors; ++j) {
        sum[j] = load(to + j * lanes);
    }
    for (int i = 0; i < by.count; ++i) {
        const float * value = values + by.cell[i] * dim;
        if (by.scale[i] != 1.0f) {
            const vec scale = all(by.scale[i]);
            for (int j = 0; j < n_vectors; ++j) {
                sum[j] = halve(mul(sum[j], scale));
            }
        }
        const vec weight = all(by.weight[i]);
        for (int j = 0; j < n_vectors; ++j) {
            sum[j] = halve(fma(load(value + j * lanes), weight, sum[j]));
        }
    }
    for (int j = 0; j < n_vectors; ++j) {
        store(to + j * lanes, sum[j]);
    }
}

}  // namespace

}  // namespace ai4all::kernels
