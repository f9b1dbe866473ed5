// One request's way from logits to a token.

#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "llama.h"
#include "sampling.h"

namespace ai4all {

class sampler {
  public:
    // Throws engine_error(bad_request) for a grammar or schema that cannot be used.
    sampler(const llama_model * model, const generate_params & params, const std::vector<llama_token> & prompt);

    // Sample from row `index` of the last decode and remember the token.
    // Throws engine_error(compute_failed) when the logits hold no number.
    llama_token sample(llama_context * ctx, int32_t index);

    // Whether it is a plain argmax: no randomness, no penalty, no grammar.
    bool greedy() const noexcept { return !chain_; }

  private:
    const llama_vocab *      vocab_;
    std::vector<llama_token> banned_;  // never sampled (ignore_eos), for the greedy path
    common_sampler_ptr       chain_;   // null: greedy
};

// Index of the first largest value of `x`, or -1 when none is a number.
int32_t argmax(const float * x, int32_t n) noexcept;

// Every token that ends a generation.
std::vector<llama_token> end_tokens(const llama_vocab * vocab);

}  // namespace ai4all
