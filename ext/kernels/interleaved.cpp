// Matrix products over weights of which eight rows lie side by side: Q4_1 and Q8_0 on x86.
//
// A dot product of two rows ends in a sum over the lanes of a register, converts and scales once for
// each row, and unpacks the weights again for each column. With eight rows in the eight lanes there is
// nothing to sum over lanes, one conversion serves eight rows, and unpacked weights serve four columns.
// ggml-cpu does so for some formats and not for these two; what it offers to all is an extra buffer
// type, which decides how a weight is stored and what multiplies by it. This is one. It is compiled
// into ggml-cpu's own target, with its flags.
//
// Activations are quantized by ggml's own functions and the integer sums are exact, so a result
// differs from ggml's by the order of additions alone.

#include "interleaved.h"

#include "attention.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "traits.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define GGML_COMMON_DECL_CPP
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml-common.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t lanes     = 8;   // rows side by side
constexpr int64_t block     = 32;  // weights with a scale of their own, in both formats
constexpr int64_t tile_cols = 64;  // columns that stay in the cache while rows go by

// In both, four weights of a row stand together, so that one load has them of all eight rows.

struct q4_1_rows {
    ggml_half d[lanes];
    ggml_half m[lanes];
    uint8_t   qs[lanes * block / 2];  // by four: of each byte the low half is weight j, the high j + 16
};

struct q8_0_rows {
    ggml_half d[lanes];
    int8_t    qs[lanes * block];
};

static_assert(sizeof(q4_1_rows) == lanes * sizeof(block_q4_1), "the layout takes no more than the file's");
static_assert(sizeof(q8_0_rows) == lanes * sizeof(block_q8_0), "the layout takes no more than the file's");

// One column of activations, quantized: `n` blocks. Scales apart from the numbers: both are read with
// one instruction each.
struct column {
    const float *  scale;
    const float *  sum;  // scale times the sum of the block's numbers
    const int8_t * qs;

    static size_t size(int64_t k) { return static_cast<size_t>(k + 2 * (k / block) * (int64_t)sizeof(float)); }
    static column at(char * data, int64_t k) {
        float * scale = reinterpret_cast<float *>(data);
        return {scale, scale + k / block, reinterpret_cast<const int8_t *>(scale + 2 * (k / block))};
    }
};

inline __m256i four_of(const int8_t * qs) {
    int32_t value;
    std::memcpy(&value, qs, sizeof(value));
    return _mm256_set1_epi32(value);
}

// Sums of products of four bytes each, unsigned with signed, onto eight 32-bit sums.
inline __m256i add_products(__m256i sums, __m256i u, __m256i s) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_dpbusd_epi32(sums, u, s);
#elif defined(__AVXVNNI__)
    return _mm256_dpbusd_avx_epi32(sums, u, s);
#else
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}

// The same for numbers below 16: eight of them, each twice 15 * 127 * 2 at most, fit in 16 bits, so
// the widening can wait for the end of the block.
inline __m256i add_small_products(__m256i sums, __m256i u, __m256i s) {
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
    return add_products(sums, u, s);
#else
    return _mm256_add_epi16(sums, _mm256_maddubs_epi16(u, s));
#endif
}

inline __m256i widened(__m256i sums) {
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__)
    return sums;
#else
    return _mm256_madd_epi16(sums, _mm256_set1_epi16(1));
#endif
}

// Here and not later: a compiler that is free to reorder the additions keeps all products until the end
// of the block, far more than there are registers.
inline void settle(__m256i & x) {
    __asm__("" : "+x"(x));
}

inline __m256 halves(const ggml_half * x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x)));
}

inline __m256i bytes(const void * x) {
    return _mm256_loadu_si256(static_cast<const __m256i *>(x));
}

