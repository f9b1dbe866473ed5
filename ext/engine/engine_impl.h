// The engine's inside, shared by the files that implement it. See engine.h for the contract.

#pragma once

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "draft_model.h"
#include "engine.h"
#include "model.h"
#include "notifier.h"
#include "prefix_cache.h"
#include "side_job.h"
#include "slot.h"

namespace ai4all {

struct engine::impl {
    explicit impl(size_t queue_capacity) : capacity(queue_capacity) {}

    // --- any thread -------------------------------------------------------------------------

    uint64_t submit(command cmd);
    void     cancel(uint64_t id) noexcept;

    static int start_deep(pthread_t & thread, impl & self);

    // --- engine thread only -----------------------------------------------------------------

    void                       run() noexcept;
    void                       take_inbox();
    void                       drop_ended_waiters();
    void                       drop_ended_slots();
    void                       admit();
    void                       start(command cmd);
    void                       do_load(command cmd);
    void                       load_models(const load_params & params, const std::function<bool(float)> & progress);
    void                       do_unload(const command & cmd);
    void                       start_job(command cmd);
    void                       advance_job();
    void                       end_job(errc code, const std::string & message);
    void                       drop_model();
    slot *                     free_slot(const std::vector<llama_token> & prompt, const generate_params & params);
    void                       prepare_cache(slot & place);
    void                       step();
    int32_t                    decode_batch();
    void                       plan_batch();
    void                       plan_draft(slot & place);
    void                       queue_tokens(slot & place, size_t n);
    void                       roll_back();
    void                       advance(slot & place, int64_t now);
    void                       sample(slot & place, int32_t row);
    std::vector<token_logprob> describe_token(llama_token token, int32_t n_likeliest) const;
    void                       finish(slot & place, stop_reason reason);
    void                       fail(slot & place, errc code, const std::string & message);
    void                       fail(const command & cmd, errc code, const std::string & message);
    void                       end_command(uint64_t id);
    void                       release(slot & place);
    void                       fail_everything() noexcept;
    void                       publish();
    void                       publish_tagged();
    bool                       any_active() const;

    static bool should_abort(void * self);

    const size_t capacity;
    notifier     wake_reader;

    std::mutex                                                       mutex;  // of what follows
    std::condition_variable                                          wake;
    std::deque<command>                                              inbox;
    std::unordered_map<uint64_t, std::shared_ptr<std::atomic<bool>>> live;
    uint64_t                                                         last_id   = 0;
    size_t                                                           n_waiting = 0;
    bool                                                             model_due = false;  // loaded, or a load is queued
    bool                                                             has_model = false;
    model_info                                                       info;

    std::atomic<bool> stopping{false};

    std::mutex         events_mutex;
    std::vector<event> events;

    std::mutex   sink_mutex;  // held while it takes events
    event_sink * sink = nullptr;

    // Engine thread only.
    std::deque<command>           backlog;
    std::vector<slot>             slots;
    std::unique_ptr<loaded_model> model;
    std::unique_ptr<draft_model>  draft;  // or none
    int64_t                       model_ready = 0;
    std::unique_ptr<side_job>     job;  // at most one; it takes turns with the slots
    prefix_cache                  prefixes{0};
    double                        prompt_ns_per_token = 0.0;  // as measured, for the size of chunks
    int64_t                       last_published      = 0;
    decode_cost                   cost;
    std::vector<float>            logits;  // the row that was sampled from, where it is asked for
    std::vector<event>            out;
    std::vector<event>            tagged;  // out of `out`
    // What should_abort() looks at while a decode runs.
    void unwatch() noexcept;

    std::vector<const std::atomic<bool> *> watched;
    int64_t                                watched_deadline = 0;

    std::mutex join_mutex;
    pthread_t  thread{};
    bool       has_thread = false;
};

}  // namespace ai4all
