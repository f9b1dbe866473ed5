#include "engine.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <new>
#include <thread>
#include <unordered_map>

#include "log_sink.h"
#include "model.h"
#include "notifier.h"
#include "slot.h"

namespace ai4all {

const char * errc_name(errc code) {
    switch (code) {
        case errc::ok: return "ok";
        case errc::bad_request: return "bad_request";
        case errc::context_overflow: return "context_overflow";
        case errc::out_of_memory: return "out_of_memory";
        case errc::load_failed: return "load_failed";
        case errc::cancelled: return "cancelled";
        case errc::deadline_exceeded: return "deadline_exceeded";
        case errc::compute_failed: return "compute_failed";
        case errc::busy: return "busy";
        case errc::closed: return "closed";
        case errc::not_loaded: return "not_loaded";
        case errc::end: break;
    }
    return "unknown";
}

int64_t now_ns() {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
        .count();
}

struct engine::impl {
    explicit impl(size_t queue_capacity) : capacity(queue_capacity) {}

    // --- any thread -------------------------------------------------------------------------

    uint64_t submit(command cmd);
    void     cancel(uint64_t id) noexcept;

    // --- engine thread only -----------------------------------------------------------------

    void run() noexcept;
    void take_inbox();
    void drop_ended_waiters();
    void drop_ended_slots();
    void admit();
    void place(slot & place, command cmd);
    void do_load(command cmd);
    void do_unload(const command & cmd);
    void step();
    void plan_batch();
    void queue_tokens(slot & place, size_t n);
    void roll_back();
    void advance(slot & place, int64_t now);
    void sample(slot & place);
    void finish(slot & place, stop_reason reason);
    void fail(slot & place, errc code, const std::string & message);
    void fail(const command & cmd, errc code, const std::string & message);
    void end_command(uint64_t id);
    void release(slot & place);
    void fail_everything() noexcept;
    void publish();
    bool any_active() const;

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

    // Engine thread only.
    std::deque<command>           backlog;
    std::vector<slot>             slots;
    std::unique_ptr<loaded_model> model;
    int64_t                       model_ready = 0;
    std::vector<event>            out;
    // What should_abort() looks at while a decode runs.
    std::vector<const std::atomic<bool> *> watched;
    int64_t                                watched_deadline = 0;

    std::mutex  join_mutex;
    std::thread thread;
};

// Any thread.

uint64_t engine::impl::submit(command cmd) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (stopping) {
        throw engine_error(errc::closed, "the engine is closed");
    }
    if (cmd.what == command::verb::generate && !model_due) {
        throw engine_error(errc::not_loaded, "no model is loaded");
    }
    if (n_waiting >= capacity) {
        throw engine_error(errc::busy, "the command queue is full (" + std::to_string(capacity) + ")");
    }
    cmd.id        = ++last_id;
    cmd.submitted = now_ns();
    cmd.cancelled = std::make_shared<std::atomic<bool>>(false);
    if (cmd.what != command::verb::generate) {
        model_due = cmd.what == command::verb::load;
    }
    live.emplace(cmd.id, cmd.cancelled);
    ++n_waiting;
    inbox.push_back(std::move(cmd));
    wake.notify_one();
    return last_id;
}

void engine::impl::cancel(uint64_t id) noexcept {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto                        found = live.find(id);
    if (found != live.end()) {
        found->second->store(true, std::memory_order_relaxed);
    }
}

// Engine thread: the loop.

bool engine::impl::should_abort(void * self) {
    const auto * that = static_cast<impl *>(self);
    if (that->stopping.load(std::memory_order_relaxed)) {
        return true;
    }
    for (const auto * flag : that->watched) {
        if (flag->load(std::memory_order_relaxed)) {
            return true;
        }
    }
    return that->watched_deadline != 0 && now_ns() >= that->watched_deadline;
}

bool engine::impl::any_active() const {
    return std::any_of(slots.begin(), slots.end(), [](const slot & place) { return place.active; });
}

void engine::impl::run() noexcept {
    while (!stopping) {
        {
            std::unique_lock<std::mutex> lock(mutex);
            wake.wait(lock, [this] { return stopping || !inbox.empty() || !backlog.empty() || any_active(); });
        }
        try {
            take_inbox();
            drop_ended_waiters();
            drop_ended_slots();
            admit();
            if (any_active()) {
                step();
            }
        } catch (const std::exception & error) {
            const bool memory = dynamic_cast<const std::bad_alloc *>(&error) != nullptr;
            for (slot & place : slots) {
                if (place.active) {
                    fail(place, memory ? errc::out_of_memory : errc::compute_failed, error.what());
                }
            }
        }
        publish();
    }
    fail_everything();
    publish();
    model.reset();
}

