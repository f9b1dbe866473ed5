// One request's way from logits to a token.

#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "grammar.h"
#include "llama.h"
#include "sampling.h"

namespace ai4all {

class sampler {
  public:
    // `texts` gives the texts of all tokens, where there is a grammar.
    // Throws engine_error(bad_request) for a grammar or schema that cannot be used.
    sampler(const llama_model * model, const generate_params & params, const std::vector<llama_token> & prompt,
            const std::function<std::shared_ptr<const token_table>()> & texts);

    // Sample from row `index` of the last decode and remember the token. May change the row.
    // Throws engine_error: compute_failed when the logits hold no number, bad_request when the
    // grammar allows nothing that the model has, or cannot be followed.
    llama_token sample(llama_context * ctx, int32_t index);

    // Whether it is a plain argmax: no randomness, no penalty, no grammar.
    bool greedy() const noexcept { return !chain_; }

  private:
    llama_token sample_by_grammar(llama_context * ctx, int32_t index, float * logits);

    const llama_vocab *      vocab_;
    std::vector<llama_token> banned_;  // never sampled (ignore_eos), for the greedy path
    common_sampler_ptr       chain_;   // null: greedy
    std::unique_ptr<grammar> grammar_;
};

// Index of the first largest value of `x`, or -1 when none is a number.
int32_t argmax(const float * x, int32_t n) noexcept;

// Make what is no number minus infinity, and infinity the largest number; whether any number is left.
bool make_finite(float * x, int32_t n) noexcept;

// Every token that ends a generation.
std::vector<llama_token> end_tokens(const llama_vocab * vocab);

}  // namespace ai4all
