// Interleaved weights against ggml's own products of the same weights as the file has them.

#include <algorithm>
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

static ggml_backend_buffer_type_t interleaved() {
    ggml_backend_dev_t cpu   = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const auto         types = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts"));
    for (ggml_backend_buffer_type_t * type = types(cpu); type && *type; ++type) {
        if (std::string(ggml_backend_buft_name(*type)) == "CPU_INTERLEAVED") {
            return *type;
        }
    }
    return nullptr;
}

struct shape {
    ggml_type type;
    int64_t   k;
    int64_t   rows;
    int64_t   columns;
    int64_t   planes;
    int       n_threads;
    bool      extreme;
};

static ggml_context * new_context() {
    return ggml_init({16 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, /*no_alloc=*/true});
}

// The weights as bytes of a file, and the activations.
struct numbers {
    std::vector<uint8_t> weights;
    std::vector<float>   activations;

    numbers(const shape & s, std::mt19937 & random) {
        const size_t size = ggml_row_size(s.type, s.k) * s.rows;
        const size_t unit = ggml_type_size(s.type);
        weights.resize(size);
        std::uniform_int_distribution<int>    byte(0, 255);
        std::uniform_real_distribution<float> small(-0.1f, 0.1f);
        std::normal_distribution<float>       normal;
        for (size_t at = 0; at < size; ++at) {
            // The largest numbers of each format: where a sum would run over, it does so here.
            weights[at] = s.extreme ? (s.type == GGML_TYPE_Q4_1 ? 0xff : 0x80) : static_cast<uint8_t>(byte(random));
        }
        for (size_t at = 0; at < size; at += unit) {
            const ggml_fp16_t scale[2] = {ggml_fp32_to_fp16(small(random)), ggml_fp32_to_fp16(small(random))};
            std::memcpy(&weights[at], scale, s.type == GGML_TYPE_Q4_1 ? 4 : 2);
        }
        activations.resize(s.k * s.columns * s.planes);
        for (float & x : activations) {
            x = s.extreme ? (byte(random) % 8 ? 1.0f : -1.0f) : normal(random);
        }
    }
};

static std::vector<float> product(const shape & s, const numbers & from, ggml_backend_buffer_type_t layout) {
    ggml_context *        held  = new_context();
    ggml_context *        ctx   = new_context();
    ggml_tensor *         w     = ggml_new_tensor_2d(held, s.type, s.k, s.rows);
    ggml_backend_buffer_t store = ggml_backend_alloc_ctx_tensors_from_buft(held, layout);
    CHECK(store);
    ggml_tensor *         x    = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, s.k, s.columns, s.planes);
    ggml_tensor *         y    = ggml_mul_mat(ctx, w, x);
    ggml_backend_buffer_t rest = ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_cpu_buffer_type());
    CHECK(rest);
    ggml_backend_tensor_set(w, from.weights.data(), 0, from.weights.size());
    ggml_backend_tensor_set(x, from.activations.data(), 0, ggml_nbytes(x));

    ggml_backend_t backend = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(backend, s.n_threads);
    CHECK(ggml_backend_supports_op(backend, y));
    ggml_cgraph * graph = ggml_new_graph(ctx);
    ggml_build_forward_expand(graph, y);
    CHECK(ggml_backend_graph_compute(backend, graph) == GGML_STATUS_SUCCESS);

    std::vector<float> result(ggml_nelements(y));
    ggml_backend_tensor_get(y, result.data(), 0, ggml_nbytes(y));
    ggml_backend_free(backend);
    ggml_backend_buffer_free(store);
    ggml_backend_buffer_free(rest);
    ggml_free(ctx);
    ggml_free(held);
    return result;
}

static void agree(const shape & s, std::mt19937 & random) {
    const numbers            from(s, random);
    const std::vector<float> ours   = product(s, from, interleaved());
    const std::vector<float> theirs = product(s, from, ggml_backend_cpu_buffer_type());
    CHECK(ours.size() == theirs.size());
    for (size_t i = 0; i < ours.size(); ++i) {
        // The same bits: a model says the same with these kernels and without.
        if (std::memcmp(&ours[i], &theirs[i], sizeof(float)) != 0) {
            std::fprintf(stderr, "%s k=%d rows=%d columns=%d planes=%d threads=%d: [%zu] %.9g, not %.9g\n",
                         ggml_type_name(s.type), (int)s.k, (int)s.rows, (int)s.columns, (int)s.planes, s.n_threads, i,
                         ours[i], theirs[i]);
            std::exit(1);
        }
    }
}

static void unfit_shapes_stay_with_ggml() {
    ggml_backend_dev_t cpu     = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    const auto         offered = [&](ggml_type type, int64_t rows, bool lookup) {
        ggml_context * ctx = new_context();
        ggml_tensor *  w   = ggml_new_tensor_2d(ctx, type, 64, rows);
        ggml_tensor *  op  = lookup ? ggml_get_rows(ctx, w, ggml_new_tensor_1d(ctx, GGML_TYPE_I32, 3))
                                    : ggml_mul_mat(ctx, w, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 64, 3));
        w->buffer          = ggml_backend_buft_alloc_buffer(interleaved(), 0);
        const bool is      = ggml_backend_dev_supports_op(cpu, op);
        ggml_backend_buffer_free(w->buffer);
        ggml_free(ctx);
        return is;
    };
    CHECK(offered(GGML_TYPE_Q4_1, 16, false));
    CHECK(!offered(GGML_TYPE_Q8_0, 16, false));
    CHECK(!offered(GGML_TYPE_Q4_1, 12, false));
    CHECK(!offered(GGML_TYPE_Q4_0, 16, false));
    CHECK(!offered(GGML_TYPE_F32, 16, false));
    CHECK(!offered(GGML_TYPE_Q4_1, 16, true));
}

int main() {
    const std::vector<std::string> names = ai4all::cpu_layouts();
    if (std::find(names.begin(), names.end(), "CPU_INTERLEAVED") == names.end()) {
        CHECK(!interleaved());
        std::puts("this CPU or build has no interleaved layout");
        return 0;
    }
    std::mt19937 random(1);
    for (const ggml_type type : {GGML_TYPE_Q4_1}) {
        for (const int64_t columns : {1, 2, 3, 4, 5, 7, 8, 9, 33, 130}) {
            for (const int n_threads : {1, 3}) {
                agree({type, 96, 24, columns, 1, n_threads, false}, random);
            }
        }
        agree({type, 32, 8, 1, 1, 4, false}, random);
        agree({type, 576, 192, 70, 1, 2, false}, random);
        agree({type, 4096, 40, 6, 1, 2, false}, random);
        agree({type, 64, 16, 5, 3, 2, false}, random);
        agree({type, 1024, 16, 9, 1, 2, true}, random);
    }
    unfit_shapes_stay_with_ggml();
    std::puts("interleaved: ok");
    return 0;
}
