#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common.h"
#include "json_schema.h"

namespace ai4all {

namespace {

// Tokens that the repetition penalty looks back on.
constexpr int32_t penalty_window = 64;

common_params_sampling chain_params(const llama_model * model, const generate_params & params) {
    const llama_vocab * vocab = llama_model_get_vocab(model);

    common_params_sampling result;
    result.seed           = params.seed;
    result.n_prev         = penalty_window;
    result.penalty_last_n = penalty_window;
    result.penalty_repeat = params.repetition_penalty;
    result.top_k          = params.top_k;
    result.top_p          = params.top_p;
    result.min_p          = params.min_p;
    result.temp           = params.temperature;
    result.no_perf        = true;
    result.samplers       = {COMMON_SAMPLER_TYPE_PENALTIES, COMMON_SAMPLER_TYPE_TOP_K, COMMON_SAMPLER_TYPE_TOP_P,
                             COMMON_SAMPLER_TYPE_MIN_P, COMMON_SAMPLER_TYPE_TEMPERATURE};
    result.ignore_eos     = params.ignore_eos;
    if (params.ignore_eos) {
        for (const llama_token token : end_tokens(vocab)) {
            result.logit_bias.push_back({token, -INFINITY});
        }
    }
    return result;
}

}  // namespace

std::vector<llama_token> end_tokens(const llama_vocab * vocab) {
    std::vector<llama_token> tokens;
    const int32_t            n = llama_vocab_n_tokens(vocab);
    for (llama_token token = 0; token < n; ++token) {
        if (llama_vocab_is_eog(vocab, token)) {
            tokens.push_back(token);
        }
    }
    return tokens;
}

int32_t argmax(const float * x, int32_t n) noexcept {
    // Two passes that the compiler turns into vector code: the largest value over independent
    // lanes, then its first place. NaN never compares greater, so it is never chosen.
    constexpr int32_t lanes = 32;
    float             best[lanes];
    std::fill(best, best + lanes, -std::numeric_limits<float>::infinity());
    int32_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (int32_t k = 0; k < lanes; ++k) {
            best[k] = x[i + k] > best[k] ? x[i + k] : best[k];
        }
    }
    for (; i < n; ++i) {
        best[0] = x[i] > best[0] ? x[i] : best[0];
    }
    const float largest = *std::max_element(best, best + lanes);
    if (largest == -std::numeric_limits<float>::infinity()) {
        return -1;
    }
    return static_cast<int32_t>(std::find(x, x + n, largest) - x);
}

bool make_finite(float * x, int32_t n) noexcept {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    constexpr float most     = std::numeric_limits<float>::max();
    int32_t         any      = 0;
    for (int32_t i = 0; i < n; ++i) {
        // Sorting and sums of exponentials mean nothing where one of these is among them.
        const float value = x[i] == x[i] ? (x[i] < most ? x[i] : most) : -infinity;
        x[i]              = value;
        any |= static_cast<int32_t>(value > -infinity);
    }
    return any != 0;
}

sampler::sampler(const llama_model * model, const generate_params & params, const std::vector<llama_token> & prompt,
                 const std::function<std::shared_ptr<const token_table>()> & texts)
    : vocab_(llama_model_get_vocab(model)) {
    const bool plain = params.temperature <= 0.0f && params.repetition_penalty == 1.0f && params.grammar.empty() &&
                       params.json_schema.empty();
    if (plain) {
        int32_t             n_suppressed = 0;
        const llama_token * suppressed   = llama_vocab_get_suppress_tokens(vocab_, &n_suppressed);
        banned_.assign(suppressed, suppressed + n_suppressed);
        if (params.ignore_eos) {
            const auto ends = end_tokens(vocab_);
            banned_.insert(banned_.end(), ends.begin(), ends.end());
        }
        return;
    }

    if (!params.json_schema.empty()) {
        const std::string rules = grammar_of_schema(params.json_schema);
        try {
            grammar_ = std::make_unique<grammar>(rules, vocab_, texts());
        } catch (const engine_error & error) {
            throw engine_error(error.code(), std::string("json_schema: as a ") + error.what());
        }
    } else if (!params.grammar.empty()) {
        grammar_ = std::make_unique<grammar>(params.grammar, vocab_, texts());
    }
    common_params_sampling chain = chain_params(model, params);
    chain_.reset(common_sampler_init(model, chain));
    if (!chain_) {
        throw engine_error(errc::bad_request, "the sampling parameters cannot be used");
    }
    // The penalty sees the end of the prompt too; only the window matters.
    const size_t from = prompt.size() - std::min<size_t>(prompt.size(), penalty_window);
    for (size_t i = from; i < prompt.size(); ++i) {
        common_sampler_accept(chain_.get(), prompt[i], false);
    }
}

// Most tokens that are sampled fit by themselves. Only where one does not are all of them looked at,
// and one is sampled again out of those that do.
llama_token sampler::sample_by_grammar(llama_context * ctx, int32_t index, float * logits) {
    llama_token token = common_sampler_sample(chain_.get(), ctx, index);
    if (!grammar_->allows(token)) {
        if (grammar_->mask(logits) == 0) {
            throw engine_error(errc::bad_request, "grammar: no token of the model goes on from here");
        }
        token = common_sampler_sample(chain_.get(), ctx, index);
    }
    grammar_->accept(token);
    return token;
}

llama_token sampler::sample(llama_context * ctx, int32_t index) {
    float * logits = llama_get_logits_ith(ctx, index);
    if (!logits) {
        throw engine_error(errc::compute_failed, "the decode gave no logits");
    }
    if (chain_) {
        if (!make_finite(logits, llama_vocab_n_tokens(vocab_))) {
            throw engine_error(errc::compute_failed, "the logits hold no number");
        }
        const llama_token token =
            grammar_ ? sample_by_grammar(ctx, index, logits) : common_sampler_sample(chain_.get(), ctx, index);
        common_sampler_accept(chain_.get(), token, true);
        return token;
    }

    for (const llama_token token : banned_) {
        logits[token] = -INFINITY;
    }
    const int32_t token = argmax(logits, llama_vocab_n_tokens(vocab_));
    if (token < 0) {
        throw engine_error(errc::compute_failed, "the logits hold no number");
    }
    return token;
}

}  // namespace ai4all
