// Attention of a few tokens over a long cache: the decode step, and a draft that is verified.
//
// ggml takes each query head by itself, and each position of the cache by itself: keys and values are
// converted again for every head that shares them, and the sum goes through half precision at each
// position. Here the heads and tokens that share keys and values go together, over blocks of positions
// that are converted once, with the sum in registers. A cache is split where there would be too few
// parts for the threads. Many tokens at once (a prompt) stay with ggml, which has tiles for them.

#include "attention.h"

#include "ggml-cpu-impl.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vec.h"

namespace ai4all::kernels {

namespace {

constexpr int64_t positions   = 32;   // of a block
constexpr int64_t max_dim     = 256;  // of a head
constexpr int64_t max_tokens  = 20;   // more are a prompt
constexpr int64_t max_rows    = 128;  // heads and tokens that share keys and values
constexpr int64_t least_split = 128;  // positions; fewer are not worth another partial result
constexpr int64_t max_splits  = 64;
constexpr float   nothing     = -INFINITY;

struct shape {
    int64_t dim_k, dim_v, n_kv, n_tokens, n_kv_heads, n_streams, heads_together, rows;

    explicit shape(const ggml_tensor * op)
        : dim_k(op->src[1]->ne[0]),
          dim_v(op->src[2]->ne[0]),
          n_kv(op->src[1]->ne[1]),
          n_tokens(op->src[0]->ne[1]),
          n_kv_heads(op->src[1]->ne[2]),
          n_streams(op->src[0]->ne[3]),
          heads_together(n_kv_heads > 0 ? op->src[0]->ne[2] / n_kv_heads : 0),
          rows(heads_together * n_tokens) {}

    int64_t parts() const { return n_kv_heads * n_streams; }

    // As many splits of the cache as keep the threads equally busy.
    int64_t splits(int64_t n_threads) const {
        const int64_t most = std::clamp<int64_t>(n_kv / least_split, 1, max_splits);
        int64_t       n    = std::min(most, (2 * n_threads + parts() - 1) / parts());
        while (n < most && parts() * n % n_threads != 0) {
            ++n;
        }
        return n;
    }

    // Floats: of one row's partial result (largest score, sum, values), and of one thread's work.
    int64_t partial() const { return 2 + dim_v; }
    int64_t scratch() const { return positions * (dim_k + dim_v + 1) + rows * dim_k; }
    size_t  bytes(int64_t n_splits, int64_t n_threads) const {
        return static_cast<size_t>(parts() * n_splits * rows * partial() + n_threads * scratch()) * sizeof(float);
    }
};

float parameter(const ggml_tensor * op, int i) {
    float value;
    std::memcpy(&value, reinterpret_cast<const float *>(op->op_params) + i, sizeof(value));
    return value;
}

inline float sum_of(__m256 x) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two  = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline void widen(float * to, const ggml_fp16_t * from, int64_t n) {
    for (int64_t i = 0; i < n; i += 8) {
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(from + i))));
    }
}

// Products of one query with the keys of a block, four at a time so that their sums do not wait for
// each other.
void scores(float * to, const float * q, const float * keys, int64_t dim, int64_t n) {
    int64_t p = 0;
    for (; p + 4 <= n; p += 4) {
        const float * k = keys + p * dim;
        __m256        a = _mm256_setzero_ps();
        __m256        b = _mm256_setzero_ps();
        __m256        c = _mm256_setzero_ps();
        __m256        d = _mm256_setzero_ps();
        for (int64_t i = 0; i < dim; i += 8) {
            const __m256 x = _mm256_loadu_ps(q + i);
            a              = _mm256_fmadd_ps(x, _mm256_loadu_ps(k + i), a);
            b              = _mm256_fmadd_ps(x, _mm256_loadu_ps(k + dim + i), b);
            c              = _mm256_fmadd_ps(x, _mm256_loadu_ps(k + 2 * dim + i), c);
            d              = _mm256_fmadd_ps(x, _mm256_loadu_ps(k + 3 * dim + i), d);
        }
        const __m256 ab = _mm256_hadd_ps(a, b);
        const __m256 cd = _mm256_hadd_ps(c, d);
        const __m256 s  = _mm256_hadd_ps(ab, cd);
        _mm_storeu_ps(to + p, _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1)));
    }
    for (; p < n; ++p) {
        __m256 a = _mm256_setzero_ps();
        for (int64_t i = 0; i < dim; i += 8) {
            a = _mm256_fmadd_ps(_mm256_loadu_ps(q + i), _mm256_loadu_ps(keys + p * dim + i), a);
        }
        to[p] = sum_of(a);
    }
}