void engine::impl::take_inbox() {
    const std::lock_guard<std::mutex> lock(mutex);
    while (!inbox.empty()) {
        backlog.push_back(std::move(inbox.front()));
        inbox.pop_front();
    }
}

void engine::impl::drop_ended_waiters() {
    const int64_t now = now_ns();
    for (auto it = backlog.begin(); it != backlog.end();) {
        if (it->is_cancelled()) {
            fail(*it, errc::cancelled, "cancelled before it began");
        } else if (it->is_late(now)) {
            fail(*it, errc::deadline_exceeded, "the deadline passed before it began");
        } else {
            ++it;
            continue;
        }
        it = backlog.erase(it);
    }
}

void engine::impl::drop_ended_slots() {
    const int64_t now = now_ns();
    for (slot & place : slots) {
        if (!place.active) {
            continue;
        }
        const auto done = [&place] {
            return std::to_string(place.n_sampled) + " of " + std::to_string(place.request.generate.max_tokens) +
                   " tokens";
        };
        if (place.request.is_cancelled()) {
            fail(place, errc::cancelled, "cancelled after " + done());
        } else if (place.request.is_late(now)) {
            fail(place, errc::deadline_exceeded, "the deadline passed after " + done());
        }
    }
}

void engine::impl::admit() {
    while (!backlog.empty() && !stopping) {
        const bool idle = !any_active();
        if (backlog.front().what != command::verb::generate) {
            // Loads and unloads wait for what runs; what was queued behind them waits for them.
            if (!idle) {
                return;
            }
            command cmd = std::move(backlog.front());
            backlog.pop_front();
            cmd.what == command::verb::load ? do_load(std::move(cmd)) : do_unload(cmd);
            continue;
        }
        if (!model) {
            fail(backlog.front(), errc::not_loaded, "no model is loaded");
            backlog.pop_front();
            continue;
        }
        const auto alone = [](const slot & place) { return place.active && place.request.generate.deterministic; };
        if (std::any_of(slots.begin(), slots.end(), alone) || (backlog.front().generate.deterministic && !idle)) {
            return;
        }
        const auto free = std::find_if(slots.begin(), slots.end(), [](const slot & place) { return !place.active; });
        if (free == slots.end()) {
            return;
        }
        command cmd = std::move(backlog.front());
        backlog.pop_front();
        place(*free, std::move(cmd));
    }
}

void engine::impl::place(slot & place, command cmd) {
    const llama_seq_id seq  = place.seq;
    place                   = slot{};
    place.seq               = seq;
    place.times.submitted   = cmd.submitted;
    place.times.model_ready = std::max(cmd.submitted, model_ready);
    place.times.admitted    = now_ns();
    try {
        if (cmd.generate.ignore_eos && !(cmd.generate.grammar.empty() && cmd.generate.json_schema.empty())) {
            throw engine_error(errc::bad_request, "ignore_eos: a grammar or json_schema must be able to end");
        }
        place.tokens   = model->tokenize(cmd.generate);
        place.n_prompt = place.tokens.size();
        if (place.n_prompt > model->info().n_ctx) {
            throw engine_error(errc::context_overflow, "the prompt has " + std::to_string(place.n_prompt) +
                                                           " tokens, the context " +
                                                           std::to_string(model->info().n_ctx));
        }
        place.sampling = std::make_unique<sampler>(model->model(), cmd.generate, place.tokens);
        place.text     = std::make_unique<text_stream>(cmd.generate.stop);
    } catch (const engine_error & error) {
        fail(cmd, error.code(), error.what());
        return;
    } catch (const std::bad_alloc &) {
        fail(cmd, errc::out_of_memory, "not enough memory for the prompt");
        return;
    } catch (const std::exception & error) {
        fail(cmd, errc::bad_request, error.what());
        return;
    }
    place.tokens.reserve(std::min<size_t>(model->info().n_ctx, place.n_prompt + cmd.generate.max_tokens) + 1);
    place.request = std::move(cmd);
    place.active  = true;
    const std::lock_guard<std::mutex> lock(mutex);
    --n_waiting;
}

