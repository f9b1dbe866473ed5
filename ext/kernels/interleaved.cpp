// Matrix products over Q4_1 weights of which eight rows lie side by side, on x86.
//
// ggml multiplies this format a row by a column at a time: it converts both scales and unpacks the
// weights again for each of them. With eight rows stored together, one instruction converts eight
// scales, and unpacked weights serve up to four columns. ggml-cpu does so for some formats and not for
// this one; what it offers to all is an extra buffer type, which decides how a weight is stored and what
// multiplies by it. This is one. It is compiled into ggml-cpu's own target, with its flags.
//
// Each product is summed as ggml sums it: eight partial sums, block after block, with the same
// roundings, so a result is the same to the last bit and so is what a model says. A test holds that.

#include "attention.h"
#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "kernels.h"
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
constexpr int64_t block     = 32;  // weights with a scale of their own
constexpr int64_t tile_cols = 64;  // columns that stay in the cache while rows go by

struct group_block {
    ggml_half d[lanes];
    ggml_half m[lanes];
    uint8_t   qs[lanes / 2][block];  // of each byte the low half is of the even row, the high of the odd
};

static_assert(sizeof(group_block) == lanes * sizeof(block_q4_1), "the layout takes no more than the file's");

// One column of activations, quantized. Scales apart from the numbers: each is read with one instruction.
struct column {
    const float *  scale;
    const float *  sum;  // scale times the sum of the block's numbers
    const int8_t * qs;

    static size_t size(int64_t k) {
        return static_cast<size_t>(k + 2 * (k / block) * static_cast<int64_t>(sizeof(float)));
    }
    static column at(char * data, int64_t k) {
        float * scale = reinterpret_cast<float *>(data);
        return {scale, scale + k / block, reinterpret_cast<const int8_t *>(scale + 2 * (k / block))};
    }
};

inline __m256 halves(const ggml_half * x) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(x)));
}

inline __m256i bytes(const void * x) {
    return _mm256_loadu_si256(static_cast<const __m256i *>(x));
}

// Products of unsigned with signed bytes, summed by four.
inline __m256 products(__m256i u, __m256i s) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
    return _mm256_cvtepi32_ps(_mm256_dpbusd_epi32(_mm256_setzero_si256(), u, s));
#elif defined(__AVXVNNI__)
    return _mm256_cvtepi32_ps(_mm256_dpbusd_avx_epi32(_mm256_setzero_si256(), u, s));
#else
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
#endif
}

// Now and not later: a compiler that is free to reorder computes more at once than there are registers.
inline void settle(__m256 & x) {
    __asm__("" : "+x"(x));
}

// The eight partial sums of one product, in the order in which ggml adds them.
inline float sum_of(__m256 x) {
    __m128 sums = _mm_add_ps(_mm256_extractf128_ps(x, 1), _mm256_castps256_ps128(x));
    sums        = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
    return _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)));
}

// Some pairs of a group's rows by N columns: 2 * Pairs * N products at once, which is what the registers
// hold.
template <int Pairs, int N>
inline void multiply_rows(const group_block * w, int64_t n_blocks, int pair, const float * scales, const column * y,
                          float (*sums)[lanes]) {
    const __m256i low = _mm256_set1_epi8(15);
    __m256        acc[2 * Pairs][N];
    for (auto & row : acc) {
        for (__m256 & one : row) {
            one = _mm256_setzero_ps();
        }
    }
    for (int64_t b = 0; b < n_blocks; ++b) {
        for (int p = 0; p < Pairs; ++p) {
            const __m256i two  = bytes(w[b].qs[pair + p]);
            const __m256i even = _mm256_and_si256(two, low);
            const __m256i odd  = _mm256_and_si256(_mm256_srli_epi16(two, 4), low);
            const float * d    = scales + b * lanes + 2 * (pair + p);
            for (int n = 0; n < N; ++n) {
                const __m256  scale = _mm256_broadcast_ss(y[n].scale + b);
                const __m256i qs    = bytes(y[n].qs + b * block);
                acc[2 * p][n] =
                    _mm256_fmadd_ps(_mm256_mul_ps(_mm256_broadcast_ss(d), scale), products(even, qs), acc[2 * p][n]);
                acc[2 * p + 1][n] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_broadcast_ss(d + 1), scale), products(odd, qs),
                                                    acc[2 * p + 1][n]);
                if (N > 2) {
                    settle(acc[2 * p][n]);
                    settle(acc[2 * p + 1][n]);
                }
            }
        }
    }
    for (int r = 0; r < 2 * Pairs; ++r) {
        for (int n = 0; n < N; ++n) {
            sums[n][2 * pair + r] = sum_of(acc[r][n]);
        }
    }
}