// Adds the values of a block, each with its weight, to what is there times `keep`.
template <int N>
void add_values(float * to, float keep, const float * weights, const float * values, int64_t dim, int64_t n) {
    const __m256 kept = _mm256_set1_ps(keep);
    __m256       acc[N];
    for (int j = 0; j < N; ++j) {
        acc[j] = _mm256_mul_ps(kept, _mm256_loadu_ps(to + 8 * j));
    }
    for (int64_t p = 0; p < n; ++p) {
        const __m256 weight = _mm256_broadcast_ss(weights + p);
        for (int j = 0; j < N; ++j) {
            acc[j] = _mm256_fmadd_ps(weight, _mm256_loadu_ps(values + p * dim + 8 * j), acc[j]);
        }
    }
    for (int j = 0; j < N; ++j) {
        _mm256_storeu_ps(to + 8 * j, acc[j]);
    }
}

// Scores become weights, exp(score - largest); returns their sum. Padding to eight is written, too.
float weigh(float * s, int64_t n, float largest) {
    for (int64_t p = n; p % 8 != 0; ++p) {
        s[p] = nothing;
    }
    const __m256 most = _mm256_set1_ps(largest);
    // Far below what a float can hold; infinity itself would give no number.
    const __m256 least = _mm256_set1_ps(-200.0f);
    __m256       sum   = _mm256_setzero_ps();
    for (int64_t p = 0; p < n; p += 8) {
        const __m256 weight = ggml_v_expf(_mm256_max_ps(least, _mm256_sub_ps(_mm256_loadu_ps(s + p), most)));
        _mm256_storeu_ps(s + p, weight);
        sum = _mm256_add_ps(sum, weight);
    }
    return sum_of(sum);
}

class attention : public ggml::cpu::tensor_traits {
  public:
    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        const shape s(op);
        size = s.bytes(s.splits(n_threads), n_threads);
        return true;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        const shape s(op);
        int64_t     n_splits = s.splits(params->nth);
        while (n_splits > 1 && s.bytes(n_splits, params->nth) > params->wsize) {
            --n_splits;  // fewer threads came than were announced
        }
        GGML_ASSERT(s.bytes(n_splits, params->nth) <= params->wsize);
        const int64_t n_units  = s.parts() * n_splits;
        float *       scratch  = static_cast<float *>(params->wdata) + params->ith * s.scratch();
        float *       partials = static_cast<float *>(params->wdata) + params->nth * s.scratch();

