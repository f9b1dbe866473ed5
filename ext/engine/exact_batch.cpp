#include "exact_batch.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu_layouts.h"
#include "engine.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "tensor_map.h"

namespace ai4all {

namespace {

// Kernels take rows in groups of 4 to 64.
constexpr int64_t most_rows = 256;

struct free_context {
    void operator()(ggml_context * ctx) const { ggml_free(ctx); }
};
struct free_buffer {
    void operator()(ggml_backend_buffer_t buffer) const { ggml_backend_buffer_free(buffer); }
};
struct free_backend {
    void operator()(ggml_backend_t backend) const { ggml_backend_free(backend); }
};

bool ends_with(const std::string & text, const char * end) {
    const size_t n = std::strlen(end);
    return text.size() >= n && text.compare(text.size() - n, n, end) == 0;
}

bool is_in_memory(const ggml_tensor * tensor) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(ggml_backend_buffer_get_type(tensor->buffer));
    return !dev || ggml_backend_dev_type(dev) == GGML_BACKEND_DEVICE_TYPE_CPU;
}

// What tokens are multiplied with: one weight for each type, layout, length and use.
std::vector<const ggml_tensor *> kinds_of_weights(const llama_model * model) {
    std::map<std::tuple<ggml_type, ggml_backend_buffer_type_t, int64_t, bool>, const ggml_tensor *> kinds;
    const auto & tensors = llama_internal_get_tensor_map(model);
    const bool   has_output =
        std::any_of(tensors.begin(), tensors.end(), [](const auto & each) { return each.first == "output.weight"; });
    for (const auto & [name, tensor] : tensors) {
        // Embeddings are looked up; those of the vocabulary are multiplied with where nothing else is.
        const bool is_table = ends_with(name, "_embd.weight") || ends_with(name, "_types.weight");
        if (!ends_with(name, ".weight") || (is_table && (has_output || name != "token_embd.weight")) ||
            tensor->ne[1] == 1 || !tensor->buffer || !is_in_memory(tensor)) {
            continue;
        }
        kinds.emplace(std::make_tuple(tensor->type, ggml_backend_buffer_get_type(tensor->buffer), tensor->ne[0],
                                      tensor->ne[2] > 1),
                      tensor);
    }
    std::vector<const ggml_tensor *> weights;
    for (const auto & [kind, tensor] : kinds) {
        weights.push_back(tensor);
    }
    return weights;
}

// The first rows of a weight, where they are.
ggml_tensor * first_rows(ggml_context * ctx, const ggml_tensor * weight) {
    ggml_tensor * rows = ggml_new_tensor_2d(ctx, weight->type, weight->ne[0], std::min(weight->ne[1], most_rows));
    rows->data         = weight->data;
    rows->buffer       = weight->buffer;
    rows->extra        = weight->extra;
    return rows;
}

// Products of one weight with `limit` tokens: of each alone, and of the first 2, 3, ... together.
struct products {
    std::vector<ggml_tensor *> alone, together;

    int32_t longest_equal() const {
        for (size_t i = 0; i < together.size(); ++i) {
            const size_t size = ggml_nbytes(alone[0]);
            for (size_t token = 0; token < i + 2; ++token) {
                if (std::memcmp(static_cast<const char *>(together[i]->data) + token * size, alone[token]->data,
                                size) != 0) {
                    return static_cast<int32_t>(i) + 1;
                }
            }
        }
        return static_cast<int32_t>(together.size()) + 1;
    }
};

int32_t longest_exact_batch(const ggml_tensor * weight, int32_t limit, ggml_backend_t cpu) {
    const size_t                                      n_tensors = 8 * static_cast<size_t>(limit) + 8;
    const std::unique_ptr<ggml_context, free_context> owned(
        ggml_init({n_tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(n_tensors, false), nullptr,
                   /*no_alloc=*/true}));
    ggml_context * ctx    = owned.get();
    ggml_tensor *  rows   = first_rows(ctx, weight);
    ggml_tensor *  tokens = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, rows->ne[0], limit);
    // Experts are chosen by number; here there is but the first.
    ggml_tensor * expert = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, limit);
    ggml_cgraph * graph  = ggml_new_graph_custom(ctx, n_tensors, false);
    products      found;

    const auto multiply = [&](int64_t first, int64_t n) {
        ggml_tensor * some = ggml_view_2d(ctx, tokens, rows->ne[0], n, tokens->nb[1], first * tokens->nb[1]);
        ggml_tensor * product;
        if (weight->ne[2] > 1) {
            some    = ggml_reshape_3d(ctx, some, rows->ne[0], 1, n);
            product = ggml_mul_mat_id(ctx, rows, some, ggml_view_2d(ctx, expert, 1, n, expert->nb[1], 0));
        } else {
            product = ggml_mul_mat(ctx, rows, some);
        }
        ggml_build_forward_expand(graph, product);
        return product;
    };
    for (int32_t i = 0; i < limit; ++i) {
        found.alone.push_back(multiply(i, 1));
    }
    for (int32_t n = 2; n <= limit; ++n) {
        found.together.push_back(multiply(0, n));
    }
    const std::unique_ptr<ggml_backend_buffer, free_buffer> buffer(
        ggml_backend_alloc_ctx_tensors_from_buft(ctx, ggml_backend_get_default_buffer_type(cpu)));
    if (!buffer) {
        throw engine_error(errc::out_of_memory, "no memory to try the kernels");
    }
    std::minstd_rand                      random(1);
    std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
    std::generate_n(static_cast<float *>(tokens->data), ggml_nelements(tokens), [&] { return uniform(random); });
    std::memset(expert->data, 0, ggml_nbytes(expert));
    return ggml_backend_graph_compute(cpu, graph) == GGML_STATUS_SUCCESS ? found.longest_equal() : 1;
}

// Null where there is none.
ggml_backend_t one_thread_of_the_cpu() {
    ggml_backend_t cpu = ggml_backend_init_by_type(GGML_BACKEND_DEVICE_TYPE_CPU, nullptr);
    if (cpu) {
        ggml_backend_reg_t reg           = ggml_backend_dev_backend_reg(ggml_backend_get_device(cpu));
        const auto         set_n_threads = reinterpret_cast<ggml_backend_set_n_threads_t>(
            ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads"));
        if (set_n_threads) {
            set_n_threads(cpu, 1);
        }
    }
    return cpu;
}

}  // namespace

int32_t longest_exact_batch(const llama_model * model, int32_t limit) {
    const std::unique_ptr<ggml_backend, free_backend> cpu(one_thread_of_the_cpu());
    const draft_verification                          as_single_tokens;
    int32_t                                           longest = limit;
    for (const ggml_tensor * weight : kinds_of_weights(model)) {
        if (cpu && longest > 1) {
            longest = std::min(longest, longest_exact_batch(weight, longest, cpu.get()));
        }
    }
    return longest;
}

}  // namespace ai4all
