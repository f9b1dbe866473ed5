// One place in the engine: a sequence of the context and the request that has it.

#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "draft_odds.h"
#include "engine.h"
#include "llama.h"
#include "lookup.h"
#include "sampler.h"
#include "text.h"

namespace ai4all {

// What a caller asked for, on its way through the queue.
struct command {
    enum class verb { load, unload, generate, embed, score };

    verb                               what      = verb::generate;
    uint64_t                           id        = 0;
    uint64_t                           tag       = 0;
    int64_t                            submitted = 0;
    load_params                        load;
    generate_params                    generate;  // score: its prompt
    embed_params                       embed;
    score_params                       score;
    int64_t                            deadline_ns = 0;
    std::shared_ptr<std::atomic<bool>> cancelled;  // shared with engine::cancel()

    bool is_cancelled() const noexcept { return cancelled->load(std::memory_order_relaxed); }
    bool is_late(int64_t now) const noexcept { return deadline_ns != 0 && now >= deadline_ns; }
};

// `tokens` is the prompt and all that was sampled; the first `n_past` of them are in the cache.
// Whatever is not yet there is pending: a prompt chunk, one sampled token, or, after a decode
// that was broken off, what has to be computed again. So there is one way to make progress.
struct slot {
    llama_seq_id                 seq    = 0;
    bool                         active = false;
    command                      request;
    std::vector<llama_token>     tokens;
    size_t                       n_prompt     = 0;
    size_t                       n_past       = 0;
    size_t                       n_queued     = 0;   // tokens in the batch being decoded
    int32_t                      row          = -1;  // batch index of the (first) row to sample from
    int32_t                      n_sampled    = 0;
    int32_t                      n_reused     = 0;
    int32_t                      n_neighbours = 0;
    timeline                     times;
    std::unique_ptr<sampler>     sampling;
    lookup_drafter               drafter;
    draft_odds                   odds;
    std::vector<llama_token>     drafted;                // in the batch behind the pending token, not in `tokens`
    bool                         by_model      = false;  // the draft model made it
    int32_t                      n_drafted     = 0;
    int32_t                      n_draft_right = 0;
    int32_t                      n_by_model    = 0;
    std::unique_ptr<text_stream> text;

    std::vector<llama_token> cached;  // free: what the sequence still holds
    int64_t                  last_used = 0;

    size_t pending() const noexcept { return tokens.size() - n_past; }
    bool   in_prompt() const noexcept { return n_past < n_prompt; }
};

}  // namespace ai4all
