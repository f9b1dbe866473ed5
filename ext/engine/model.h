// A loaded model with its context, thread pools and chat template. Engine thread only.

#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "chat.h"
#include "engine.h"
#include "grammar.h"
#include "llama.h"

namespace ai4all {

// Rows of logits that a scoring decode asks for at most.
constexpr size_t scoring_rows = 256;

class loaded_model {
  public:
    // `progress` is called with a share in 0..1 and returns false to give up; `abort` is asked
    // by the CPU backend inside a decode whether to break it off. A `lender` lends its threads, and
    // outlives what is loaded beside it.
    // Throws engine_error: load_failed, out_of_memory, cancelled.
    loaded_model(const load_params & params, const std::function<bool(float)> & progress, ggml_abort_callback abort,
                 void * abort_data, const loaded_model * lender = nullptr);
    ~loaded_model();
    loaded_model(const loaded_model &)             = delete;
    loaded_model & operator=(const loaded_model &) = delete;

    const model_info &  info() const noexcept { return info_; }
    llama_model *       model() const noexcept { return model_.get(); }
    llama_context *     ctx() const noexcept { return ctx_.get(); }
    const llama_vocab * vocab() const noexcept { return llama_model_get_vocab(model_.get()); }
    llama_memory_t      memory() const noexcept { return llama_get_memory(ctx_.get()); }
    llama_batch &       batch() noexcept { return batch_; }

    // Contexts for side jobs, made when first asked for. A job has its context to itself.
    // The embedding context takes texts of at least `n_tokens` tokens, or as many as it can.
    // Throws engine_error: out_of_memory, load_failed.
    llama_context * embedding_context(uint32_t n_tokens);
    llama_context * scoring_context();
    llama_batch &   side_batch(llama_context * ctx);

    // Whether a sequence can be cut back to a prefix and go on from there.
    bool can_reuse() const noexcept { return can_reuse_; }

    // The prompt's tokens, rendered by the chat template where the request asks for it.
    // Throws engine_error: bad_request.
    std::vector<llama_token> tokenize(const generate_params & params) const;

    // The token's bytes; control tokens have none.
    std::string piece(llama_token token) const;

    // The texts of all tokens, for grammars; made when first asked for.
    std::shared_ptr<const token_table> texts();

  private:
    struct free_model {
        void operator()(llama_model * model) const { llama_model_free(model); }
    };
    struct free_context {
        void operator()(llama_context * ctx) const { llama_free(ctx); }
    };

    using context_ptr = std::unique_ptr<llama_context, free_context>;

    void        open_context(const load_params & params);
    context_ptr new_context(const llama_context_params & cparams) const;
    void        attach_threadpools(const load_params & params);
    void        warm_up();
    void        describe(const load_params & params);

    std::unique_ptr<llama_model, free_model> model_;
    llama_context_params                     cparams_ = {};
    context_ptr                              ctx_;
    context_ptr                              embedding_;
    context_ptr                              scoring_;
    bool                                     can_reuse_ = false;
    common_chat_templates_ptr                templates_;
    std::shared_ptr<const token_table>       texts_;
    ggml_threadpool_t                        pool_       = nullptr;
    ggml_threadpool_t                        pool_batch_ = nullptr;
    void (*free_pool_)(ggml_threadpool_t)                = nullptr;
    llama_batch batch_                                   = {};
    llama_batch side_batch_                              = {};
    int32_t     side_batch_size_                         = 0;
    model_info  info_;
};

}  // namespace ai4all
