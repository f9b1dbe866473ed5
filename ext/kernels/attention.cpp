// Attention of a few tokens: to the last bit what ggml computes, in less time.
//
// ggml widens each key and value anew for every head and token, and keeps its sums in memory, in half
// precision. Here what heads and tokens share is widened once, and sums stay in registers, rounded to half
// precision after the same steps.
//
// A draft is verified in one pass, and what it says must be what the plain decode would have said. For
// one token over a long cache ggml splits the cache among the threads and adds up what each found; for
// several tokens it does not, and the sums differ in their last bits, which sooner or later is another
// word. Here each of the several tokens is computed as if it were alone: over the cells that there
// would have been, split as they would have been. A test compares the bits.

#include "attention.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

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
#include "weights.h"
#ifndef __AVX512FP16__
#include "half_sums.h"
#endif

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
    int64_t scratch() const { return block_cells * (dim_k + dim_v) + n_tokens * n_heads * dim_k + 16; }
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

// Rows that share keys: all tokens of a range with all heads of a range, below one head of the cache.
struct rows {
    int64_t token, token_end, head, head_end;
    int64_t n_heads() const { return head_end - head; }
    int64_t count() const { return (token_end - token) * n_heads(); }
};

// Where the rows' keys and values are, and their queries.
struct operands {
    const ggml_tensor *q, *k, *v;
    const char *       keys;
    const char *       values;

    operands(const ggml_tensor * op, const rows & of)
        : q(op->src[0]),
          k(op->src[1]),
          v(op->src[2]),
          keys(static_cast<const char *>(k->data) + of.head / (q->ne[2] / k->ne[2]) * k->nb[2]),
          values(static_cast<const char *>(v->data) + of.head / (q->ne[2] / v->ne[2]) * v->nb[2]) {}

    // A query in half precision, as ggml multiplies it.
    void query(int64_t token, int64_t head, ggml_fp16_t * to) const {
        const char * at = static_cast<const char *>(q->data) + token * q->nb[1] + head * q->nb[2];
        ggml_get_type_traits_cpu(GGML_TYPE_F16)->from_float(reinterpret_cast<const float *>(at), to, q->ne[0]);
    }
    const char * key(int64_t cell) const { return keys + cell * k->nb[1]; }
    const char * value(int64_t cell) const { return values + cell * v->nb[1]; }
};

struct softmax {
    float M = -INFINITY;
    float S = 0.0f;
};

// The weights of the cells that a row sees: ggml's way, one cell after the other.
void weigh(const ggml_fp16_t * mask, float scale, const float * scores, int n, softmax & row, weights & to) {
    to.count = 0;
    for (int i = 0; i < n; ++i) {
        const float seen = GGML_CPU_FP16_TO_FP32(mask[i]);
        if (seen == -INFINITY) {
            continue;
        }
        float score = scores[i];
        score       = score * scale;
        score += seen;

        const float before = row.M;
        float       ms     = 1.0f;
        float       vs     = 1.0f;
        if (score > row.M) {
            row.M = score;
            ms    = expf(before - row.M);
        } else {
            vs = expf(score - row.M);
        }
        row.S               = std::fma(row.S, ms, vs);  // as compilers make one of ggml's line
        to.cell[to.count]   = i;
        to.scale[to.count]  = ms;
        to.weight[to.count] = vs;
        ++to.count;
    }
}

#if defined(__AVX512FP16__)

constexpr bool faster = false;

