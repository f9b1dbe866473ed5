// Our attention against ggml's own, and that of a verified draft against ggml's of one token after the
// other: the same bits.

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

// One case: what ggml gives, computed before our kernels are offered to it.
struct example {
    shape                           s;
    numbers                         from;
    std::vector<float>              together;
    std::vector<std::vector<float>> alone;

    example(const shape & s_, std::mt19937 & random)
        : s(s_), from(s_, random), together(attend(s, from, 0, s.n_tokens, s.n_cells)) {
        for (int64_t token = 0; token < s.n_tokens; ++token) {
            alone.push_back(attend(s, from, token, 1, cells(token)));
        }
    }

    // What llama.cpp rounds the used part of the cache up to when this token is decoded alone.
    int64_t cells(int64_t token) const { return std::min(s.n_cells, (s.first + token + 255) / 256 * 256); }

    void check(const char * what, int64_t token, const float * got, const float * wanted, size_t size) const {
        for (size_t i = 0; i < size; ++i) {
            if (std::memcmp(got + i, wanted + i, sizeof(float)) != 0) {
                std::fprintf(stderr,
                             "%s: dim=%d cells=%d tokens=%d threads=%d first=%d token=%d at %zu: %.9g, not %.9g\n",
                             what, (int)s.dim, (int)s.n_cells, (int)s.n_tokens, s.n_threads, (int)s.first, (int)token,
                             i, got[i], wanted[i]);
                std::exit(1);
            }
        }
    }

    // Compare; returns whether a draft that ggml verified would have had other bits.
    bool agrees() const {
        const size_t             size = s.dim * s.n_heads;
        const std::vector<float> ours = attend(s, from, 0, s.n_tokens, s.n_cells);
        check("batch", 0, ours.data(), together.data(), together.size());
        std::vector<float> verified;
        {
            const ai4all::draft_verification as_single_tokens;
            verified = attend(s, from, 0, s.n_tokens, s.n_cells);
        }
        bool differs = false;
        for (int64_t token = 0; token < s.n_tokens; ++token) {
            check("alone", token, attend(s, from, token, 1, cells(token)).data(), alone[token].data(), size);
            check("verified", token, &verified[token * size], alone[token].data(), size);
            differs = differs || std::memcmp(alone[token].data(), &together[token * size], size * sizeof(float)) != 0;
        }
        return differs;
    }
};

int main() {
    std::mt19937         random(1);
    std::vector<example> examples;
    for (const int n_threads : {1, 2, 3, 4}) {
        const shape shapes[] = {
            {64, 1024, 17, 9, 3, 900, n_threads},
            {64, 1024, 12, 9, 3, 760, n_threads},  // over the edge of a step of cells
            {128, 512, 2, 4, 1, 500, n_threads},
            {64, 512, 9, 6, 6, 250, n_threads},  // from where ggml does not split to where it does
            {80, 768, 5, 4, 2, 700, n_threads},
            {48, 256, 3, 5, 1, 33, n_threads},  // a rest that does not fill ggml's vectors
            {256, 256, 1, 8, 4, 1, n_threads},
            {64, 1024, 1, 32, 8, 1000, n_threads},
        };
        for (const shape & s : shapes) {
            examples.emplace_back(s, random);
        }
    }
    const std::vector<std::string> names = ai4all::cpu_layouts();
    if (std::find(names.begin(), names.end(), "CPU_INTERLEAVED") == names.end()) {
        std::puts("this CPU or build has no kernels of ours");
        return 0;
    }
    bool matters = false;
    for (const example & one : examples) {
        matters |= one.agrees();
    }
    CHECK(matters);  // else a draft could be verified in ggml's way
    std::puts("attention: ok");
    return 0;
}
