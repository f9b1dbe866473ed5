#include "side_job.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "common.h"
#include "log_sink.h"

namespace ai4all {

namespace {

void check_decode(llama_context * ctx, llama_batch batch) {
    const int32_t status = decode(ctx, batch);
    if (status == 2) {
        throw broken_off();
    }
    if (status != 0) {
        throw engine_error(status == -2 ? errc::out_of_memory : errc::compute_failed,
                           "the decode failed with status " + std::to_string(status));
    }
    llama_synchronize(ctx);
}

void add_token(llama_batch & batch, llama_token token, llama_pos pos, llama_seq_id seq, bool output) {
    const int32_t k    = batch.n_tokens++;
    batch.token[k]     = token;
    batch.pos[k]       = pos;
    batch.n_seq_id[k]  = 1;
    batch.seq_id[k][0] = seq;
    batch.logits[k]    = output;
}

const float * row_of(llama_context * ctx, int32_t index) {
    const float * row = llama_get_logits_ith(ctx, index);
    if (!row) {
        throw engine_error(errc::compute_failed, "the decode gave no logits");
    }
    return row;
}

}  // namespace

double log_probability(const float * logits, int32_t n_vocab, llama_token token) noexcept {
    const float largest = *std::max_element(logits, logits + n_vocab);
    double      sum     = 0.0;
    for (int32_t i = 0; i < n_vocab; ++i) {
        sum += std::exp(logits[i] - largest);
    }
    return static_cast<double>(logits[token] - largest) - std::log(sum);
}

// Embeddings.

// Of one command: more would not fit into the frame that tells them to another process.
constexpr size_t most_values = 8u << 20;

embed_job::embed_job(command cmd, loaded_model & model) : side_job(std::move(cmd)), model_(model) {
    size_t longest = 0;
    for (const std::string & text : request.embed.texts) {
        auto tokens = common_tokenize(model.vocab(), text, /*add_special=*/true, /*parse_special=*/false);
        if (tokens.empty()) {
            // An empty text has a row too: that of the token a sequence begins or ends with.
            const llama_token bos = llama_vocab_bos(model.vocab());
            tokens.push_back(bos >= 0 ? bos : std::max(0, llama_vocab_eos(model.vocab())));
        }
        longest = std::max(longest, tokens.size());
        n_prompt += static_cast<int32_t>(tokens.size());
        texts_.push_back(std::move(tokens));
    }
    const auto n_embd = static_cast<size_t>(llama_model_n_embd_out(model.model()));
    if (texts_.size() > most_values / std::max<size_t>(n_embd, 1)) {
        throw engine_error(errc::bad_request, std::to_string(texts_.size()) + " texts have embeddings of " +
                                                  std::to_string(n_embd) + " numbers each, at most " +
                                                  std::to_string(most_values) + " numbers are computed at once");
    }
    ctx_               = model.embedding_context(static_cast<uint32_t>(std::min<size_t>(longest, UINT32_MAX)));
    const size_t limit = llama_n_ubatch(ctx_);
    for (size_t i = 0; i < texts_.size(); ++i) {
        if (texts_[i].size() > limit) {
            throw engine_error(errc::context_overflow, "texts[" + std::to_string(i) + "] has " +
                                                           std::to_string(texts_[i].size()) + " tokens, at most " +
                                                           std::to_string(limit) + " fit");
        }
    }
    rows_.reserve(texts_.size() * n_embd);
}

bool embed_job::advance() {
    llama_batch & batch = model_.side_batch(ctx_);
    batch.n_tokens      = 0;
    size_t  next        = done_;
    int32_t n_seq       = 0;
    for (; next < texts_.size() && n_seq < static_cast<int32_t>(llama_n_seq_max(ctx_)); ++next, ++n_seq) {
        const auto & tokens = texts_[next];
        if (batch.n_tokens + tokens.size() > llama_n_ubatch(ctx_)) {
            break;
        }
        for (size_t i = 0; i < tokens.size(); ++i) {
            add_token(batch, tokens[i], static_cast<llama_pos>(i), n_seq, true);
        }
    }
    llama_memory_clear(llama_get_memory(ctx_), false);
    check_decode(ctx_, batch);

    const int32_t n_embd = llama_model_n_embd_out(model_.model());
    for (int32_t seq = 0; seq < n_seq; ++seq) {
        const float * row = llama_get_embeddings_seq(ctx_, seq);
        if (!row) {
            throw engine_error(errc::compute_failed, "the model gives no embeddings");
        }
        double square = 0.0;
        for (int32_t i = 0; i < n_embd; ++i) {
            square += static_cast<double>(row[i]) * row[i];
        }
        const double scale = request.embed.normalize && square > 0.0 ? 1.0 / std::sqrt(square) : 1.0;
        for (int32_t i = 0; i < n_embd; ++i) {
            rows_.push_back(static_cast<float>(row[i] * scale));
        }
    }
    done_ = next;
    return done_ == texts_.size();
}

void embed_job::report(event & e) {
    e.kind   = event_kind::embedded;
    e.floats = std::move(rows_);
    e.counts = {static_cast<int32_t>(texts_.size()), llama_model_n_embd_out(model_.model())};
}

// Scores.

score_job::score_job(command cmd, loaded_model & model)
    : side_job(std::move(cmd)), model_(model), ctx_(model.scoring_context()) {
    if (!llama_get_memory(ctx_)) {
        throw engine_error(errc::bad_request, "the model has no memory of a sequence: it embeds, and no more");
    }
    prefix_        = model.tokenize(request.generate);
    size_t longest = 0;
    for (size_t i = 0; i < request.score.continuations.size(); ++i) {
        auto tokens = common_tokenize(model.vocab(), request.score.continuations[i], /*add_special=*/false,
                                      /*parse_special=*/false);
        if (tokens.empty()) {
            throw engine_error(errc::bad_request, "continuations[" + std::to_string(i) + "]: has no tokens");
        }
        longest = std::max(longest, tokens.size());
        continuations_.push_back(std::move(tokens));
    }
    const size_t room = std::min<size_t>(llama_n_ctx(ctx_), prefix_.size() + scoring_rows);
    if (prefix_.size() + longest > room) {
        throw engine_error(errc::context_overflow, "the prompt has " + std::to_string(prefix_.size()) +
                                                       " tokens and the longest continuation " +
                                                       std::to_string(longest) + ", together at most " +
                                                       std::to_string(room) + " fit");
    }
    n_prompt = static_cast<int32_t>(prefix_.size());
    scores_.assign(continuations_.size(), 0.0f);
    llama_memory_clear(llama_get_memory(ctx_), false);
}

bool score_job::advance() {
    if (n_past_ < prefix_.size()) {
        advance_prefix();
        return false;
    }
    if (done_ < continuations_.size()) {
        advance_group();
    }
    return done_ == continuations_.size();
}

void score_job::advance_prefix() {
    llama_batch & batch = model_.side_batch(ctx_);
    batch.n_tokens      = 0;
    const size_t n      = std::min<size_t>(prefix_.size() - n_past_, llama_n_ubatch(ctx_));
    for (size_t i = 0; i < n; ++i) {
        const size_t index = n_past_ + i;
        add_token(batch, prefix_[index], static_cast<llama_pos>(index), 0, index + 1 == prefix_.size());
    }
    check_decode(ctx_, batch);
    n_past_ += n;
    if (n_past_ == prefix_.size()) {
        // The prompt's last row scores the first token of every continuation.
        const float * row = row_of(ctx_, batch.n_tokens - 1);
        for (size_t i = 0; i < continuations_.size(); ++i) {
            add_score(i, row, continuations_[i][0]);
        }
    }
}

void score_job::add_score(size_t k, const float * row, llama_token token) {
    const double logprob = log_probability(row, model_.info().n_vocab, token);
    if (std::isnan(logprob)) {
        throw engine_error(errc::compute_failed, "the logits hold no number");
    }
    // What is impossible has a number too: JSON has no infinity.
    scores_[k] = static_cast<float>(std::max<double>(std::numeric_limits<float>::lowest(), scores_[k] + logprob));
}

void score_job::advance_group() {
    // As many continuations as fit in one batch, each a sequence of its own over the same cells.
    llama_batch &  batch = model_.side_batch(ctx_);
    llama_memory_t cells = llama_get_memory(ctx_);
    batch.n_tokens       = 0;
    size_t       next    = done_;
    llama_seq_id seq     = 1;
    for (; next < continuations_.size() && seq < static_cast<llama_seq_id>(llama_n_seq_max(ctx_)); ++next, ++seq) {
        const auto & tokens = continuations_[next];
        const size_t rows   = batch.n_tokens + tokens.size() - 1;
        if (rows > scoring_rows || prefix_.size() + rows > llama_n_ctx(ctx_)) {
            break;
        }
        llama_memory_seq_cp(cells, 0, seq, -1, -1);
        for (size_t i = 0; i + 1 < tokens.size(); ++i) {
            add_token(batch, tokens[i], static_cast<llama_pos>(prefix_.size() + i), seq, true);
        }
    }
    if (batch.n_tokens > 0) {
        check_decode(ctx_, batch);
    }
    int32_t row = 0;
    for (size_t k = done_; k < next; ++k) {
        for (size_t i = 1; i < continuations_[k].size(); ++i, ++row) {
            add_score(k, row_of(ctx_, row), continuations_[k][i]);
        }
    }
    for (llama_seq_id used = 1; used < seq; ++used) {
        llama_memory_seq_rm(cells, used, -1, -1);
    }
    done_ = next;
}

void score_job::report(event & e) {
    e.kind   = event_kind::scored;
    e.floats = std::move(scores_);
    for (const auto & tokens : continuations_) {
        e.counts.push_back(static_cast<int32_t>(tokens.size()));
    }
}

}  // namespace ai4all