// Where the CPU computes in half precision itself, ggml's own functions do.
template <typename Place>
void attend(const ggml_tensor * op, const shape & s, const rows & of, int64_t begin, int64_t end, float * scratch,
            Place to) {
    const operands from(op, of);
    const float    scale   = parameter(op, 0);
    const auto     vec_dot = ggml_get_type_traits_cpu(from.k->type)->vec_dot;
    auto *         query   = reinterpret_cast<ggml_fp16_t *>(scratch);
    auto *         sum     = reinterpret_cast<ggml_fp16_t *>(scratch + s.dim_k);
    for (int64_t row = 0; row < of.count(); ++row) {
        const int64_t token = of.token + row / of.n_heads();
        const int64_t head  = of.head + row % of.n_heads();
        from.query(token, head, query);
        std::fill(sum, sum + s.dim_v, ggml_fp16_t{0});
        softmax state;
        for (int64_t cell = begin; cell < end; cell += block_cells) {
            const int n = static_cast<int>(std::min<int64_t>(block_cells, end - cell));
            float     scores[block_cells];
            weights   by;
            for (int i = 0; i < n; ++i) {
                vec_dot(static_cast<int>(s.dim_k), scores + i, 0, from.key(cell + i), 0, query, 0, 1);
            }
            weigh(mask_of(op, token) + cell, scale, scores, n, state, by);
            for (int i = 0; i < by.count; ++i) {
                if (by.scale[i] != 1.0f) {
                    ggml_vec_scale_f16(static_cast<int>(s.dim_v), sum, by.scale[i]);
                }
                ggml_vec_mad_f16(static_cast<int>(s.dim_v), sum,
                                 reinterpret_cast<const ggml_fp16_t *>(from.value(cell + by.cell[i])), by.weight[i]);
            }
        }
        float * place = to(token, head);
        place[0]      = state.M;
        place[1]      = state.S;
        for (int64_t d = 0; d < s.dim_v; ++d) {
            place[2 + d] = GGML_CPU_FP16_TO_FP32(sum[d]);
        }
    }
}

#else

constexpr bool faster = true;

bool sees_any(const ggml_fp16_t * mask, int n) {
    constexpr ggml_fp16_t hidden = 0xfc00;
    return std::any_of(mask, mask + n, [](ggml_fp16_t x) { return x != hidden; });
}

// Rows over some cells: each as ggml computes it alone, operation by operation. What they share, the
// widening of keys and values, is done once. `to(token, head)` is where a row's part goes.
template <typename Place>
void attend(const ggml_tensor * op, const shape & s, const rows & of, int64_t begin, int64_t end, float * scratch,
            Place to) {
    const operands from(op, of);
    const float    scale        = parameter(op, 0);
    const auto     score_block  = s.dim_k == 64 ? score<64> : s.dim_k == 128 ? score<128> : score<0>;
    float *        block_keys   = scratch;
    float *        block_values = block_keys + block_cells * s.dim_k;
    float *        queries      = block_values + block_cells * s.dim_v;
    auto *         half         = reinterpret_cast<ggml_fp16_t *>(block_keys);
    for (int64_t row = 0; row < of.count(); ++row) {
        const int64_t token = of.token + row / of.n_heads();
        const int64_t head  = of.head + row % of.n_heads();
        from.query(token, head, half);
        for (int64_t d = 0; d < s.dim_k; d += lanes) {
            GGML_F32_VEC_STORE(queries + row * s.dim_k + d, GGML_F16_DOT_VEC_LOAD(half + d, 0));
        }
        float * place = to(token, head);
        place[0]      = -INFINITY;
        std::fill(place + 1, place + s.partial(), 0.0f);
    }
    for (int64_t cell = begin; cell < end; cell += block_cells) {
        const int n      = static_cast<int>(std::min<int64_t>(block_cells, end - cell));
        const int n_next = static_cast<int>(std::min<int64_t>(block_cells, end - cell - n));
        bool      ready  = false;
        for (int64_t row = 0; row < of.count(); ++row) {
            const int64_t       token = of.token + row / of.n_heads();
            const ggml_fp16_t * mask  = mask_of(op, token) + cell;
            if (!sees_any(mask, n)) {
                continue;
            }
            if (!ready) {
                widen_block(from.key(cell), from.k->nb[1], s.dim_k, n, n_next, block_keys);
                widen_block(from.value(cell), from.v->nb[1], s.dim_v, n, n_next, block_values);
                ready = true;
            }
            float * place = to(token, of.head + row % of.n_heads());
            float   scores[block_cells];
            weights by;
            softmax state{place[0], place[1]};
            score_block(queries + row * s.dim_k, block_keys, s.dim_k, n, scores);
            weigh(mask, scale, scores, n, state, by);
            place[0]  = state.M;
            place[1]  = state.S;
            int64_t d = 0;
            for (; d + wide * lanes <= s.dim_v; d += wide * lanes) {
                add_values<wide>(by, block_values + d, s.dim_v, place + 2 + d);
            }
            for (; d < s.dim_v; d += lanes) {
                add_values<1>(by, block_values + d, s.dim_v, place + 2 + d);
            }
        }
    }
}

