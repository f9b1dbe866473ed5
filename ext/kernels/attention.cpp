// Attention of a few tokens that has, to the last bit, the results of one token after the other.
//
// A draft is verified in one pass, and what it says must be what the plain decode would have said. For
// one token over a long cache ggml splits the cache among the threads and adds up what each found; for
// several tokens it does not, and the sums differ in their last bits, which sooner or later is another
// word. Here each of the several tokens is computed as if it were alone: over the cells that there
// would have been, split as they would have been, with ggml's own functions in their order. A test
// compares the bits.

#include "attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "kernels.h"
#include "simd-mappings.h"
#include "vec.h"

namespace ai4all::kernels {

namespace {

constexpr int64_t most_tokens = 20;   // more are a prompt
constexpr int64_t least_cells = 512;  // ggml splits from here on
constexpr int64_t cell_step   = 256;  // llama.cpp rounds the used part of a cache up to this

std::atomic<bool> verifying{false};

float parameter(const ggml_tensor * op, int i) {
    float value;
    std::memcpy(&value, op->op_params + i, sizeof(value));
    return value;
}

struct shape {
    int64_t dim_k, dim_v, n_cells, n_tokens, n_heads;

    explicit shape(const ggml_tensor * op)
        : dim_k(op->src[1]->ne[0]),
          dim_v(op->src[2]->ne[0]),
          n_cells(op->src[1]->ne[1]),
          n_tokens(op->src[0]->ne[1]),
          n_heads(op->src[0]->ne[2]) {}

    // In floats: largest score, sum and values of one part; what one thread works with.
    int64_t partial() const { return 2 + dim_v; }
    int64_t scratch() const { return dim_k + 2 * dim_v + 16; }
    size_t  bytes(int64_t n_threads) const {
        return static_cast<size_t>(n_tokens * n_heads * n_threads * partial() + n_threads * scratch()) * sizeof(float);
    }
};

const ggml_fp16_t * mask_of(const ggml_tensor * op, int64_t token) {
    const ggml_tensor * mask = op->src[3];
    return reinterpret_cast<const ggml_fp16_t *>(static_cast<const char *>(mask->data) + token * mask->nb[1]);
}

// The cells that a decode of this token alone would have looked at.
int64_t cells_of(const ggml_tensor * op, const shape & s, int64_t token) {
    const ggml_fp16_t * mask = mask_of(op, token);
    int64_t             last = s.n_cells;
    while (last > 0 && GGML_CPU_FP16_TO_FP32(mask[last - 1]) == -INFINITY) {
        --last;
    }
    return std::min(s.n_cells, std::max(cell_step, (last + cell_step - 1) / cell_step * cell_step));
}

// One head of one token over some cells: as ggml's, operation by operation.
void attend(const ggml_tensor * op, const shape & s, int64_t token, int64_t head, int64_t begin, int64_t end,
            float * scratch, float * partial) {
    const ggml_tensor * q       = op->src[0];
    const ggml_tensor * k       = op->src[1];
    const ggml_tensor * v       = op->src[2];
    const float         scale   = parameter(op, 0);
    const auto          vec_dot = ggml_get_type_traits_cpu(k->type)->vec_dot;
    const auto          convert = ggml_get_type_traits_cpu(GGML_TYPE_F16)->from_float;
    const ggml_fp16_t * mask    = mask_of(op, token);
    const char *        keys    = static_cast<const char *>(k->data) + head / (s.n_heads / k->ne[2]) * k->nb[2];
    const char *        values  = static_cast<const char *>(v->data) + head / (s.n_heads / v->ne[2]) * v->nb[2];

    auto * sum_v = reinterpret_cast<ggml_fp16_t *>(scratch);
    auto * query = reinterpret_cast<ggml_fp16_t *>(scratch + s.dim_v);
    convert(reinterpret_cast<const float *>(static_cast<const char *>(q->data) + token * q->nb[1] + head * q->nb[2]),
            query, s.dim_k);
    std::memset(sum_v, 0, s.dim_v * sizeof(ggml_fp16_t));

    float S = 0.0f;
    float M = -INFINITY;
    for (int64_t cell = begin; cell < end; ++cell) {
        const float seen = GGML_CPU_FP16_TO_FP32(mask[cell]);
        if (seen == -INFINITY) {
            continue;
        }
        float score;
        vec_dot(static_cast<int>(s.dim_k), &score, 0, keys + cell * k->nb[1], 0, query, 0, 1);
        score = score * scale;
        score += seen;

        const float before = M;
        float       ms     = 1.0f;
        float       vs     = 1.0f;
        if (score > M) {
            M  = score;
            ms = expf(before - M);
            ggml_vec_scale_f16(static_cast<int>(s.dim_v), sum_v, ms);
        } else {
            vs = expf(score - M);
        }
        ggml_vec_mad_f16(static_cast<int>(s.dim_v), sum_v,
                         reinterpret_cast<const ggml_fp16_t *>(values + cell * v->nb[1]), vs);
        S = S * ms + vs;
    }
    partial[0] = M;
    partial[1] = S;
    for (int64_t d = 0; d < s.dim_v; ++d) {
        partial[2 + d] = GGML_CPU_FP16_TO_FP32(sum_v[d]);
    }
}

// One head of one token from the parts of the cache.
void finish(const shape & s, const float * partials, int64_t n_parts, float * scratch, float * to) {
    if (n_parts == 1) {
        std::memcpy(to, partials + 2, s.dim_v * sizeof(float));
        const float whole = partials[1] == 0.0f ? 0.0f : 1.0f / partials[1];
        ggml_vec_scale_f32(static_cast<int>(s.dim_v), to, whole);
        return;
    }
    float   M      = -INFINITY;
    float   S      = 0.0f;
    float * values = scratch;
    std::memset(values, 0, s.dim_v * sizeof(float));
    for (int64_t part = 0; part < n_parts; ++part) {
        const float * one = partials + part * s.partial();
        if (one[1] == 0.0f) {
            continue;
        }
        const float M_new     = fmaxf(M, one[0]);
        const float scale_old = expf(M - M_new);
        const float scale_new = expf(one[0] - M_new);
        for (int64_t d = 0; d < s.dim_v; ++d) {
            values[d] = values[d] * scale_old + one[2 + d] * scale_new;
        }
        S = S * scale_old + one[1] * scale_new;
        M = M_new;
    }
    if (S != 0.0f) {
        const float whole = 1.0f / S;
        ggml_vec_scale_f32(static_cast<int>(s.dim_v), values, whole);
    }
    std::memcpy(to, values, s.dim_v * sizeof(float));
}

class attention : public ggml::cpu::tensor_traits {
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        size = shape(op).bytes(n_threads);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const shape   s(op);
        const int64_t nth = params->nth;
        GGML_ASSERT(s.bytes(nth) <= params->wsize);
        float *       scratch  = static_cast<float *>(params->wdata) + params->ith * s.scratch();
        float *       partials = static_cast<float *>(params->wdata) + nth * s.scratch();
        const int64_t n_rows   = s.n_tokens * s.n_heads;

