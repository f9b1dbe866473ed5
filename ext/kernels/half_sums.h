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

// ggml's vectors of single precision: what is in half precision is widened, and sums are rounded to half
// after every step.
using vec           = GGML_F32_VEC;
constexpr int lanes = GGML_F32_EPR;

inline vec halve(vec x) {
#if defined(__AVX512F__)
    return _mm512_cvtph_ps(_mm512_cvtps_ph(x, 0));
#else
    return _mm256_cvtph_ps(_mm256_cvtps_ph(x, 0));
#endif
}

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
            GGML_F32_VEC_STORE(to + i * dim + d, GGML_F16_DOT_VEC_LOAD(row + d, 0));
        }
    }
}

// The product of a query with a key, in four vectors: in the order of ggml_vec_dot_f16.
inline void multiply(const float * query, const float * key, int64_t dim, vec (&sum)[4]) {
    for (vec & part : sum) {
        part = GGML_F32_VEC_ZERO;
    }
    for (int64_t d = 0; d < dim; d += step) {
        for (int j = 0; j < 4; ++j) {
            sum[j] = GGML_F32_VEC_FMA(sum[j], GGML_F32_VEC_LOAD(key + d + j * lanes),
                                      GGML_F32_VEC_LOAD(query + d + j * lanes));
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
        sum[j] = GGML_F32_VEC_LOAD(to + j * lanes);
    }
    for (int i = 0; i < by.count; ++i) {
        const float * value = values + by.cell[i] * dim;
        if (by.scale[i] != 1.0f) {
            const vec scale = GGML_F32_VEC_SET1(by.scale[i]);
            for (int j = 0; j < n_vectors; ++j) {
                sum[j] = halve(GGML_F32_VEC_MUL(sum[j], scale));
            }
        }
        const vec weight = GGML_F32_VEC_SET1(by.weight[i]);
        for (int j = 0; j < n_vectors; ++j) {
            sum[j] = halve(GGML_F32_VEC_FMA(sum[j], GGML_F32_VEC_LOAD(value + j * lanes), weight));
        }
    }
    for (int j = 0; j < n_vectors; ++j) {
        GGML_F32_VEC_STORE(to + j * lanes, sum[j]);
    }
}

}  // namespace

}  // namespace ai4all::kernels