// A group of eight rows by N columns, into the rows from `at` of each. `scales` is room for those of the
// group. Not inlined: on its own, all of it stays in registers.
template <int N>
__attribute__((noinline)) void multiply(const group_block * w, int64_t n_blocks, const column * y, float * scales,
                                        float * const * out, int64_t at) {
    constexpr int pairs = N == 1 ? 2 : 1;
    __m256        offsets[N];
    float         sums[N][lanes];
    for (int n = 0; n < N; ++n) {
        offsets[n] = _mm256_setzero_ps();
    }
    for (int64_t b = 0; b < n_blocks; ++b) {
        // The next group comes while this one is computed; a block is two and a half cache lines.
        const char * next = reinterpret_cast<const char *>(w + n_blocks + b);
        _mm_prefetch(next, _MM_HINT_T0);
        _mm_prefetch(next + 64, _MM_HINT_T0);
        _mm_prefetch(next + 128, _MM_HINT_T0);
        _mm256_storeu_ps(scales + b * lanes, halves(w[b].d));
        const __m256 m = halves(w[b].m);
        for (int n = 0; n < N; ++n) {
            offsets[n] = _mm256_fmadd_ps(m, _mm256_broadcast_ss(y[n].sum + b), offsets[n]);
        }
    }
    for (int pair = 0; pair < 4; pair += pairs) {
        multiply_rows<pairs, N>(w, n_blocks, pair, scales, y, sums);
    }
    for (int n = 0; n < N; ++n) {
        _mm256_storeu_ps(out[n] + at, _mm256_add_ps(_mm256_loadu_ps(sums[n]), offsets[n]));
    }
}

class layout : public ggml::cpu::tensor_traits {
  public:
    // Weights from the order of the file.
    void store(ggml_tensor * tensor, const void * data) {
        const int64_t n_blocks = tensor->ne[0] / block;
        const auto *  from     = static_cast<const block_q4_1 *>(data);
        auto *        to       = static_cast<group_block *>(tensor->data);
        for (int64_t row = 0; row < tensor->ne[1]; row += lanes) {
            for (int64_t b = 0; b < n_blocks; ++b) {
                interleave(from + row * n_blocks + b, n_blocks, *to++);
            }
        }
    }

    bool work_size(int n_threads, const ggml_tensor * op, size_t & size) override {
        size = columns_size(op) + n_threads * scales_size(op);
        return op->op == GGML_OP_MUL_MAT;
    }

