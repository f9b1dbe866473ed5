// Engine thread: one decode over all slots, from the plan of the batch to the sampled tokens.

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu_layouts.h"
#include "engine_impl.h"
#include "log_sink.h"

namespace ai4all {

namespace {

// While sequences run, a prompt chunk may hold up their next token for about this long.
constexpr double chunk_target_ns = 60e6;
constexpr size_t smallest_chunk  = 16;
}  // namespace

void engine::impl::queue_tokens(slot & place, size_t n) {
    llama_batch & batch = model->batch();
    for (size_t i = 0; i < n; ++i) {
        const int32_t k     = batch.n_tokens++;
        const size_t  index = place.n_past + i;
        batch.token[k]      = place.tokens[index];
        batch.pos[k]        = static_cast<llama_pos>(index);
        batch.n_seq_id[k]   = 1;
        batch.seq_id[k][0]  = place.seq;
        // Only the row that will be sampled from needs logits.
        batch.logits[k] = index + 1 == place.tokens.size();
        place.row       = batch.logits[k] ? k : -1;
    }
    place.n_queued = n;
    watched.push_back(place.request.cancelled.get());
}

void engine::impl::plan_batch() {
    model->batch().n_tokens = 0;
    unwatch();

    // Running sequences first: a prompt never keeps them waiting longer than one chunk.
    size_t n_prompts = 0;
    for (slot & place : slots) {
        place.n_queued = 0;
        place.row      = -1;
        place.drafted.clear();
        if (place.active && place.pending() == 1) {
            queue_tokens(place, 1);
        } else if (place.active) {
            ++n_prompts;
        }
    }
    // A draft rides along where nobody else would wait for it.
    if (n_prompts == 0 && watched.size() == 1) {
        for (slot & place : slots) {
            if (place.n_queued > 0) {
                plan_draft(place);
            }
        }
    }
    // Prompts share the rest of one physical batch evenly, so that a short one is not stuck
    // behind a long one.
    size_t limit = model->info().n_ubatch;
    if (model->batch().n_tokens > 0 && prompt_ns_per_token > 0.0) {
        const auto affordable = static_cast<size_t>(chunk_target_ns / prompt_ns_per_token);
        limit                 = std::min(limit, model->batch().n_tokens + std::max(affordable, smallest_chunk));
    }
    for (slot & place : slots) {
        if (!place.active || place.n_queued > 0) {
            continue;
        }
        const size_t room  = limit - std::min<size_t>(limit, model->batch().n_tokens);
        const size_t share = (room + n_prompts - 1) / n_prompts;
        --n_prompts;
        const size_t n = std::min(place.pending(), share);
        if (n == 0) {
            continue;
        }
        queue_tokens(place, n);
        const int64_t deadline = place.request.deadline_ns;
        if (deadline != 0 && (watched_deadline == 0 || deadline < watched_deadline)) {
            watched_deadline = deadline;
        }
    }
    for (slot & place : slots) {
        if (place.n_queued > 0) {
            place.n_neighbours = std::max(place.n_neighbours, static_cast<int32_t>(watched.size()) - 1);
        }
    }
}

void engine::impl::plan_draft(slot & place) {
    const generate_params & params = place.request.generate;
    if (!params.speculate || params.deterministic || !model->can_reuse() || place.in_prompt()) {
        return;
    }
    const size_t left =
        std::min<size_t>(params.max_tokens - place.n_sampled, model->info().n_ctx + 1 - place.tokens.size());
    // A draft that is verified in another order of sums could end in another text.
    const auto   batched = static_cast<size_t>(model->batch().n_tokens);
    const size_t free    = llama_n_batch(model->ctx()) - std::min<size_t>(llama_n_batch(model->ctx()), batched);
    const size_t room = std::min({left > 0 ? left - 1 : 0, static_cast<size_t>(model->info().n_exact_batch - 1), free});
    place.drafted     = place.drafter.draft(place.tokens, room, cost);
    place.by_model    = false;
    if (draft && (place.drafted.empty() || !place.drafter.is_quotation())) {
        std::vector<llama_token> ahead = draft->draft(place, room, cost, chunk_target_ns);
        if (!ahead.empty()) {
            place.drafted  = std::move(ahead);
            place.by_model = true;
            place.n_by_model += static_cast<int32_t>(place.drafted.size());
        }
    }

    llama_batch & batch = model->batch();
    for (size_t i = 0; i < place.drafted.size(); ++i) {
        const int32_t k    = batch.n_tokens++;
        batch.token[k]     = place.drafted[i];
        batch.pos[k]       = static_cast<llama_pos>(place.tokens.size() + i);
        batch.n_seq_id[k]  = 1;
        batch.seq_id[k][0] = place.seq;
        batch.logits[k]    = true;
    }
    place.n_drafted += static_cast<int32_t>(place.drafted.size());
}

void engine::impl::roll_back() {
    for (slot & place : slots) {
        if (place.n_queued == 0) {
            continue;
        }
        if (!llama_memory_seq_rm(model->memory(), place.seq, static_cast<llama_pos>(place.n_past), -1)) {
            // A recurrent state has no way back but the beginning.
            llama_memory_seq_rm(model->memory(), place.seq, -1, -1);
            place.n_past = 0;
        }
    }
}

int32_t engine::impl::decode_batch() {
    const bool is_draft =
        std::any_of(slots.begin(), slots.end(), [](const slot & place) { return !place.drafted.empty(); });
    if (!is_draft) {
        return decode(model->ctx(), model->batch());
    }
    // What a draft is held against is what the plain decode would say, by as many threads.
    const draft_verification as_single_tokens;
    const model_info &       info = model->info();
    llama_set_n_threads(model->ctx(), info.n_threads, info.n_threads);
    const int32_t status = decode(model->ctx(), model->batch());
    llama_set_n_threads(model->ctx(), info.n_threads, info.n_threads_batch);
    return status;
}

void engine::impl::step() {
    plan_batch();
    const size_t  n_watched = watched.size();
    const int64_t begun     = now_ns();
    const int32_t status    = decode_batch();
    unwatch();
    if (status == 2) {
        // Broken off by should_abort(); whoever caused it is dropped before the next step.
        roll_back();
        return;
    }
    if (status != 0) {
        const std::string log = log_take_errors();
        for (slot & place : slots) {
            if (place.n_queued > 0) {
                // What the cache holds now is not known.
                llama_memory_seq_rm(model->memory(), place.seq, -1, -1);
                place.n_past = 0;
                fail(place, status == -2 ? errc::out_of_memory : errc::compute_failed,
                     "the decode failed with status " + std::to_string(status) + (log.empty() ? "" : ": " + log));
            }
        }
        return;
    }
    llama_synchronize(model->ctx());
    const int64_t now = now_ns();
    const auto alone  = std::find_if(slots.begin(), slots.end(), [](const slot & place) { return place.n_queued > 0; });
    if (n_watched == 1 && alone->n_queued == 1) {
        cost.learn(static_cast<size_t>(model->batch().n_tokens), now - begun);
    }
    if (model->batch().n_tokens >= static_cast<int32_t>(smallest_chunk) * 2) {
        // Running sequences are a small part of such a batch; its time is that of its prompts.
        const double ns     = static_cast<double>(now - begun) / model->batch().n_tokens;
        prompt_ns_per_token = prompt_ns_per_token > 0.0 ? 0.7 * prompt_ns_per_token + 0.3 * ns : ns;
    }
    for (slot & place : slots) {
        if (place.n_queued > 0) {
            advance(place, now);
        }
    }
}

void engine::impl::advance(slot & place, int64_t now) {
    const bool was_prompt = place.in_prompt();
    place.n_past += place.n_queued;
    if (was_prompt) {
        event e;
        e.kind          = event_kind::prompt_progress;
        e.id            = place.request.id;
        e.tag           = place.request.tag;
        e.n_prompt_done = static_cast<int32_t>(std::min(place.n_past, place.n_prompt));
        e.n_prompt      = static_cast<int32_t>(place.n_prompt);
        out.push_back(std::move(e));
        if (place.n_past >= place.n_prompt && place.times.prompt_done == 0) {
            place.times.prompt_done = now;
        }
    }
    if (place.row < 0) {
        return;
    }
    const llama_seq_id seq   = place.seq;
    size_t             right = 0;
    try {
        sample(place, place.row);
        // Each drafted token that was sampled too is in the cache already, and so is the row that
        // comes after it.
        while (place.active && right < place.drafted.size() && place.tokens.back() == place.drafted[right]) {
            ++place.n_past;
            ++right;
            ++place.n_draft_right;
            sample(place, place.row + static_cast<int32_t>(right));
        }
    } catch (const engine_error & error) {
        fail(place, error.code(), error.what());
    } catch (const std::exception & error) {
        fail(place, errc::compute_failed, error.what());
    }
    if (!place.drafted.empty()) {
        place.by_model ? place.odds.learn(right) : place.drafter.learn(place.drafted.size(), right);
        if (right < place.drafted.size()) {
            llama_memory_seq_rm(model->memory(), seq, static_cast<llama_pos>(place.n_past), -1);
        }
    }
}

void engine::impl::sample(slot & place, int32_t row_index) {
    event e;
    e.kind = event_kind::token;
    e.id   = place.request.id;
    e.tag  = place.request.tag;
    if (place.request.generate.logprobs >= 0) {
        // Copied first: sampling may change the row.
        const float * row = llama_get_logits_ith(model->ctx(), row_index);
        logits.assign(row, row + (row ? model->info().n_vocab : 0));
    }
    const llama_token token = place.sampling->sample(model->ctx(), row_index);
    place.times.last_token  = now_ns();
    if (place.times.first_token == 0) {
        place.times.first_token = place.times.last_token;
    }
    if (!place.request.generate.ignore_eos && llama_vocab_is_eog(model->vocab(), token)) {
        finish(place, stop_reason::stop);
        return;
    }
    place.tokens.push_back(token);
    ++place.n_sampled;

    if (place.request.generate.logprobs >= 0) {
        e.logprobs = describe_token(token, place.request.generate.logprobs);
    }
    e.token    = token;
    e.n_tokens = place.n_sampled;
    e.text     = place.text->push(model->piece(token));
    out.push_back(std::move(e));

    if (place.text->stopped()) {
        finish(place, stop_reason::stop);
    } else if (place.n_sampled >= place.request.generate.max_tokens || place.tokens.size() > model->info().n_ctx) {
        finish(place, stop_reason::length);
    }
}

std::vector<token_logprob> engine::impl::describe_token(llama_token token, int32_t n_likeliest) const {
    const auto    n_vocab = static_cast<int32_t>(logits.size());
    const float * row     = logits.data();
    const double  best    = *std::max_element(row, row + n_vocab);
    double        sum     = 0.0;
    for (int32_t i = 0; i < n_vocab; ++i) {
        sum += std::exp(row[i] - best);
    }
    const double norm = best + std::log(sum);

    std::vector<llama_token> order(n_vocab);
    std::iota(order.begin(), order.end(), 0);
    const auto n = std::clamp(n_likeliest, 0, n_vocab);
    std::partial_sort(order.begin(), order.begin() + n, order.end(),
                      [row](llama_token a, llama_token b) { return row[a] > row[b]; });
    order.resize(n);
    order.insert(order.begin(), token);

    std::vector<token_logprob> result;
    for (const llama_token id : order) {
        // One that is impossible has a number too: JSON has no infinity.
        const double logprob = std::max<double>(std::numeric_limits<float>::lowest(), row[id] - norm);
        result.push_back({id, static_cast<float>(logprob), utf8_sanitize(model->piece(id))});
    }
    return result;
}

}  // namespace ai4all