void engine::impl::do_load(command cmd) {
    model.reset();
    slots.clear();
    {
        const std::lock_guard<std::mutex> lock(mutex);
        has_model = false;
    }
    float      reported = -1.0f;
    const auto progress = [&](float share) {
        take_inbox();
        drop_ended_waiters();
        if (share - reported >= 0.01f) {
            reported = share;
            event e;
            e.kind     = event_kind::load_progress;
            e.id       = cmd.id;
            e.progress = share;
            out.push_back(std::move(e));
        }
        publish();
        return !stopping && !cmd.is_cancelled();
    };
    try {
        model = std::make_unique<loaded_model>(cmd.load, progress, should_abort, this);
    } catch (const std::exception & error) {
        const auto * known  = dynamic_cast<const engine_error *>(&error);
        const bool   memory = dynamic_cast<const std::bad_alloc *>(&error) != nullptr;
        fail(cmd, known ? known->code() : memory ? errc::out_of_memory : errc::load_failed, error.what());
        const std::lock_guard<std::mutex> lock(mutex);
        // Unless a later load is already queued, nothing will be there to generate with.
        model_due =
            std::any_of(inbox.begin(), inbox.end(), [](const command & c) { return c.what == command::verb::load; }) ||
            std::any_of(backlog.begin(), backlog.end(),
                        [](const command & c) { return c.what == command::verb::load; });
        return;
    }
    slots.resize(model->info().n_slots);
    for (size_t i = 0; i < slots.size(); ++i) {
        slots[i].seq = static_cast<llama_seq_id>(i);
    }
    model_ready = now_ns();
    {
        const std::lock_guard<std::mutex> lock(mutex);
        has_model = true;
        info      = model->info();
    }
    event e;
    e.kind              = event_kind::loaded;
    e.id                = cmd.id;
    e.times.submitted   = cmd.submitted;
    e.times.model_ready = model_ready;
    e.times.finished    = model_ready;
    out.push_back(std::move(e));
    {
        const std::lock_guard<std::mutex> lock(mutex);
        --n_waiting;
    }
    end_command(cmd.id);
}

void engine::impl::do_unload(const command & cmd) {
    model.reset();
    slots.clear();
    {
        const std::lock_guard<std::mutex> lock(mutex);
        has_model = false;
        --n_waiting;
    }
    event e;
    e.kind = event_kind::unloaded;
    e.id   = cmd.id;
    out.push_back(std::move(e));
    end_command(cmd.id);
}