#endif

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

        // How many cells each token is alone with, and in how many parts.
        const bool one_by_one         = s.n_tokens > 1 && verifying.load(std::memory_order_relaxed);
        int64_t    cells[most_tokens] = {};
        int64_t    parts[most_tokens] = {};
        for (int64_t token = 0; token < s.n_tokens; ++token) {
            cells[token] = one_by_one ? cells_of(op, s, token) : s.n_cells;
            parts[token] = (one_by_one || s.n_tokens == 1) && cells[token] >= least_cells ? nth : 1;
        }
        const auto place = [&](int64_t token, int64_t head, int64_t part) {
            return partials + ((token * s.n_heads + head) * nth + part) * s.partial();
        };
        const int64_t group = s.n_heads / op->src[1]->ne[2];  // heads that share keys
        if (one_by_one || parts[0] > 1) {
            // Tokens with the same cells go together: they share keys, too.
            int64_t unit = 0;
            for (int64_t token = 0, next; token < s.n_tokens; token = next) {
                for (next = token + 1; next < s.n_tokens && cells[next] == cells[token];) {
                    ++next;
                }
                const int64_t size = (cells[token] + parts[token] - 1) / parts[token];
                for (int64_t head = 0; head < s.n_heads; head += group) {
                    for (int64_t part = 0; part < parts[token]; ++part, ++unit) {
                        // In turn, so that no thread has all the short parts.
                        if ((parts[token] > 1 ? part + head / group : unit) % nth != params->ith) {
                            continue;
                        }
                        attend(op, s, {token, next, head, head + group}, std::min(part * size, cells[token]),
                               std::min((part + 1) * size, cells[token]), scratch,
                               [&](int64_t t, int64_t h) { return place(t, h, part); });
                    }
                }
            }
        } else {
            int64_t       row = n_rows * params->ith / nth;
            const int64_t end = n_rows * (params->ith + 1) / nth;
            while (row < end) {
                const int64_t token = row / s.n_heads;
                const int64_t head  = row % s.n_heads;
                const int64_t last  = std::min((head / group + 1) * group, head + end - row);
                attend(op, s, {token, token + 1, head, last}, 0, s.n_cells, scratch,
                       [&](int64_t t, int64_t h) { return place(t, h, 0); });
                row += last - head;
            }
        }
        ggml_barrier(params->threadpool);
        for (int64_t row = params->ith; row < n_rows; row += nth) {
            const int64_t token = row / s.n_heads;
            float *       to = reinterpret_cast<float *>(static_cast<char *>(op->data) + row % s.n_heads * op->nb[1] +
                                                         token * op->nb[2]);
            finish(s, partials + row * nth * s.partial(), parts[token], scratch, to);
        }
        return true;
    }
};

}  // namespace

ggml::cpu::tensor_traits * attention_for(const ggml_tensor * op) {
    static attention computes;
    if (op->op != GGML_OP_FLASH_ATTN_EXT || !op->src[3] || op->src[4]) {
        return nullptr;  // nothing hidden, or sinks
    }
    const ggml_tensor * q    = op->src[0];
    const ggml_tensor * k    = op->src[1];
    const ggml_tensor * v    = op->src[2];
    const ggml_tensor * mask = op->src[3];
    const bool          ours = faster || (q->ne[1] > 1 && verifying.load(std::memory_order_relaxed));
    const bool          few  = q->ne[1] <= most_tokens && q->ne[3] == 1 && k->ne[3] == 1;
    const bool          types =
        q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16 && mask->type == GGML_TYPE_F16;
    const bool plain = parameter(op, 1) == 0.0f && parameter(op, 2) == 0.0f && mask->ne[2] == 1 && mask->ne[3] == 1;
    const bool whole = k->ne[0] % 16 == 0 && v->ne[0] % 16 == 0 && k->ne[2] == v->ne[2];
    return ours && few && types && plain && whole ? &computes : nullptr;
}

}  // namespace ai4all::kernels

extern "C" void ai4all_verify_draft(bool on) {
    ai4all::kernels::verifying.store(on, std::memory_order_relaxed);
}

#else

#include "kernels.h"

extern "C" void ai4all_verify_draft(bool) {}

#endif