// Eight rows by N columns, into the rows from `at` of each column. Not inlined: on its own, all of it
// stays in registers.
template <int N>
__attribute__((noinline)) void multiply(const q4_1_rows * w, int64_t n_blocks, const column * y, float * const * out,
                                        int64_t at) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256        acc[N];
    for (int n = 0; n < N; ++n) {
        acc[n] = _mm256_setzero_ps();
    }
    for (int64_t b = 0; b < n_blocks; ++b) {
        __m256i sums[N];
        for (int n = 0; n < N; ++n) {
            sums[n] = _mm256_setzero_si256();
        }
        for (int64_t c = 0; c < 4; ++c) {
            const __m256i packed = bytes(w[b].qs + 32 * c);
            const __m256i first  = _mm256_and_si256(packed, low);
            const __m256i second = _mm256_and_si256(_mm256_srli_epi16(packed, 4), low);
            for (int n = 0; n < N; ++n) {
                const int8_t * qs = y[n].qs + block * b + 4 * c;
                sums[n]           = add_small_products(sums[n], first, four_of(qs));
                sums[n]           = add_small_products(sums[n], second, four_of(qs + 16));
                settle(sums[n]);
            }
        }
        const __m256 d = halves(w[b].d);
        const __m256 m = halves(w[b].m);
        for (int n = 0; n < N; ++n) {
            const __m256 scale = _mm256_mul_ps(d, _mm256_broadcast_ss(y[n].scale + b));
            acc[n]             = _mm256_fmadd_ps(_mm256_cvtepi32_ps(widened(sums[n])), scale, acc[n]);
            acc[n]             = _mm256_fmadd_ps(m, _mm256_broadcast_ss(y[n].sum + b), acc[n]);
        }
    }
    for (int n = 0; n < N; ++n) {
        _mm256_storeu_ps(out[n] + at, acc[n]);
    }
}

template <int N>
__attribute__((noinline)) void multiply(const q8_0_rows * w, int64_t n_blocks, const column * y, float * const * out,
                                        int64_t at) {
    __m256 acc[N];
    for (int n = 0; n < N; ++n) {
        acc[n] = _mm256_setzero_ps();
    }
    for (int64_t b = 0; b < n_blocks; ++b) {
        __m256i sums[N];
        for (int n = 0; n < N; ++n) {
            sums[n] = _mm256_setzero_si256();
        }
        for (int64_t c = 0; c < 8; ++c) {
            // The instruction wants one side unsigned: the weight's sign goes over to the activation.
            const __m256i weights = bytes(w[b].qs + 32 * c);
            const __m256i sizes   = _mm256_abs_epi8(weights);
            for (int n = 0; n < N; ++n) {
                const __m256i qs = four_of(y[n].qs + block * b + 4 * c);
                sums[n]          = add_products(sums[n], sizes, _mm256_sign_epi8(qs, weights));
                settle(sums[n]);
            }
        }
        const __m256 d = halves(w[b].d);
        for (int n = 0; n < N; ++n) {
            const __m256 scale = _mm256_mul_ps(d, _mm256_broadcast_ss(y[n].scale + b));
            acc[n]             = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[n]), scale, acc[n]);
        }
    }
    for (int n = 0; n < N; ++n) {
        _mm256_storeu_ps(out[n] + at, acc[n]);
    }
}

void interleave(const block_q4_1 * const * rows, int64_t b, q4_1_rows & to) {
    for (int64_t r = 0; r < lanes; ++r) {
        const block_q4_1 & from = rows[r][b];
        std::memcpy(&to.d[r], &from.data.data.d, sizeof(ggml_half));
        std::memcpy(&to.m[r], &from.data.data.m, sizeof(ggml_half));
        for (int64_t c = 0; c < 4; ++c) {
            std::memcpy(to.qs + 32 * c + 4 * r, from.qs + 4 * c, 4);
        }
    }
}

void interleave(const block_q8_0 * const * rows, int64_t b, q8_0_rows & to) {
    for (int64_t r = 0; r < lanes; ++r) {
        const block_q8_0 & from = rows[r][b];
        to.d[r]                 = from.d;
        for (int64_t c = 0; c < 8; ++c) {
            std::memcpy(to.qs + 32 * c + 4 * r, from.qs + 4 * c, 4);
        }
    }
}

// What a format's weights are multiplied with, as ggml has it.
struct q4_1_format {
    using file_block                    = block_q4_1;
    using rows                          = q4_1_rows;
    using activation                    = block_q8_1;
    static constexpr ggml_type act_type = GGML_TYPE_Q8_1;
    static float               scale(const activation & a) { return ggml_fp16_to_fp32(a.data.data.d); }
    static float               sum(const activation & a) { return ggml_fp16_to_fp32(a.data.data.s); }
};

struct q8_0_format {
    using file_block                    = block_q8_0;
    using rows                          = q8_0_rows;
    using activation                    = block_q8_0;
    static constexpr ggml_type act_type = GGML_TYPE_Q8_0;
    static float               scale(const activation & a) { return ggml_fp16_to_fp32(a.d); }
    static float               sum(const activation &) { return 0.0f; }
};

class layout : public ggml::cpu::tensor_traits {
  public:
    virtual void store(ggml_tensor * tensor, const void * data) = 0;
};

