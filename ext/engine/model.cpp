#include "model.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "chat_template.h"
#include "common.h"
#include "cpu_layouts.h"
#include "exact_batch.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "log_sink.h"
#include "lookup.h"
#include "placement.h"
#include "text.h"

namespace ai4all {

namespace {

constexpr uint32_t default_context  = 4096;
constexpr uint32_t smallest_context = 8;

ggml_type kv_type_from_name(const std::string & name) {
    for (const ggml_type type : {GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0,
                                 GGML_TYPE_Q4_1, GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1}) {
        if (name == ggml_type_name(type)) {
            return type;
        }
    }
    throw engine_error(errc::load_failed,
                       "kv_type: '" + name + "' is not a cache type; use f16, f32, bf16, q8_0 or q4_0");
}

std::string with_log(const std::string & what) {
    const std::string log = log_take_errors();
    return log.empty() ? what : what + ": " + log;
}

// Errors travel to whoever asked for the work; where a machine keeps its files does not.
std::string without_path(std::string text, const std::string & path) {
    for (size_t at = 0; !path.empty() && (at = text.find(path, at)) != std::string::npos;) {
        text.replace(at, path.size(), "the file");
    }
    return text;
}

bool call_progress(float share, void * data) {
    return (*static_cast<const std::function<bool(float)> *>(data))(share);
}

}  // namespace

loaded_model::loaded_model(const load_params & params, const std::function<bool(float)> & progress,
                           ggml_abort_callback abort, void * abort_data, const loaded_model * lender) {
    log_take_errors();
    cpu_layouts_install();

    bool                             given_up = false;
    const std::function<bool(float)> watched  = [&](float share) {
        given_up = given_up || !progress(share);
        return !given_up;
    };

    // Without layers of its own, a GPU would still be given long prompts: not what "0 layers" says.
    const bool                      all_gpus = params.devices.empty() && params.n_gpu_layers != 0;
    std::vector<ggml_backend_dev_t> devices  = params.n_gpu_layers ? devices_of(params) : devices_of({});

    llama_model_params mparams          = llama_model_default_params();
    mparams.devices                     = all_gpus ? nullptr : devices.data();
    mparams.n_gpu_layers                = params.n_gpu_layers;
    mparams.load_mode                   = params.use_mmap ? LLAMA_LOAD_MODE_AUTO : LLAMA_LOAD_MODE_NONE;
    mparams.progress_callback           = call_progress;
    mparams.progress_callback_user_data = const_cast<std::function<bool(float)> *>(&watched);
    try {
        model_.reset(llama_model_load_from_file(params.path.c_str(), mparams));
    } catch (const std::bad_alloc &) {
        throw engine_error(errc::out_of_memory, "not enough memory for the weights");
    } catch (const std::exception & error) {
        throw engine_error(errc::load_failed, without_path(error.what(), params.path));
    }
    if (given_up) {
        throw engine_error(errc::cancelled, "the load was cancelled");
    }
    if (!model_) {
        const std::string what   = without_path(with_log("the model could not be loaded"), params.path);
        const bool        memory = what.find("unable to allocate") != std::string::npos;
        throw engine_error(memory ? errc::out_of_memory : errc::load_failed, what);
    }
    if (llama_model_has_encoder(model_.get()) && llama_model_has_decoder(model_.get())) {
        throw engine_error(errc::load_failed, "encoder-decoder models are not supported");
    }

    if (params.use_mmap) {
        release_file_pages(params.path);
    }
    cparams_                     = llama_context_default_params();
    cparams_.abort_callback      = abort;
    cparams_.abort_callback_data = abort_data;
    open_context(params);
    if (lender) {
        pool_       = lender->pool_;
        pool_batch_ = lender->pool_batch_;
        if (pool_) {
            llama_attach_threadpool(ctx_.get(), pool_, pool_batch_);
        }
    } else {
        attach_threadpools(params);
    }
    if (llama_model_has_decoder(model_.get())) {
        warm_up();
    }
    templates_ = read_chat_template(model_.get());
    batch_     = llama_batch_init(static_cast<int32_t>(llama_n_batch(ctx_.get())), 0, 1);
    describe(params);
    if (!lender && can_reuse_ && llama_model_has_decoder(model_.get())) {
        info_.n_exact_batch = longest_exact_batch(model_.get(), static_cast<int32_t>(longest_draft) + 1);
    }
}

loaded_model::~loaded_model() {
    if (batch_.token) {
        llama_batch_free(batch_);
    }
    if (side_batch_.token) {
        llama_batch_free(side_batch_);
    }
    // Contexts first: they use the pools.
    for (context_ptr * ctx : {&scoring_, &embedding_, &ctx_}) {
        if (*ctx) {
            llama_detach_threadpool(ctx->get());
        }
        ctx->reset();
    }
    if (free_pool_ && pool_batch_ != pool_) {
        free_pool_(pool_batch_);
    }
    if (free_pool_ && pool_) {
        free_pool_(pool_);
    }
}

void loaded_model::open_context(const load_params & params) {
    const auto n_train = static_cast<uint32_t>(std::max(0, llama_model_n_ctx_train(model_.get())));
    uint32_t   n_ctx   = params.n_ctx ? params.n_ctx : std::min(n_train ? n_train : default_context, default_context);
    n_ctx              = std::max(n_ctx, smallest_context);
    const uint32_t n_slots = std::max<uint32_t>(1, params.n_slots);
    if (n_slots > llama_max_parallel_sequences()) {
        throw engine_error(errc::load_failed, "n_slots: at most " + std::to_string(llama_max_parallel_sequences()));
    }

    cparams_.n_ctx = n_ctx * n_slots;
    // A batch has room for every slot's next token beside a prompt chunk.
    cparams_.n_batch         = std::max(params.n_batch, n_slots);
    cparams_.n_ubatch        = std::min(params.n_ubatch, cparams_.n_batch);
    cparams_.n_seq_max       = n_slots;
    cparams_.n_outputs_max   = n_slots + longest_draft;
    cparams_.n_threads       = std::max(1, params.n_threads);
    cparams_.n_threads_batch = std::max(1, params.n_threads_batch);
    cparams_.flash_attn_type = static_cast<llama_flash_attn_type>(params.flash_attention);
    cparams_.type_k          = kv_type_from_name(params.kv_type);
    cparams_.type_v          = cparams_.type_k;
    cparams_.kv_unified      = n_slots == 1;
    cparams_.no_perf         = true;
    ctx_                     = new_context(cparams_);

    // A sliding window has dropped what a cut would need; a recurrent state has no middle.
    can_reuse_ = llama_model_n_swa(model_.get()) == 0 && !llama_model_is_recurrent(model_.get()) &&
                 !llama_model_is_hybrid(model_.get());
}

loaded_model::context_ptr loaded_model::new_context(const llama_context_params & cparams) const {
    const std::string what = "a context of " + std::to_string(cparams.n_ctx) + " tokens";
    context_ptr       ctx;
    log_take_errors();
    try {
        ctx.reset(llama_init_from_model(model_.get(), cparams));
    } catch (const std::bad_alloc &) {
        throw engine_error(errc::out_of_memory, "not enough memory for " + what);
    } catch (const std::exception & error) {
        throw engine_error(errc::load_failed, error.what());
    }
    if (!ctx) {
        const std::string log    = log_take_errors();
        const bool        memory = log.find("alloc") != std::string::npos;
        throw engine_error(memory ? errc::out_of_memory : errc::load_failed,
                           what + " could not be made" + (log.empty() ? "" : ": " + log));
    }
    if (pool_) {
        llama_attach_threadpool(ctx.get(), pool_, pool_batch_);
    }
    return ctx;
}

llama_context * loaded_model::embedding_context(uint32_t n_tokens) {
    // A pooled sequence is computed in one physical batch, and upstream computes logits for each of
    // its tokens: the buffers grow with the longest text, so the context is no larger than needed.
    constexpr uint32_t smallest = 512;
    constexpr uint32_t largest  = 4096;
    const auto         n_train  = static_cast<uint32_t>(std::max(1, llama_model_n_ctx_train(model_.get())));
    uint32_t           n_ctx    = smallest;
    while (n_ctx < n_tokens && n_ctx < largest) {
        n_ctx *= 2;
    }
    n_ctx = std::min(n_ctx, n_train);
    if (!embedding_ || llama_n_ubatch(embedding_.get()) < n_ctx) {
        embedding_.reset();
        llama_context_params cparams = cparams_;
        cparams.n_ctx                = n_ctx;
        cparams.n_batch              = n_ctx;
        cparams.n_ubatch             = n_ctx;
        cparams.n_seq_max            = 64;
        cparams.n_outputs_max        = 0;
        cparams.kv_unified           = true;
        cparams.embeddings           = true;
        embedding_                   = new_context(cparams);
        if (llama_pooling_type(embedding_.get()) == LLAMA_POOLING_TYPE_NONE) {
            embedding_.reset();
            cparams.pooling_type = LLAMA_POOLING_TYPE_MEAN;
            embedding_           = new_context(cparams);
        }
    }
    if (llama_pooling_type(embedding_.get()) == LLAMA_POOLING_TYPE_RANK) {
        throw engine_error(errc::bad_request, "the model ranks documents; it gives no embeddings");
    }
    return embedding_.get();
}

llama_context * loaded_model::scoring_context() {
    if (!scoring_) {
        llama_context_params cparams = cparams_;
        // Continuations are sequences over the prompt's cells, which only a unified cache shares.
        cparams.n_ctx         = llama_n_ctx_seq(ctx_.get()) + scoring_rows;
        cparams.n_batch       = std::max<uint32_t>(cparams.n_ubatch, scoring_rows);
        cparams.n_seq_max     = 64;
        cparams.n_outputs_max = scoring_rows;
        cparams.kv_unified    = true;
        scoring_              = new_context(cparams);
    }
    return scoring_.get();
}

llama_batch & loaded_model::side_batch(llama_context * ctx) {
    const auto size = static_cast<int32_t>(llama_n_batch(ctx));
    if (size > side_batch_size_) {
        if (side_batch_.token) {
            llama_batch_free(side_batch_);
        }
        side_batch_      = llama_batch_init(size, 0, 1);
        side_batch_size_ = size;
    }
    return side_batch_;
}

void loaded_model::attach_threadpools(const load_params & params) {
    // Through the registry, so that a CPU backend loaded at run time serves as well.
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!cpu) {
        return;
    }
    ggml_backend_reg_t reg  = ggml_backend_dev_backend_reg(cpu);
    const auto         make = reinterpret_cast<ggml_threadpool_t (*)(ggml_threadpool_params *)>(
        ggml_backend_reg_get_proc_address(reg, "ggml_threadpool_new"));
    free_pool_ =
        reinterpret_cast<void (*)(ggml_threadpool_t)>(ggml_backend_reg_get_proc_address(reg, "ggml_threadpool_free"));
    if (!make || !free_pool_) {
        return;
    }
    const int32_t n_decode  = std::clamp(params.n_threads, 1, GGML_MAX_N_THREADS);
    const int32_t n_prefill = std::clamp(params.n_threads_batch, 1, GGML_MAX_N_THREADS);

