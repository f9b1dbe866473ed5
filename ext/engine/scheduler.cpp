// Engine thread: what runs next. Commands are admitted in order; slots and a side job take turns.

#include <algorithm>
#include <filesystem>
#include <iterator>
#include <new>
#include <system_error>

#include "engine_impl.h"

namespace ai4all {

namespace {

// A shorter common prefix is not worth results that depend on what ran before.
constexpr size_t shortest_reuse = 32;
// Shorter prompts are computed again sooner than they are copied out and in.
constexpr size_t shortest_keep = 128;
// A reader sees tokens at least this often, or one decode step apart where that is longer.
constexpr int64_t publish_interval_ns = 20'000'000;

std::atomic<uint64_t> pulses{0};

}  // namespace

uint64_t pulse() noexcept {
    return pulses.load(std::memory_order_relaxed);
}

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
    if (that->watched_deadline != 0 && now_ns() >= that->watched_deadline) {
        return true;
    }
    pulses.fetch_add(1, std::memory_order_relaxed);
    return false;
}

// After each decode, however it ended: the next one may be another's.
void engine::impl::unwatch() noexcept {
    watched.clear();
    watched_deadline = 0;
}

bool engine::impl::any_active() const {
    return std::any_of(slots.begin(), slots.end(), [](const slot & place) { return place.active; });
}

void engine::impl::run() noexcept {
    while (!stopping) {
        {
            std::unique_lock<std::mutex> lock(mutex);
            wake.wait(lock, [this] { return stopping || !inbox.empty() || !backlog.empty() || job || any_active(); });
        }
        try {
            take_inbox();
            drop_ended_waiters();
            drop_ended_slots();
            admit();
            if (any_active()) {
                step();
            }
            if (job) {
                advance_job();
            }
        } catch (const std::exception & error) {
            const bool memory = dynamic_cast<const std::bad_alloc *>(&error) != nullptr;
            for (slot & place : slots) {
                if (place.active) {
                    place.n_past = 0;
                    fail(place, memory ? errc::out_of_memory : errc::compute_failed, error.what());
                }
            }
        }
        publish();
    }
    fail_everything();
    publish();
    drop_model();
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
        const bool          idle = !any_active() && !job;
        const command::verb what = backlog.front().what;
        if (what == command::verb::load || what == command::verb::unload) {
            // Loads and unloads wait for what runs; what was queued behind them waits for them.
            if (!idle) {
                return;
            }
            command cmd = std::move(backlog.front());
            backlog.pop_front();
            what == command::verb::load ? do_load(std::move(cmd)) : do_unload(cmd);
            continue;
        }
        if (!model) {
            fail(backlog.front(), errc::not_loaded, "no model is loaded");
            backlog.pop_front();
            continue;
        }
        const auto alone = [](const slot & place) { return place.active && place.request.generate.deterministic; };
        if (std::any_of(slots.begin(), slots.end(), alone)) {
            return;
        }
        if (what != command::verb::generate) {
            if (job) {
                return;
            }
            command cmd = std::move(backlog.front());
            backlog.pop_front();
            start_job(std::move(cmd));
            continue;
        }
        if (backlog.front().generate.deterministic && !idle) {
            return;
        }
        const auto free = [](const slot & place) { return !place.active; };
        if (std::none_of(slots.begin(), slots.end(), free)) {
            return;
        }
        command cmd = std::move(backlog.front());
        backlog.pop_front();
        start(std::move(cmd));
    }
}

slot * engine::impl::free_slot(const std::vector<llama_token> & prompt, const generate_params & params) {
    // The one that holds most of the prompt already; else the one unused for longest.
    slot * best   = nullptr;
    size_t common = 0;
    for (slot & place : slots) {
        if (place.active) {
            continue;
        }
        const size_t n = params.reuse_prefix && !params.deterministic ? common_prefix(place.cached, prompt) : 0;
        if (!best || n > common || (n == common && place.last_used < best->last_used)) {
            best   = &place;
            common = n;
        }
    }
    return best;
}