template <typename Format>
class layout_of : public layout {
  public:
    void store(ggml_tensor * tensor, const void * data) override {
        using file_block       = typename Format::file_block;
        const int64_t n_blocks = tensor->ne[0] / block;
        const auto *  from     = static_cast<const file_block *>(data);
        auto *        to       = static_cast<typename Format::rows *>(tensor->data);
        for (int64_t row = 0; row < tensor->ne[1]; row += lanes) {
            const file_block * rows[lanes];
            for (int64_t r = 0; r < lanes; ++r) {
                rows[r] = from + (row + r) * n_blocks;
            }
            for (int64_t b = 0; b < n_blocks; ++b) {
                interleave(rows, b, *to++);
            }
        }
    }

    bool work_size(int, const ggml_tensor * op, size_t & size) override {
        size = column::size(op->src[1]->ne[0]) * static_cast<size_t>(ggml_nrows(op->src[1]));
        return op->op == GGML_OP_MUL_MAT;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (op->op != GGML_OP_MUL_MAT) {
            return false;
        }
        const ggml_tensor * src      = op->src[1];
        const int64_t       n_groups = op->src[0]->ne[1] / lanes;
        const int64_t       n_cols   = ggml_nrows(src);
        GGML_ASSERT(params->wsize >= column::size(src->ne[0]) * static_cast<size_t>(n_cols));

        quantize(params, src);
        // A thread that is held up takes fewer of the chunks.
        const int64_t n_chunks = std::min<int64_t>(n_groups, params->nth == 1 ? 1 : 4 * params->nth);
        if (params->ith == 0) {
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);
        for (int64_t chunk = params->ith; chunk < n_chunks; chunk = ggml_threadpool_chunk_add(params->threadpool, 1)) {
            const int64_t begin = chunk * n_groups / n_chunks;
            const int64_t end   = (chunk + 1) * n_groups / n_chunks;
            for (int64_t c = 0; c < n_cols; c += tile_cols) {
                multiply_tile(params, op, begin, end, c, std::min(c + tile_cols, n_cols));
            }
        }
        return true;
    }

  private:
    void quantize(const ggml_compute_params * params, const ggml_tensor * src) {
        constexpr int64_t several = 16;
        using activation          = typename Format::activation;
        activation    some[several];
        const auto    from_float = ggml_get_type_traits_cpu(Format::act_type)->from_float;
        const int64_t k          = src->ne[0];
        const int64_t n_blocks   = k / block;
        const int64_t total      = n_blocks * ggml_nrows(src);
        const int64_t end        = (params->ith + 1) * total / params->nth;
        char * const  columns    = static_cast<char *>(params->wdata);
        const size_t  stride     = column::size(k);

        for (int64_t at = params->ith * total / params->nth; at < end;) {
            const int64_t c = at / n_blocks;
            const int64_t b = at % n_blocks;
            const int64_t n = std::min({several, n_blocks - b, end - at});
            from_float(row_of(src, c) + b * block, some, n * block);

            float *  scale = reinterpret_cast<float *>(columns + c * stride);
            float *  sum   = scale + n_blocks;
            int8_t * qs    = reinterpret_cast<int8_t *>(sum + n_blocks);
            for (int64_t i = 0; i < n; ++i) {
                scale[b + i] = Format::scale(some[i]);
                sum[b + i]   = Format::sum(some[i]);
                std::memcpy(qs + (b + i) * block, some[i].qs, block);
            }
            at += n;
        }
    }

    static const float * row_of(const ggml_tensor * src, int64_t c) {
        const int64_t i1 = c % src->ne[1];
        const int64_t i2 = c / src->ne[1] % src->ne[2];
        const int64_t i3 = c / (src->ne[1] * src->ne[2]);
        return reinterpret_cast<const float *>(static_cast<const char *>(src->data) + i1 * src->nb[1] +
                                               i2 * src->nb[2] + i3 * src->nb[3]);
    }

    void multiply_tile(const ggml_compute_params * params, const ggml_tensor * op, int64_t begin, int64_t end,
                       int64_t first, int64_t last) {
        const int64_t k        = op->src[0]->ne[0];
        const int64_t n_blocks = k / block;
        const int64_t n_cols   = last - first;
        const auto *  weights  = static_cast<const typename Format::rows *>(op->src[0]->data);
        column        y[tile_cols];
        float *       out[tile_cols];
        for (int64_t c = 0; c < n_cols; ++c) {
            y[c]   = column::at(static_cast<char *>(params->wdata) + (first + c) * column::size(k), k);
            out[c] = const_cast<float *>(row_of(op, first + c));
        }
        for (int64_t g = begin; g < end; ++g) {
            const auto *  w  = weights + g * n_blocks;
            const int64_t at = g * lanes;
            int64_t       c  = 0;
            for (; c + 4 <= n_cols; c += 4) {
                multiply<4>(w, n_blocks, y + c, out + c, at);
            }
            switch (n_cols - c) {
                case 3: multiply<3>(w, n_blocks, y + c, out + c, at); break;
                case 2: multiply<2>(w, n_blocks, y + c, out + c, at); break;
                case 1: multiply<1>(w, n_blocks, y + c, out + c, at); break;
                default: break;
            }
        }
    }
};