    // One pool of the larger size serves both: a graph uses as many of its threads as it asks for.
    ggml_threadpool_params tparams = ggml_threadpool_params_default(std::max(n_decode, n_prefill));
    pool_                          = make(&tparams);
    if (!pool_) {
        throw engine_error(errc::out_of_memory, "the thread pool could not be made");
    }
    pool_batch_ = pool_;
    llama_attach_threadpool(ctx_.get(), pool_, pool_batch_);
}

void loaded_model::warm_up() {
    // Touches every weight once, so that the first request does not pay for page faults.
    const llama_token bos   = llama_vocab_bos(vocab());
    llama_token       token = bos >= 0 ? bos : 0;
    if (llama_decode(ctx_.get(), llama_batch_get_one(&token, 1)) != 0) {
        const std::string log = log_take_errors();
        throw engine_error(errc::load_failed, "the first decode failed" + (log.empty() ? "" : ": " + log));
    }
    llama_synchronize(ctx_.get());
    llama_memory_clear(memory(), true);
}

void loaded_model::describe(const load_params & params) {
    char text[512];

    info_.path = params.path;
    llama_model_desc(model_.get(), text, sizeof(text));
    info_.description       = text;
    info_.n_ctx             = llama_n_ctx_seq(ctx_.get());
    info_.n_ctx_train       = static_cast<uint32_t>(std::max(0, llama_model_n_ctx_train(model_.get())));
    info_.n_batch           = llama_n_batch(ctx_.get());
    info_.n_ubatch          = llama_n_ubatch(ctx_.get());
    info_.n_slots           = llama_n_seq_max(ctx_.get());
    info_.n_vocab           = llama_vocab_n_tokens(vocab());
    info_.n_embd            = llama_model_n_embd(model_.get());
    info_.n_threads         = std::max(1, params.n_threads);
    info_.n_threads_batch   = std::max(1, params.n_threads_batch);
    info_.n_params          = llama_model_n_params(model_.get());
    info_.size_bytes        = llama_model_size(model_.get());
    info_.has_chat_template = llama_model_chat_template(model_.get(), nullptr) != nullptr;

    // Read from what was allocated: what was asked for is not always what came of it.
    info_.placement = placement_of(model_.get(), ctx_.get());
    info_.device    = placement_name(info_.placement);

    const int32_t count = llama_model_meta_count(model_.get());
    for (int32_t i = 0; i < count; ++i) {
        char      key[256];
        const int n = llama_model_meta_key_by_index(model_.get(), i, key, sizeof(key));
        // Long values (a chat template, a licence) are of no use to a caller and are left out.
        if (n > 0 && llama_model_meta_val_str_by_index(model_.get(), i, text, sizeof(text)) < (int32_t)sizeof(text)) {
            info_.metadata.emplace_back(utf8_sanitize(key), utf8_sanitize(text));
        }
    }
}

