// Speculation by a draft model: a smaller model of the same vocabulary runs ahead, the target checks.
//
// It has a context of its own, with a sequence for each slot of the target. A sequence follows its
// slot only when a draft is worth it, and reads what it has missed in pieces, one a step. Engine
// thread only.

#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine.h"
#include "llama.h"
#include "lookup.h"
#include "model.h"

namespace ai4all {

struct slot;

class draft_model {
  public:
    // Loads `params.draft_path` beside `target`, which lends its threads and must outlive it.
    // Throws engine_error: load_failed (also where the two do not go together), out_of_memory,
    // cancelled.
    draft_model(const load_params & params, const loaded_model & target, const std::function<bool(float)> & progress,
                ggml_abort_callback abort, void * abort_data);

    // What may follow the slot's tokens, at most `room` long, in about `budget_ns` at most. Empty where
    // a draft is not worth it, while earlier tokens are still being read, and when it was broken off.
    std::vector<llama_token> draft(slot & place, size_t room, const decode_cost & cost, double budget_ns);

  private:
    struct guess {
        llama_token token  = -1;  // none: the text ends here, or the logits hold no number
        float       margin = 0.0f;
    };

    void  measure();
    bool  wants(slot & place, size_t room, size_t n_behind, const decode_cost & cost) const;
    bool  read(llama_seq_id seq, const llama_token * tokens, size_t n, bool output);
    guess likeliest(bool may_end);

    loaded_model                          model_;
    size_t                                n_fixed_;  // tokens in each draft; 0: as many as pay
    size_t                                n_ctx_;
    int32_t                               n_vocab_;  // tokens that both models know
    std::vector<llama_token>              ends_;
    std::vector<std::vector<llama_token>> held_;               // what each sequence holds
    double                                token_ns_  = 0.0;    // as measured: a decode of one token
    double                                prompt_ns_ = 0.0;    // and one of many, for each of them
    bool                                  is_broken_ = false;  // a decode failed
};

// Why the draft model's vocabulary does not serve the target; empty: it does.
std::string vocabulary_mismatch(const llama_vocab * target, const llama_vocab * draft);

}  // namespace ai4all