        for (int64_t unit = params->ith; unit < n_units; unit += params->nth) {
            const int64_t part  = unit / n_splits;
            const int64_t split = unit % n_splits;
            attend(op, s, part, split * s.n_kv / n_splits, (split + 1) * s.n_kv / n_splits, scratch,
                   partials + unit * s.rows * s.partial());
        }
        if (n_splits > 1) {
            ggml_barrier(params->threadpool);
        }
        for (int64_t part = params->ith; n_splits == 1 && part < s.parts(); part += params->nth) {
            for (int64_t row = 0; row < s.rows; ++row) {
                finish(op, s, part, row, partials + part * s.rows * s.partial(), 1);
            }
        }
        for (int64_t at = params->ith; n_splits > 1 && at < s.parts() * s.rows; at += params->nth) {
            const int64_t part = at / s.rows;
            finish(op, s, part, at % s.rows, partials + part * n_splits * s.rows * s.partial(), n_splits);
        }
        return true;
    }

  private:
    // Of each token, what it sees; nothing where all of them see all.
    static void masks_of(const ggml_tensor * op, const shape & s, int64_t stream, const ggml_fp16_t ** masks) {
        const ggml_tensor * mask = op->src[3];
        for (int64_t token = 0; token < s.n_tokens; ++token) {
            masks[token] =
                mask ? reinterpret_cast<const ggml_fp16_t *>(static_cast<const char *>(mask->data) +
                                                             token * mask->nb[1] + stream % mask->ne[3] * mask->nb[3])
                     : nullptr;
        }
    }

    // The rows of one key-value head over the positions of one split.
    static void attend(const ggml_tensor * op, const shape & s, int64_t part, int64_t begin, int64_t end,
                       float * scratch, float * partial) {
        const ggml_tensor * q      = op->src[0];
        const ggml_tensor * k      = op->src[1];
        const ggml_tensor * v      = op->src[2];
        const int64_t       kv     = part % s.n_kv_heads;
        const int64_t       stream = part / s.n_kv_heads;
        const float         scale  = parameter(op, 0);
        const char *        keys   = static_cast<const char *>(k->data) + kv * k->nb[2] + stream * k->nb[3];
        const char *        values = static_cast<const char *>(v->data) + kv * v->nb[2] + stream * v->nb[3];

        float * wide_k  = scratch;
        float * wide_v  = wide_k + positions * s.dim_k;
        float * queries = wide_v + positions * s.dim_v;
        float * weights = queries + s.rows * s.dim_k;
        for (int64_t row = 0; row < s.rows; ++row) {
            const int64_t head = kv * s.heads_together + row % s.heads_together;
            const auto *  from =
                reinterpret_cast<const float *>(static_cast<const char *>(q->data) + row / s.heads_together * q->nb[1] +
                                                head * q->nb[2] + stream * q->nb[3]);
            for (int64_t i = 0; i < s.dim_k; ++i) {
                queries[row * s.dim_k + i] = scale * from[i];
            }
            float * result = partial + row * s.partial();
            std::fill(result, result + s.partial(), 0.0f);
            result[0] = nothing;
        }

        const ggml_fp16_t * masks[max_tokens];
        masks_of(op, s, stream, masks);
        int64_t at[positions];
        for (int64_t from = begin; from < end;) {
            // The next positions that any of the tokens sees.
            int64_t n = 0;
            for (; from < end && n < positions; ++from) {
                if (seen(masks, s.n_tokens, from)) {
                    at[n++] = from;
                }
            }
            for (int64_t p = 0; p < n; ++p) {
                widen(wide_k + p * s.dim_k, reinterpret_cast<const ggml_fp16_t *>(keys + at[p] * k->nb[1]), s.dim_k);
                widen(wide_v + p * s.dim_v, reinterpret_cast<const ggml_fp16_t *>(values + at[p] * v->nb[1]), s.dim_v);
            }
            for (int64_t row = 0; n > 0 && row < s.rows; ++row) {
                scores(weights, queries + row * s.dim_k, wide_k, s.dim_k, n);
                add_block(weights, masks[row / s.heads_together], at, n, wide_v, s, partial + row * s.partial());
            }
        }
    }

    static bool seen(const ggml_fp16_t * const * masks, int64_t n_tokens, int64_t position) {
        constexpr ggml_fp16_t hidden = 0xfc00;  // minus infinity
        for (int64_t token = 0; token < n_tokens; ++token) {
            if (!masks[token] || masks[token][position] != hidden) {
                return true;
            }
        }
        return false;
    }

    static void add_block(float * weights, const ggml_fp16_t * mask, const int64_t * at, int64_t n,
                          const float * values, const shape & s, float * result) {
        float largest = result[0];
        for (int64_t p = 0; p < n; ++p) {
            if (mask) {
                weights[p] += GGML_CPU_FP16_TO_FP32(mask[at[p]]);
            }
            largest = std::max(largest, weights[p]);
        }
        if (largest == nothing) {
            return;  // this token sees none of them
        }
        const float keep = result[0] == nothing ? 0.0f : std::exp(result[0] - largest);
        result[0]        = largest;
        result[1]        = result[1] * keep + weigh(weights, n, largest);
        int64_t i        = 0;
        for (; i + 64 <= s.dim_v; i += 64) {
            add_values<8>(result + 2 + i, keep, weights, values + i, s.dim_v, n);
        }
        for (; i + 32 <= s.dim_v; i += 32) {
            add_values<4>(result + 2 + i, keep, weights, values + i, s.dim_v, n);
        }
        for (; i < s.dim_v; i += 8) {
            add_values<1>(result + 2 + i, keep, weights, values + i, s.dim_v, n);
        }
    }

    // One row's result, from the partial ones of all splits.
    static void finish(ggml_tensor * op, const shape & s, int64_t part, int64_t row, const float * partial,
                       int64_t n_splits) {
        const int64_t head   = part % s.n_kv_heads * s.heads_together + row % s.heads_together;
        const int64_t token  = row / s.heads_together;
        const int64_t stream = part / s.n_kv_heads;
        float * to = reinterpret_cast<float *>(static_cast<char *>(op->data) + head * op->nb[1] + token * op->nb[2] +
                                               stream * op->nb[3]);
        float   largest = nothing;
        for (int64_t i = 0; i < n_splits; ++i) {
            largest = std::max(largest, partial[(i * s.rows + row) * s.partial()]);
        }
        float share[max_splits];
        float sum = 0.0f;
        for (int64_t i = 0; i < n_splits; ++i) {
            const float * one = partial + (i * s.rows + row) * s.partial();
            share[i]          = one[0] == nothing ? 0.0f : std::exp(one[0] - largest);
            sum += share[i] * one[1];
        }
        const float whole = sum == 0.0f ? 0.0f : 1.0f / sum;
        for (int64_t d = 0; d < s.dim_v; ++d) {
            float value = 0.0f;
            for (int64_t i = 0; i < n_splits; ++i) {
                value += share[i] * partial[(i * s.rows + row) * s.partial() + 2 + d];
            }
            to[d] = whole * value;
        }
    }
};

}  // namespace