std::vector<llama_token> loaded_model::tokenize(const generate_params & params) const {
    std::string text = params.prompt;
    if (params.chat) {
        if (!templates_) {
            throw engine_error(errc::bad_request, "system_prompt: the model's chat template cannot be used");
        }
        common_chat_msg system;
        system.role    = "system";
        system.content = params.system_prompt;
        common_chat_msg user;
        user.role    = "user";
        user.content = params.prompt;

        common_chat_templates_inputs inputs;
        inputs.messages.push_back(std::move(system));
        inputs.messages.push_back(std::move(user));
        inputs.use_jinja             = true;
        inputs.add_generation_prompt = true;
        inputs.add_bos               = llama_vocab_get_add_bos(vocab());
        inputs.add_eos               = llama_vocab_get_add_eos(vocab());
        inputs.enable_thinking       = false;
        try {
            text = common_chat_templates_apply(templates_.get(), inputs).prompt;
        } catch (const std::exception & error) {
            throw engine_error(errc::bad_request,
                               std::string("system_prompt: the chat template refused it: ") + error.what());
        }
    }

    std::vector<llama_token> tokens = common_tokenize(vocab(), text, /*add_special=*/true, /*parse_special=*/true);
    if (tokens.empty() && llama_vocab_bos(vocab()) >= 0) {
        tokens.push_back(llama_vocab_bos(vocab()));
    }
    if (tokens.empty()) {
        throw engine_error(errc::bad_request, "prompt: is empty, and the model has no token to begin with");
    }
    return tokens;
}

std::shared_ptr<const token_table> loaded_model::texts() {
    if (!texts_) {
        texts_ = std::make_shared<token_table>(vocab());
    }
    return texts_;
}

std::string loaded_model::piece(llama_token token) const {
    return common_token_to_piece(vocab(), token, /*special=*/false);
}

}  // namespace ai4all
