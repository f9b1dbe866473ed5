// Attention of a verified draft against ggml's own of one token after the other: the same bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cpu_layouts.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "harness.h"

struct shape {
    int64_t dim, n_cells, n_tokens, n_heads, n_kv_heads;
    int64_t first;  // cells that the first token sees; each later one sees one more
    int     n_threads;
};

// What a decode sees of a cache: keys and values by head and cell, queries by head and token.
struct numbers {
    std::vector<ggml_fp16_t> keys, values;
    std::vector<float>       queries;

    numbers(const shape & s, std::mt19937 & random) {
        std::normal_distribution<float> normal;
        for (auto * of : {&keys, &values}) {
            of->resize(s.dim * s.n_cells * s.n_kv_heads);
            for (ggml_fp16_t & x : *of) {
                x = ggml_fp32_to_fp16(normal(random));
            }
        }
        queries.resize(s.dim * s.n_tokens * s.n_heads);
        for (float & x : queries) {
            x = normal(random);
        }
    }
};

// The result of `n_tokens` from `token` on, computed at once over `n_cells` cells.
static std::vector<float> attend(const shape & s, const numbers & from, int64_t token, int64_t n_tokens,
                                 int64_t n_cells) {
    ggml_context * ctx   = ggml_init({16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, /*no_alloc=*/true});
    ggml_tensor *  q     = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.dim, n_tokens, s.n_heads);
    ggml_tensor *  k     = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, s.dim, n_cells, s.n_kv_heads);
    ggml_tensor *  v     = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, s.dim, n_cells, s.n_kv_heads);
    ggml_tensor *  m     = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, n_cells, n_tokens);
    const float    scale = 1.0f / std::sqrt(static_cast<float>(s.dim));
    ggml_tensor *  out   = ggml_flash_attn_ext(ctx, q, k, v, m, scale, 0.0f, 0.0f);
    ggml_backend_buffer_t buffer = ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type());
    CHECK(buffer);

    for (int64_t head = 0; head < s.n_heads; ++head) {
        ggml_backend_tensor_set(q, &from.queries[(head * s.n_tokens + token) * s.dim], head * q->nb[2],
                                n_tokens * q->nb[1]);
    }
    for (int64_t head = 0; head < s.n_kv_heads; ++head) {
        const size_t at = head * s.n_cells * s.dim;
        ggml_backend_tensor_set(k, &from.keys[at], head * k->nb[2], k->nb[2]);
        ggml_backend_tensor_set(v, &from.values[at], head * v->nb[2], v->nb[2]);
    }
    std::vector<ggml_fp16_t> mask(n_cells * n_tokens, ggml_fp32_to_fp16(0.0f));
    for (int64_t t = 0; t < n_tokens; ++t) {
        for (int64_t cell = std::min(n_cells, s.first + token + t); cell < n_cells; ++cell) {
            mask[t * n_cells + cell] = ggml_fp32_to_fp16(-INFINITY);
        }
    }
    ggml_backend_tensor_set(m, mask.data(), 0, ggml_nbytes(m));

    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, s.n_threads);
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, out);
    CHECK(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);
    std::vector<float> result(ggml_nelements(out));
    ggml_backend_tensor_get(out, result.data(), 0, ggml_nbytes(out));
    ggml_backend_free(backend);
    ggml_backend_buffer_free(buffer);
    ggml_free(ctx);
    return result;
}

// Compare; returns whether plain ggml would have given other bits.
static bool agrees(const shape & s, std::mt19937 & random) {
    const numbers            from(s, random);
    const size_t             size  = s.dim * s.n_heads;
    const std::vector<float> plain = attend(s, from, 0, s.n_tokens, s.n_cells);
    std::vector<float>       together;
    {
        const ai4all::draft_verification as_single_tokens;
        together = attend(s, from, 0, s.n_tokens, s.n_cells);
    }
    bool differs = false;
    for (int64_t token = 0; token < s.n_tokens; ++token) {
        const int64_t            cells = std::min(s.n_cells, (s.first + token + 255) / 256 * 256);
        const std::vector<float> alone = attend(s, from, token, 1, cells);
        if (std::memcmp(alone.data(), &together[token * size], size * sizeof(float)) != 0) {
            std::fprintf(stderr, "cells=%d tokens=%d threads=%d first=%d token=%d: %.9g, not %.9g\n", (int)s.n_cells,
                         (int)s.n_tokens, s.n_threads, (int)s.first, (int)token, together[token * size], alone[0]);
            std::exit(1);
        }
        differs = differs || std::memcmp(alone.data(), &plain[token * size], size * sizeof(float)) != 0;
    }
    return differs;
}

int main() {
    const std::vector<std::string> names = ai4all::cpu_layouts();
    if (std::find(names.begin(), names.end(), "CPU_INTERLEAVED") == names.end()) {
        std::puts("this CPU or build has no kernels of ours");
        return 0;
    }
    std::mt19937 random(1);
    bool         matters = false;
    for (const int n_threads : {1, 2, 3, 4}) {
        matters |= agrees({64, 1024, 17, 9, 3, 900, n_threads}, random);
        matters |= agrees({64, 1024, 12, 9, 3, 760, n_threads}, random);  // over the edge of a step of cells
        matters |= agrees({128, 512, 2, 4, 1, 500, n_threads}, random);
        matters |=
            agrees({64, 512, 9, 6, 6, 250, n_threads}, random);  // from where ggml does not split to where it does
        matters |= agrees({80, 768, 5, 4, 2, 700, n_threads}, random);
    }
    CHECK(matters);  // else there would be nothing to do here
    std::puts("attention: ok");
    return 0;
}
