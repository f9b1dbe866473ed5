#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common.h"
#include "json-schema-to-grammar.h"
#include "json.h"

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
    if (!params.json_schema.empty()) {
        try {
            result.grammar = common_grammar(COMMON_GRAMMAR_TYPE_OUTPUT_FORMAT,
                                            json_schema_to_grammar(common_json::parse(params.json_schema)));
        } catch (const std::exception & error) {
            throw engine_error(errc::bad_request, std::string("json_schema: ") + error.what());
        }
    } else if (!params.grammar.empty()) {
        result.grammar = common_grammar(COMMON_GRAMMAR_TYPE_USER, params.grammar);
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

sampler::sampler(const llama_model * model, const generate_params & params, const std::vector<llama_token> & prompt)
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

    common_params_sampling chain = chain_params(model, params);
    try {
        chain_.reset(common_sampler_init(model, chain));
    } catch (const std::exception & error) {
        throw engine_error(errc::bad_request, std::string("grammar: ") + error.what());
    }
    if (!chain_) {
        throw engine_error(errc::bad_request, "grammar: not valid GBNF");
    }
    // The penalty sees the end of the prompt too; only the window matters.
    const size_t from = prompt.size() - std::min<size_t>(prompt.size(), penalty_window);
    for (size_t i = from; i < prompt.size(); ++i) {
        common_sampler_accept(chain_.get(), prompt[i], false);
    }
}

llama_token sampler::sample(llama_context * ctx, int32_t index) {
    if (chain_) {
        const llama_token token = common_sampler_sample(chain_.get(), ctx, index);
        common_sampler_accept(chain_.get(), token, true);
        return token;
    }

    float * logits = llama_get_logits_ith(ctx, index);
    if (!logits) {
        throw engine_error(errc::compute_failed, "the decode gave no logits");
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