    bool compute_forward(ggml_compute_params * params, ggml_tensor * op) override {
        if (op->op != GGML_OP_MUL_MAT) {
            return false;
        }
        const int64_t n_groups = op->src[0]->ne[1] / lanes;
        const int64_t n_cols   = ggml_nrows(op->src[1]);
        GGML_ASSERT(params->wsize >= columns_size(op) + params->nth * scales_size(op));

        quantize(params, op->src[1]);
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
    // One block of eight rows; `from` is that of the first, the others follow `stride` blocks apart.
    static void interleave(const block_q4_1 * from, int64_t stride, group_block & to) {
        for (int64_t r = 0; r < lanes; ++r) {
            std::memcpy(&to.d[r], &from[r * stride].data.data.d, sizeof(ggml_half));
            std::memcpy(&to.m[r], &from[r * stride].data.data.m, sizeof(ggml_half));
        }
        for (int64_t p = 0; p < lanes / 2; ++p) {
            const uint8_t * even = from[2 * p * stride].qs;
            const uint8_t * odd  = from[(2 * p + 1) * stride].qs;
            for (int64_t i = 0; i < block / 2; ++i) {
                to.qs[p][i]             = static_cast<uint8_t>((even[i] & 15) | (odd[i] << 4));
                to.qs[p][i + block / 2] = static_cast<uint8_t>((even[i] >> 4) | (odd[i] & 0xf0));
            }
        }
    }

    // The work buffer: all columns, then the scales of one group of rows for each thread.
    static size_t columns_size(const ggml_tensor * op) {
        return column::size(op->src[1]->ne[0]) * static_cast<size_t>(ggml_nrows(op->src[1]));
    }
    static size_t scales_size(const ggml_tensor * op) {
        return static_cast<size_t>(op->src[1]->ne[0] / block * lanes) * sizeof(float);
    }

    static void quantize(const ggml_compute_params * params, const ggml_tensor * src) {
        constexpr int64_t several = 16;
        block_q8_1        some[several];
        const auto        from_float = ggml_get_type_traits_cpu(GGML_TYPE_Q8_1)->from_float;
        const int64_t     k          = src->ne[0];
        const int64_t     n_blocks   = k / block;
        const int64_t     total      = n_blocks * ggml_nrows(src);
        const int64_t     end        = (params->ith + 1) * total / params->nth;
        char * const      columns    = static_cast<char *>(params->wdata);

        for (int64_t at = params->ith * total / params->nth; at < end;) {
            const int64_t c = at / n_blocks;
            const int64_t b = at % n_blocks;
            const int64_t n = std::min({several, n_blocks - b, end - at});
            from_float(row_of(src, c) + b * block, some, n * block);

            float *  scale = reinterpret_cast<float *>(columns + c * column::size(k));
            float *  sum   = scale + n_blocks;
            int8_t * qs    = reinterpret_cast<int8_t *>(sum + n_blocks);
            for (int64_t i = 0; i < n; ++i) {
                scale[b + i] = ggml_fp16_to_fp32(some[i].data.data.d);
                sum[b + i]   = ggml_fp16_to_fp32(some[i].data.data.s);
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

    static void multiply_tile(const ggml_compute_params * params, const ggml_tensor * op, int64_t begin, int64_t end,
                              int64_t first, int64_t last) {
        const int64_t k        = op->src[0]->ne[0];
        const int64_t n_blocks = k / block;
        const int64_t n_cols   = last - first;
        const auto *  weights  = static_cast<const group_block *>(op->src[0]->data);
        char * const  data     = static_cast<char *>(params->wdata);
        auto *        scales   = reinterpret_cast<float *>(data + columns_size(op) + params->ith * scales_size(op));
        column        y[tile_cols];
        float *       out[tile_cols];
        for (int64_t c = 0; c < n_cols; ++c) {
            y[c]   = column::at(data + (first + c) * column::size(k), k);
            out[c] = const_cast<float *>(row_of(op, first + c));
        }
        for (int64_t g = begin; g < end; ++g) {
            const auto *  w  = weights + g * n_blocks;
            const int64_t at = g * lanes;
            int64_t       c  = 0;
            for (; c + 4 <= n_cols; c += 4) {
                multiply<4>(w, n_blocks, y + c, scales, out + c, at);
            }
            switch (n_cols - c) {
                case 3: multiply<3>(w, n_blocks, y + c, scales, out + c, at); break;
                case 2: multiply<2>(w, n_blocks, y + c, scales, out + c, at); break;
                case 1: multiply<1>(w, n_blocks, y + c, scales, out + c, at); break;
                default: break;
            }
        }
    }
};

layout * layout_for(const ggml_tensor * weight) {
    static layout only;
    const bool    fits = weight->type == GGML_TYPE_Q4_1 && ggml_n_dims(weight) == 2 && weight->ne[1] % lanes == 0;
    return fits ? &only : nullptr;
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

#else

extern "C" void ai4all_register_interleaved(void) {}

#endif