// Engine thread: one decode.

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
    watched.clear();
    watched_deadline = 0;

    // Running sequences first: a prompt never keeps them waiting longer than one chunk.
    size_t n_prompts = 0;
    for (slot & place : slots) {
        place.n_queued = 0;
        place.row      = -1;
        if (place.active && place.pending() == 1) {
            queue_tokens(place, 1);
        } else if (place.active) {
            ++n_prompts;
        }
    }
    // Prompts share the rest of one physical batch evenly, so that a short one is not stuck
    // behind a long one.
    for (slot & place : slots) {
        if (!place.active || place.n_queued > 0) {
            continue;
        }
        const size_t room  = model->info().n_ubatch - std::min<size_t>(model->info().n_ubatch, model->batch().n_tokens);
        const size_t share = (room + n_prompts - 1) / n_prompts;
        --n_prompts;
        const size_t n = std::min(place.pending(), share);
        if (n == 0) {
            continue;
        }
        queue_tokens(place, n);
        const int64_t deadline = place.request.generate.deadline_ns;
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

void engine::impl::step() {
    plan_batch();
    const int32_t status = llama_decode(model->ctx(), model->batch());
    watched.clear();
    if (status == 2) {
        // Broken off by should_abort(); whoever caused it is dropped before the next step.
        roll_back();
        return;
    }
    if (status != 0) {
        const std::string log = log_take_errors();
        for (slot & place : slots) {
            if (place.n_queued > 0) {
                fail(place, status == -2 ? errc::out_of_memory : errc::compute_failed,
                     "the decode failed with status " + std::to_string(status) + (log.empty() ? "" : ": " + log));
            }
        }
        return;
    }
    llama_synchronize(model->ctx());
    const int64_t now = now_ns();
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
    try {
        sample(place);
    } catch (const engine_error & error) {
        fail(place, error.code(), error.what());
    } catch (const std::exception & error) {
        fail(place, errc::compute_failed, error.what());
    }
}

void engine::impl::sample(slot & place) {
    const llama_token token = place.sampling->sample(model->ctx(), place.row);
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

    event e;
    e.kind     = event_kind::token;
    e.id       = place.request.id;
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

// Engine thread: ends.

void engine::impl::finish(slot & place, stop_reason reason) {
    place.times.finished = now_ns();
    event e;
    e.kind         = event_kind::finished;
    e.id           = place.request.id;
    e.reason       = reason;
    e.text         = place.text->flush();
    e.n_prompt     = static_cast<int32_t>(place.n_prompt);
    e.n_tokens     = place.n_sampled;
    e.n_reused     = place.n_reused;
    e.n_neighbours = place.n_neighbours;
    e.times        = place.times;
    out.push_back(std::move(e));
    release(place);
}

void engine::impl::fail(slot & place, errc code, const std::string & message) {
    place.times.finished = now_ns();
    event e;
    e.kind     = event_kind::failed;
    e.id       = place.request.id;
    e.code     = code;
    e.text     = message;
    e.n_prompt = static_cast<int32_t>(place.n_prompt);
    e.n_tokens = place.n_sampled;
    e.times    = place.times;
    out.push_back(std::move(e));
    release(place);
}

void engine::impl::fail(const command & cmd, errc code, const std::string & message) {
    event e;
    e.kind            = event_kind::failed;
    e.id              = cmd.id;
    e.code            = code;
    e.text            = message;
    e.times.submitted = cmd.submitted;
    e.times.finished  = now_ns();
    out.push_back(std::move(e));
    {
        const std::lock_guard<std::mutex> lock(mutex);
        --n_waiting;
    }
    end_command(cmd.id);
}

void engine::impl::release(slot & place) {
    if (model) {
        llama_memory_seq_rm(model->memory(), place.seq, -1, -1);
    }
    place.active   = false;
    place.n_queued = 0;
    place.sampling.reset();
    place.text.reset();
    end_command(place.request.id);
}

void engine::impl::end_command(uint64_t id) {
    const std::lock_guard<std::mutex> lock(mutex);
    live.erase(id);
}

void engine::impl::fail_everything() noexcept {
    try {
        for (slot & place : slots) {
            if (place.active) {
                fail(place, errc::closed, "the engine was closed");
            }
        }
        take_inbox();
        for (const command & cmd : backlog) {
            fail(cmd, errc::closed, "the engine was closed");
        }
        backlog.clear();
        const std::lock_guard<std::mutex> lock(mutex);
        has_model = false;
    } catch (const std::bad_alloc &) {
        // Nothing can be said any more; the reader ends what it waits for when it closes.
    }
}

void engine::impl::publish() {
    if (out.empty()) {
        return;
    }
    bool was_empty = false;
    {
        const std::lock_guard<std::mutex> lock(events_mutex);
        was_empty = events.empty();
        if (was_empty) {
            events.swap(out);
        } else {
            std::move(out.begin(), out.end(), std::back_inserter(events));
        }
    }
    out.clear();
    if (was_empty) {
        wake_reader.signal();
    }
}

// The public face.

engine::engine(size_t queue_capacity) : impl_(std::make_unique<impl>(queue_capacity)) {
    log_install();
    llama_backend_init();
    // Signals belong to the caller's threads; the engine's, and all that it makes, take none.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        impl_->thread = std::thread([this] { impl_->run(); });
    } catch (...) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

engine::~engine() {
    stop();
}

uint64_t engine::load(load_params params) {
    command cmd;
    cmd.what = command::verb::load;
    cmd.load = std::move(params);
    return impl_->submit(std::move(cmd));
}

uint64_t engine::unload() {
    command cmd;
    cmd.what = command::verb::unload;
    return impl_->submit(std::move(cmd));
}

uint64_t engine::generate(generate_params params) {
    command cmd;
    cmd.what     = command::verb::generate;
    cmd.generate = std::move(params);
    return impl_->submit(std::move(cmd));
}

void engine::cancel(uint64_t id) noexcept {
    impl_->cancel(id);
}

int engine::fd() const noexcept {
    return impl_->wake_reader.fd();
}

void engine::drain(std::vector<event> & out) {
    out.clear();
    impl_->wake_reader.clear();
    const std::lock_guard<std::mutex> lock(impl_->events_mutex);
    out.swap(impl_->events);
}

bool engine::has_model() const {
    const std::lock_guard<std::mutex> lock(impl_->mutex);
    return impl_->has_model;
}

model_info engine::model() const {
    const std::lock_guard<std::mutex> lock(impl_->mutex);
    if (!impl_->has_model) {
        throw engine_error(errc::not_loaded, "no model is loaded");
    }
    return impl_->info;
}

void engine::stop() noexcept {
    {
        const std::lock_guard<std::mutex> lock(impl_->mutex);
        impl_->stopping = true;
    }
    impl_->wake.notify_all();
    const std::lock_guard<std::mutex> lock(impl_->join_mutex);
    if (impl_->thread.joinable()) {
        impl_->thread.join();
    }
}

}  // namespace ai4all
