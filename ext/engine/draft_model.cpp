#include "draft_model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "common.h"
#include "log_sink.h"
#include "prefix_cache.h"
#include "sampler.h"
#include "slot.h"
#include "text.h"

namespace ai4all {

namespace {

// As upstream has them: vocabularies of one family may be padded differently, and may name their
// first tokens differently.
constexpr int32_t largest_difference = 128;
constexpr int32_t first_compared     = 5;

constexpr size_t smallest_chunk = 16;
// A request is trusted to go on for so long, and for as long as it has gone on already.
constexpr size_t least_ahead = 64;

load_params beside(const load_params & params, const loaded_model & target) {
    load_params result  = params;
    result.path         = params.draft_path;
    result.n_ctx        = target.info().n_ctx;
    result.n_slots      = target.info().n_slots;
    result.n_gpu_layers = params.n_gpu_layers == 0 ? 0 : -1;
    return result;
}

void follow(double & average, double value) {
    average = average > 0.0 ? 0.8 * average + 0.2 * value : value;
}

std::string shown(const llama_vocab * vocab, llama_token token) {
    return "'" + utf8_sanitize(common_token_to_piece(vocab, token, true)) + "'";
}

}  // namespace

std::string vocabulary_mismatch(const llama_vocab * target, const llama_vocab * draft) {
    if (llama_vocab_type(target) != llama_vocab_type(draft)) {
        return "the tokenizers are of different kinds";
    }
    const auto differ = [&](bool target_adds, bool draft_adds, llama_token target_token, llama_token draft_token) {
        return target_adds != draft_adds || (target_adds && target_token != draft_token);
    };
    if (differ(llama_vocab_get_add_bos(target), llama_vocab_get_add_bos(draft), llama_vocab_bos(target),
               llama_vocab_bos(draft))) {
        return "texts begin with different tokens";
    }
    if (differ(llama_vocab_get_add_eos(target), llama_vocab_get_add_eos(draft), llama_vocab_eos(target),
               llama_vocab_eos(draft))) {
        return "texts end with different tokens";
    }
    const int32_t n_target = llama_vocab_n_tokens(target);
    const int32_t n_draft  = llama_vocab_n_tokens(draft);
    if (std::abs(n_target - n_draft) > largest_difference) {
        return "it has " + std::to_string(n_draft) + " tokens, the model " + std::to_string(n_target);
    }
    for (llama_token token = first_compared; token < std::min(n_target, n_draft); ++token) {
        if (std::strcmp(llama_vocab_get_text(target, token), llama_vocab_get_text(draft, token)) != 0) {
            return "token " + std::to_string(token) + " is " + shown(draft, token) + ", and " + shown(target, token) +
                   " in the model";
        }
    }
    return {};
}

draft_model::draft_model(const load_params & params, const loaded_model & target,
                         const std::function<bool(float)> & progress, ggml_abort_callback abort, void * abort_data)
    : model_(beside(params, target), progress, abort, abort_data, &target),
      n_fixed_(std::min<size_t>(params.draft_tokens, longest_draft)),
      n_ctx_(std::min<size_t>(model_.info().n_ctx, model_.info().n_ctx_train)),
      n_vocab_(std::min(model_.info().n_vocab, target.info().n_vocab)),
      held_(target.info().n_slots) {
    if (!llama_model_has_decoder(model_.model())) {
        throw engine_error(errc::load_failed, "it does not generate");
    }
    if (!model_.can_reuse() || !target.can_reuse()) {
        throw engine_error(errc::load_failed, std::string(target.can_reuse() ? "it" : "the model") +
                                                  " has a sliding window or a recurrent state, which has no way back "
                                                  "from a wrong draft");
    }
    const std::string mismatch = vocabulary_mismatch(target.vocab(), model_.vocab());
    if (!mismatch.empty()) {
        throw engine_error(errc::load_failed, "its vocabulary is not the model's: " + mismatch);
    }
    for (const llama_token token : end_tokens(target.vocab())) {
        if (token < n_vocab_) {
            ends_.push_back(token);
        }
    }
    measure();
}

void draft_model::measure() {
    // Without a first figure no draft would ever be tried. The weights are warm already.
    const size_t                   n = std::min<size_t>(smallest_chunk, model_.info().n_ubatch);
    const std::vector<llama_token> tokens(n, std::max(0, llama_vocab_bos(model_.vocab())));
    bool                           done = read(0, tokens.data(), n, true);
    for (int i = 0; i < 3 && done; ++i) {
        done = read(0, tokens.data(), 1, true);
    }
    if (!done) {
        throw engine_error(errc::load_failed, "its first decodes failed");
    }
    if (n < smallest_chunk) {
        prompt_ns_ = token_ns_;
    }
    held_[0].clear();
    llama_memory_clear(model_.memory(), true);
}

std::vector<llama_token> draft_model::draft(slot & place, size_t room, const decode_cost & cost, double budget_ns) {
    const std::vector<llama_token> & tokens = place.tokens;
    // The last token of a draft needs no cell here.
    room = std::min({room, longest_draft, n_ctx_ + 1 - std::min(n_ctx_ + 1, tokens.size())});
    if (is_broken_ || room == 0) {
        return {};
    }
    std::vector<llama_token> & held   = held_[place.seq];
    const size_t               common = std::min(common_prefix(held, tokens), tokens.size() - 1);
    const size_t               behind = tokens.size() - common;
    // Of two vocabularies of one family, the target's may be the longer one.
    if (std::any_of(tokens.end() - static_cast<ptrdiff_t>(behind), tokens.end(),
                    [this](llama_token token) { return token >= n_vocab_; })) {
        return {};
    }
    if (!wants(place, room, behind, cost)) {
        return {};
    }
    held.resize(common);
    llama_memory_seq_rm(model_.memory(), place.seq, static_cast<llama_pos>(common), -1);

    const int64_t begun = now_ns();
    const auto    most  = static_cast<size_t>(budget_ns / prompt_ns_);
    const size_t  chunk = std::min<size_t>(std::max(most, smallest_chunk), model_.info().n_ubatch);
    if (behind > chunk) {
        read(place.seq, tokens.data() + common, chunk, false);
        return {};
    }
    if (!read(place.seq, tokens.data() + common, behind, true)) {
        return {};
    }
    const size_t             limit = n_fixed_ > 0 ? std::min(room, n_fixed_) : room;
    std::vector<llama_token> result;
    while (true) {
        const guess next = likeliest(!place.request.generate.ignore_eos);
        if (next.token < 0 || (n_fixed_ == 0 && !place.odds.take(next.margin))) {
            break;
        }
        result.push_back(next.token);
        if (result.size() == limit || (n_fixed_ == 0 && !place.odds.more()) ||
            static_cast<double>(now_ns() - begun) > budget_ns) {
            break;
        }
        if (!read(place.seq, &next.token, 1, true)) {
            return {};
        }
    }
    if (result.empty() && n_fixed_ == 0) {
        place.odds.learn(0);
    }
    return result;
}

bool draft_model::wants(slot & place, size_t room, size_t n_behind, const decode_cost & cost) const {
    if (n_fixed_ > 0) {
        return true;
    }
    if (!cost.known()) {
        return false;
    }
    draft_price price;
    price.token  = token_ns_ / cost.one_ns();
    price.verify = cost.per_token();
    // Of each draft that was right to its end, one token is read with the next.
    price.behind       = n_behind > 2 ? static_cast<double>(n_behind) * prompt_ns_ / cost.one_ns() : 0.0;
    const auto sampled = static_cast<size_t>(place.n_sampled);
    const auto left    = static_cast<size_t>(place.request.generate.max_tokens) - sampled;
    return place.odds.plan(room, std::min(left, least_ahead + sampled), price);
}

bool draft_model::read(llama_seq_id seq, const llama_token * tokens, size_t n, bool output) {
    std::vector<llama_token> & held  = held_[seq];
    llama_batch &              batch = model_.batch();
    batch.n_tokens                   = static_cast<int32_t>(n);
    for (size_t i = 0; i < n; ++i) {
        batch.token[i]     = tokens[i];
        batch.pos[i]       = static_cast<llama_pos>(held.size() + i);
        batch.n_seq_id[i]  = 1;
        batch.seq_id[i][0] = seq;
        batch.logits[i]    = output && i + 1 == n;
    }
    const int64_t begun  = now_ns();
    const int32_t status = decode(model_.ctx(), batch);
    if (status != 0) {
        llama_memory_seq_rm(model_.memory(), seq, static_cast<llama_pos>(held.size()), -1);
        // 2: broken off, and whoever caused it is dropped before the next step. All else is a fault, of
        // which upstream has logged the reason: the target goes on alone.
        is_broken_ = is_broken_ || status != 2;
        return false;
    }
    llama_synchronize(model_.ctx());
    held.insert(held.end(), tokens, tokens + n);
    const auto ns = static_cast<double>(now_ns() - begun);
    if (n <= 2) {
        follow(token_ns_, ns);
    } else if (n >= smallest_chunk) {
        follow(prompt_ns_, ns / static_cast<double>(n));
    }
    return true;
}

draft_model::guess draft_model::likeliest(bool may_end) {
    float * logits = llama_get_logits_ith(model_.ctx(), -1);
    if (!logits) {
        return {};
    }
    if (!may_end) {
        for (const llama_token token : ends_) {
            logits[token] = -INFINITY;
        }
    }
    guess best;
    best.token = argmax(logits, n_vocab_);
    if (best.token < 0) {
        return best;
    }
    // What ends the text is not worth checking: the row before it says so by itself.
    if (may_end && std::find(ends_.begin(), ends_.end(), best.token) != ends_.end()) {
        return {};
    }
    const float highest       = logits[best.token];
    logits[best.token]        = -INFINITY;
    const llama_token another = argmax(logits, n_vocab_);
    best.margin               = another < 0 ? INFINITY : highest - logits[another];
    return best;
}

}  // namespace ai4all