void engine::impl::prepare_cache(slot & place) {
    const generate_params & params = place.request.generate;
    const bool              reuse  = params.reuse_prefix && !params.deterministic && model->can_reuse();
    llama_memory_t          memory = model->memory();

    size_t common = reuse ? common_prefix(place.cached, place.tokens) : 0;
    if (reuse && prefixes.longest(place.tokens) > common + shortest_reuse) {
        llama_memory_seq_rm(memory, place.seq, -1, -1);
        place.cached = prefixes.restore(model->ctx(), place.seq, place.tokens);
        common       = common_prefix(place.cached, place.tokens);
    } else if (model->can_reuse() && !params.deterministic && place.cached.size() >= shortest_keep &&
               common < place.cached.size() / 2) {
        prefixes.keep(model->ctx(), place.seq, place.cached);
    }
    // The last token is always computed: it gives the first logits.
    common = std::min(common, place.n_prompt - 1);
    if (common < shortest_reuse || !llama_memory_seq_rm(memory, place.seq, static_cast<llama_pos>(common), -1)) {
        llama_memory_seq_rm(memory, place.seq, -1, -1);
        common = 0;
    }
    place.cached.clear();
    place.n_past   = common;
    place.n_reused = static_cast<int32_t>(common);
}

void engine::impl::start(command cmd) {
    const int64_t            admitted = now_ns();
    std::vector<llama_token> tokens;
    std::unique_ptr<sampler> sampling;
    try {
        if (cmd.generate.ignore_eos && !(cmd.generate.grammar.empty() && cmd.generate.json_schema.empty())) {
            throw engine_error(errc::bad_request, "ignore_eos: a grammar or json_schema must be able to end");
        }
        if (!model->memory()) {
            throw engine_error(errc::bad_request, "the model has no memory of a sequence: it embeds, and no more");
        }
        tokens = model->tokenize(cmd.generate);
        if (tokens.size() > model->info().n_ctx) {
            throw engine_error(errc::context_overflow, "the prompt has " + std::to_string(tokens.size()) +
                                                           " tokens, the context " +
                                                           std::to_string(model->info().n_ctx));
        }
        sampling = std::make_unique<sampler>(model->model(), cmd.generate, tokens, [this] { return model->texts(); });
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

    slot * found = free_slot(tokens, cmd.generate);
    slot   fresh;
    fresh.seq                = found->seq;
    fresh.cached             = std::move(found->cached);
    *found                   = std::move(fresh);
    found->times.submitted   = cmd.submitted;
    found->times.model_ready = std::max(cmd.submitted, model_ready);
    found->times.admitted    = admitted;
    found->n_prompt          = tokens.size();
    found->tokens            = std::move(tokens);
    found->sampling          = std::move(sampling);
    found->text              = std::make_unique<text_stream>(cmd.generate.stop);
    found->tokens.reserve(std::min<size_t>(model->info().n_ctx, found->n_prompt + cmd.generate.max_tokens) + 1);
    found->request = std::move(cmd);
    found->active  = true;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        --n_waiting;
    }
    prepare_cache(*found);
}

void engine::impl::drop_model() {
    job.reset();
    slots.clear();
    prefixes.clear();
    draft.reset();
    model.reset();
}

// Side jobs.

void engine::impl::start_job(command cmd) {
    const timeline times = {cmd.submitted, std::max(cmd.submitted, model_ready), now_ns(), 0, 0, 0, 0};
    const command  copy  = cmd;  // the job takes the original, and may refuse it
    try {
        if (cmd.what == command::verb::embed) {
            job = std::make_unique<embed_job>(std::move(cmd), *model);
        } else {
            job = std::make_unique<score_job>(std::move(cmd), *model);
        }
    } catch (const engine_error & error) {
        fail(copy, error.code(), error.what());
        return;
    } catch (const std::bad_alloc &) {
        fail(copy, errc::out_of_memory, "not enough memory for the request");
        return;
    } catch (const std::exception & error) {
        fail(copy, errc::bad_request, error.what());
        return;
    }
    job->times = times;
    const std::lock_guard<std::mutex> lock(mutex);
    --n_waiting;
}

void engine::impl::advance_job() {
    if (job->request.is_cancelled()) {
        end_job(errc::cancelled, "cancelled");
        return;
    }
    if (job->request.is_late(now_ns())) {
        end_job(errc::deadline_exceeded, "the deadline passed");
        return;
    }
    watched          = {job->request.cancelled.get()};
    watched_deadline = job->request.deadline_ns;
    bool done        = false;
    try {
        done = job->advance();
    } catch (const broken_off &) {
        done = false;  // the next turn sees why
    } catch (const engine_error & error) {
        unwatch();
        end_job(error.code(), error.what());
        return;
    } catch (const std::bad_alloc &) {
        unwatch();
        end_job(errc::out_of_memory, "not enough memory for the request");
        return;
    }
    unwatch();
    if (done) {
        end_job(errc::ok, {});
    }
}