ggml::cpu::tensor_traits * attention_for(const ggml_tensor * op) {
    static attention    computes;
    const ggml_tensor * q    = op->src[0];
    const ggml_tensor * k    = op->src[1];
    const ggml_tensor * v    = op->src[2];
    const ggml_tensor * mask = op->src[3];
    if (op->op != GGML_OP_FLASH_ATTN_EXT || op->src[4] || parameter(op, 1) != 0.0f || parameter(op, 2) != 0.0f) {
        return nullptr;  // sinks, a bias by distance, a soft limit
    }
    const bool types  = q->type == GGML_TYPE_F32 && k->type == GGML_TYPE_F16 && v->type == GGML_TYPE_F16;
    const bool masked = !mask || (mask->type == GGML_TYPE_F16 && mask->ne[2] == 1);
    const bool dims   = k->ne[0] % 8 == 0 && v->ne[0] % 8 == 0 && k->ne[0] <= max_dim && v->ne[0] <= max_dim;
    const bool heads  = k->ne[2] > 0 && k->ne[2] == v->ne[2] && q->ne[2] % k->ne[2] == 0;
    const bool flat   = k->ne[3] == q->ne[3] && v->ne[3] == q->ne[3] && q->nb[0] == sizeof(float);
    if (!types || !masked || !dims || !heads || !flat) {
        return nullptr;
    }
    return q->ne[1] <= max_tokens && shape(op).rows <= max_rows ? &computes : nullptr;
}

}  // namespace ai4all::kernels

#else

namespace ai4all::kernels {

ggml::cpu::tensor_traits * attention_for(const ggml_tensor *) {
    return nullptr;
}

}  // namespace ai4all::kernels

#endif