layout * layout_for(const ggml_tensor * weight) {
    static layout_of<q4_1_format> q4_1;
    static layout_of<q8_0_format> q8_0;
    if (ggml_n_dims(weight) != 2 || weight->ne[1] % lanes != 0) {
        return nullptr;
    }
    return weight->type == GGML_TYPE_Q4_1   ? static_cast<layout *>(&q4_1)
           : weight->type == GGML_TYPE_Q8_0 ? static_cast<layout *>(&q8_0)
                                            : nullptr;
}

// The buffer type.

ggml_backend_buffer_type_t interleaved_type();

const char * get_name(ggml_backend_buffer_type_t) {
    return "CPU_INTERLEAVED";
}

ggml_status init_tensor(ggml_backend_buffer_t, ggml_tensor * tensor) {
    tensor->extra = layout_for(tensor);
    return GGML_STATUS_SUCCESS;
}

void set_tensor(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    GGML_ASSERT(tensor->extra && offset == 0 && size == ggml_nbytes(tensor));
    static_cast<layout *>(tensor->extra)->store(tensor, data);
}

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (!buffer) {
        return nullptr;
    }
#ifdef __linux__
    // Weights are read from end to end: large pages spare the look-ups. Where there are none, nothing is lost.
    constexpr uintptr_t page = 4096;
    const auto begin = (reinterpret_cast<uintptr_t>(ggml_backend_buffer_get_base(buffer)) + page - 1) & ~(page - 1);
    const auto end   = (reinterpret_cast<uintptr_t>(ggml_backend_buffer_get_base(buffer)) + size) & ~(page - 1);
    if (end > begin) {
        (void)madvise(reinterpret_cast<void *>(begin), end - begin, MADV_HUGEPAGE);
    }
#endif
    buffer->buft              = type;
    buffer->iface.init_tensor = init_tensor;
    buffer->iface.set_tensor  = set_tensor;
    buffer->iface.get_tensor  = nullptr;
    buffer->iface.cpy_tensor  = nullptr;
    return buffer;
}

size_t get_alignment(ggml_backend_buffer_type_t) {
    return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
}

class interleaved_kind : public ggml::cpu::extra_buffer_type {
    bool supports_op(ggml_backend_dev_t, const ggml_tensor * op) override {
        const ggml_tensor * weight = op->src[0];
        const ggml_tensor * src    = op->src[1];
        return op->op == GGML_OP_MUL_MAT && weight->buffer && weight->buffer->buft == interleaved_type() &&
               layout_for(weight) && src->type == GGML_TYPE_F32 && op->type == GGML_TYPE_F32 &&
               src->nb[0] == sizeof(float) && (!src->buffer || ggml_backend_buft_is_host(src->buffer->buft));
    }

    // ggml asks for every operation, whatever it works on.
    ggml::cpu::tensor_traits * get_tensor_traits(const ggml_tensor * op) override {
        if (op->op == GGML_OP_FLASH_ATTN_EXT) {
            return ai4all::kernels::attention_for(op);
        }
        const ggml_tensor * weight = op->src[0];
        if (op->op != GGML_OP_MUL_MAT || !weight->buffer || weight->buffer->buft != interleaved_type()) {
            return nullptr;
        }
        return static_cast<layout *>(weight->extra);
    }
};

ggml_backend_buffer_type_t interleaved_type() {
    static interleaved_kind         kind;
    static ggml_backend_buffer_type type = {
        {get_name, alloc_buffer, get_alignment, nullptr, nullptr, nullptr},
        ggml_backend_reg_dev_get(ggml_backend_cpu_reg(), 0),
        static_cast<ggml::cpu::extra_buffer_type *>(&kind),
    };
    return &type;
}

}  // namespace

extern "C" void ai4all_register_interleaved(void) {
    static const bool registered = [] {
        ggml_backend_cpu_get_extra_buffer_types().push_back(interleaved_type());
        return true;
    }();
    (void)registered;
}

#ifdef GGML_BACKEND_DL
// ggml-cpu is a library that is loaded at run time, and nobody can call into it by name.
[[maybe_unused]] static const bool registered_at_load = [] {
    ai4all_register_interleaved();
    return true;
}();
#endif

#else

extern "C" void ai4all_register_interleaved(void) {}

#endif