void engine::impl::end_job(errc code, const std::string & message) {
    job->times.finished    = now_ns();
    job->times.prompt_done = code == errc::ok ? job->times.finished : 0;
    event e;
    if (code == errc::ok) {
        job->report(e);
    } else {
        e.kind = event_kind::failed;
        e.code = code;
        e.text = message;
    }
    e.id       = job->request.id;
    e.n_prompt = job->n_prompt;
    e.times    = job->times;
    out.push_back(std::move(e));
    const uint64_t id = job->request.id;
    job.reset();
    end_command(id);
}

// Models.

void engine::impl::do_load(command cmd) {
    unwatch();  // what threw has left it
    drop_model();
    prefixes            = prefix_cache(cmd.load.prefix_cache_bytes);
    prompt_ns_per_token = 0.0;
    cost                = decode_cost{};
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
        pulses.fetch_add(1, std::memory_order_relaxed);
        return !stopping && !cmd.is_cancelled();
    };
    try {
        load_models(cmd.load, progress);
        if (cmd.is_cancelled()) {
            throw engine_error(errc::cancelled, "the load was cancelled");  // the caller holds no model now
        }
    } catch (const std::exception & error) {
        drop_model();
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

void engine::impl::load_models(const load_params & params, const std::function<bool(float)> & progress) {
    if (params.draft_path.empty()) {
        model = std::make_unique<loaded_model>(params, progress, should_abort, this);
        return;
    }
    std::error_code unknown;
    const auto      size  = static_cast<double>(std::filesystem::file_size(params.path, unknown));
    const auto      more  = static_cast<double>(std::filesystem::file_size(params.draft_path, unknown));
    const auto      first = static_cast<float>(unknown ? 0.5 : size / (size + more));

    model = std::make_unique<loaded_model>(
        params, [&](float share) { return progress(first * share); }, should_abort, this);
    try {
        draft = std::make_unique<draft_model>(
            params, *model, [&](float share) { return progress(first + (1.0f - first) * share); }, should_abort, this);
    } catch (const engine_error & error) {
        throw engine_error(error.code(), std::string("draft_model: ") + error.what());
    }
}

void engine::impl::do_unload(const command & cmd) {
    drop_model();
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

// Ends.

void engine::impl::finish(slot & place, stop_reason reason) {
    place.times.finished = now_ns();
    event e;
    e.kind          = event_kind::finished;
    e.id            = place.request.id;
    e.tag           = place.request.tag;
    e.reason        = reason;
    e.text          = place.text->flush();
    e.n_prompt      = static_cast<int32_t>(place.n_prompt);
    e.n_tokens      = place.n_sampled;
    e.n_reused      = place.n_reused;
    e.n_neighbours  = place.n_neighbours;
    e.n_drafted     = place.n_drafted;
    e.n_draft_right = place.n_draft_right;
    e.n_by_model    = place.n_by_model;
    e.times         = place.times;
    out.push_back(std::move(e));
    release(place);
}

void engine::impl::fail(slot & place, errc code, const std::string & message) {
    place.times.finished = now_ns();
    event e;
    e.kind     = event_kind::failed;
    e.id       = place.request.id;
    e.tag      = place.request.tag;
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
    e.tag             = cmd.tag;
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
    // The sequence keeps its cells: the next prompt may begin like this one.
    place.tokens.resize(std::min(place.tokens.size(), place.n_past));
    place.cached    = std::move(place.tokens);
    place.last_used = now_ns();
    place.active    = false;
    place.n_queued  = 0;
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
        if (job) {
            end_job(errc::closed, "the engine was closed");
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
    // The reader runs on a core that computes too, so its wake-ups cost tokens. First tokens, ends
    // and progress go out at once; the tokens in between may wait for a next one, but not for long.
    const bool    can_wait = std::all_of(out.begin(), out.end(),
                                         [](const event & e) { return e.kind == event_kind::token && e.n_tokens > 1; });
    const int64_t now      = now_ns();
    if (can_wait && now - last_published < publish_interval_ns) {
        return;
    }
    last_published = now;
    publish_tagged();
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

void engine::impl::publish_tagged() {
    const auto has_none = [](const event & e) { return e.tag == 0; };
    const auto first    = std::stable_partition(out.begin(), out.end(), has_none);
    if (first == out.end()) {
        return;
    }
    tagged.assign(std::make_move_iterator(first), std::make_move_iterator(out.end()));
    out.erase(first, out.end());
    const std::lock_guard<std::mutex> lock(sink_mutex);
    if (sink) {
        sink->take(tagged);
    }
}

}  // namespace ai4all