        int64_t cells[most_tokens];
        for (int64_t token = 0; token < s.n_tokens; ++token) {
            cells[token] = cells_of(op, s, token);
        }
        for (int64_t unit = params->ith; unit < n_rows * nth; unit += nth) {
            const int64_t row   = unit / nth;
            const int64_t part  = (unit + row) % nth;  // in turn, so that no thread has all the short parts
            const int64_t token = row / s.n_heads;
            const int64_t parts = cells[token] < least_cells ? 1 : nth;
            const int64_t size  = (cells[token] + parts - 1) / parts;
            const int64_t begin = part * size;
            const int64_t end   = std::min(begin + size, cells[token]);
            float *       to    = partials + (row * nth + part) * s.partial();
            if (part < parts && begin < end) {
                attend(op, s, token, row % s.n_heads, begin, end, scratch, to);
            } else {
                to[1] = 0.0f;
            }
        }
        ggml_barrier(params->threadpool);
        for (int64_t row = params->ith; row < n_rows; row += nth) {
            const int64_t token = row / s.n_heads;
            float *       to = reinterpret_cast<float *>(static_cast<char *>(op->data) + row % s.n_heads * op->nb[1] +
                                                         token * op->nb[2]);
            finish(s, partials + row * nth * s.partial(), cells[token] < least_cells ? 1 : nth, scratch, to);
        }
        return true;
    }
};

}  // namespace

ggml::cpu::tensor_traits * attention_for(const ggml_tensor * op) {
    static attention computes;
    if (!verifying.load(std::memory_order_relaxed) || op->op != GGML_OP_FLASH_ATTN_EXT || !op->src[3] || op->src[4]) {
        return nullptr;  // a prompt; nothing hidden, or sinks
    }
    const ggml_tensor * q    = op->src[0];
    const ggml_tensor * k    = op->src[1];
    const ggml_tensor * v    = op->src[2];
    const ggml_tensor * mask = op->src[3];
    const bool          few  = q->ne[1] > 1 && q->ne[1] <= most_tokens && q->ne[3] == 1 && k->ne[3] == 1;
    const bool          types =
        q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16 && mask->type == GGML_TYPE_F16;
    const bool plain = parameter(op, 1) == 0.0f && parameter(op, 2) == 0.0f && mask->ne[2] == 1 && mask->ne[3] == 1;
    return few && types && plain && k->ne[1] >= least_cells ? &computes : nullptr;
}

}  // namespace ai4all::kernels

extern "C" void ai4all_verify_draft(bool on) {
    ai4all::kernels::verifying.store(on, std::memory_order_relaxed);
}
