// Attention of a few tokens against the same computed plainly in double precision.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "cpu_layouts.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                        \
        }                                                                        \
    } while (0)

struct shape {
    int64_t dim_k, dim_v, n_kv, n_tokens, n_heads, n_kv_heads, n_streams;
    int     n_threads;
    bool    masked;
};

static std::vector<ggml_fp16_t> halves(size_t n, std::mt19937 & random) {
    std::normal_distribution<float> normal;
    std::vector<ggml_fp16_t>        result(n);
    for (ggml_fp16_t & x : result) {
        x = ggml_fp32_to_fp16(normal(random));
    }
    return result;
}

static void agrees(const shape & s, std::mt19937 & random) {
    ggml_context * ctx   = ggml_init({16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, /*no_alloc=*/true});
    ggml_tensor *  q     = ggml_new_tensor_4d(ctx, GGML_TYPE_F32, s.dim_k, s.n_tokens, s.n_heads, s.n_streams);
    ggml_tensor *  k     = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.dim_k, s.n_kv, s.n_kv_heads, s.n_streams);
    ggml_tensor *  v     = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.dim_v, s.n_kv, s.n_kv_heads, s.n_streams);
    ggml_tensor *  m     = ggml_new_tensor_4d(ctx, GGML_TYPE_F16, s.n_kv, s.n_tokens, 1, s.n_streams);
    const float    scale = 1.0f / std::sqrt(static_cast<float>(s.dim_k));
    ggml_tensor *  out   = ggml_flash_attn_ext(ctx, q, k, v, s.masked ? m : nullptr, scale, 0.0f, 0.0f);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type());
    CHECK(buffer);

    std::normal_distribution<float> normal;
    std::vector<float>              queries(ggml_nelements(q));
    for (float & x : queries) {
        x = normal(random);
    }
    std::vector<ggml_fp16_t> keys   = halves(ggml_nelements(k), random);
    std::vector<ggml_fp16_t> values = halves(ggml_nelements(v), random);
    std::vector<ggml_fp16_t> mask(ggml_nelements(m), ggml_fp32_to_fp16(0.0f));
    const auto               is_seen = [&](int64_t stream, int64_t token, int64_t p) {
        // A tail that is not used yet, a gap, and causality among the last tokens; the last token of
        // the last stream sees nothing at all where there are several.
        if (!s.masked) {
            return true;
        }
        if (s.n_tokens > 1 && stream == s.n_streams - 1 && token == s.n_tokens - 1) {
            return false;
        }
        return p < s.n_kv - 40 - (s.n_tokens - token) && p / 7 % 5 != 2;
    };
    for (int64_t stream = 0; stream < s.n_streams; ++stream) {
        for (int64_t p = 0; p < s.n_kv; ++p) {
            bool anybody = false;
            for (int64_t token = 0; token < s.n_tokens; ++token) {
                const bool seen = is_seen(stream, token, p);
                anybody         = anybody || seen;
                if (!seen) {
                    mask[(stream * s.n_tokens + token) * s.n_kv + p] = ggml_fp32_to_fp16(-INFINITY);
                }
            }
            for (int64_t h = 0; !anybody && h < s.n_kv_heads; ++h) {
                // What nobody sees may hold anything.
                values[((stream * s.n_kv_heads + h) * s.n_kv + p) * s.dim_v] = 0x7e00;
                keys[((stream * s.n_kv_heads + h) * s.n_kv + p) * s.dim_k]   = 0x7e00;
            }
        }
    }
    ggml_backend_tensor_set(q, queries.data(), 0, ggml_nbytes(q));
    ggml_backend_tensor_set(k, keys.data(), 0, ggml_nbytes(k));
    ggml_backend_tensor_set(v, values.data(), 0, ggml_nbytes(v));
    ggml_backend_tensor_set(m, mask.data(), 0, ggml_nbytes(m));

    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, s.n_threads);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    CHECK(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);
    std::vector<float> result(ggml_nelements(out));
    ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));

    for (int64_t stream = 0; stream < s.n_streams; ++stream) {
        for (int64_t token = 0; token < s.n_tokens; ++token) {
            for (int64_t head = 0; head < s.n_heads; ++head) {
                const int64_t       kv = stream * s.n_kv_heads + head / (s.n_heads / s.n_kv_heads);
                const float *       x  = &queries[((stream * s.n_heads + head) * s.n_tokens + token) * s.dim_k];
                std::vector<double> scores(s.n_kv, -std::numeric_limits<double>::infinity());
                for (int64_t p = 0; p < s.n_kv; ++p) {
                    if (is_seen(stream, token, p)) {
                        scores[p] = 0.0;
                        for (int64_t i = 0; i < s.dim_k; ++i) {
                            scores[p] += scale * x[i] * ggml_fp16_to_fp32(keys[(kv * s.n_kv + p) * s.dim_k + i]);
                        }
                    }
                }
                const double        most = *std::max_element(scores.begin(), scores.end());
                double              sum  = 0.0;
                std::vector<double> expected(s.dim_v, 0.0);
                for (int64_t p = 0; p < s.n_kv; ++p) {
                    if (std::isfinite(scores[p])) {
                        const double weight = std::exp(scores[p] - most);
                        sum += weight;
                        for (int64_t i = 0; i < s.dim_v; ++i) {
                            expected[i] += weight * ggml_fp16_to_fp32(values[(kv * s.n_kv + p) * s.dim_v + i]);
                        }
                    }
                }
                const float * got = &result[((stream * s.n_tokens + token) * s.n_heads + head) * s.dim_v];
                for (int64_t i = 0; i < s.dim_v; ++i) {
                    const double wanted = sum > 0.0 ? expected[i] / sum : 0.0;
                    if (!(std::abs(got[i] - wanted) <= 1e-5)) {
                        std::fprintf(stderr, "kv=%d tokens=%d threads=%d stream=%d token=%d head=%d [%d]: %g, not %g\n",
                                     (int)s.n_kv, (int)s.n_tokens, s.n_threads, (int)stream, (int)token, (int)head,
                                     (int)i, got[i], wanted);
                        std::exit(1);
                    }
                }
            }
        }
    }
    ggml_backend_free(backend);
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
}

int main() {
    const std::vector<std::string> names = ai4all::cpu_layouts();
    if (std::find(names.begin(), names.end(), "CPU_INTERLEAVED") == names.end()) {
        std::puts("this CPU or build has no kernels of ours");
        return 0;
    }
    std::mt19937 random(1);
    for (const int n_threads : {1, 2, 3, 5}) {
        agrees({64, 64, 1024, 1, 9, 3, 1, n_threads, true}, random);
        agrees({64, 64, 256, 1, 9, 3, 8, n_threads, true}, random);
        agrees({128, 128, 768, 17, 4, 1, 1, n_threads, true}, random);
        agrees({80, 48, 512, 3, 6, 6, 2, n_threads, true}, random);
        agrees({16, 16, 100, 1, 2, 2, 1, n_threads, false}, random);
        agrees({256, 256, 2048, 2, 8, 2, 1, n_threads, true}, random);
    }
    std::puts("attention: ok");
    return 0;
}
