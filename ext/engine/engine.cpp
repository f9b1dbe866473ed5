// The engine as other threads see it: commands in, events out, start and stop.

#include "engine.h"

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <system_error>

#include "backends.h"
#include "engine_impl.h"
#include "log_sink.h"

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

// Any thread.

uint64_t engine::impl::submit(command cmd) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (stopping) {
        throw engine_error(errc::closed, "the engine is closed");
    }
    const bool manages_model = cmd.what == command::verb::load || cmd.what == command::verb::unload;
    if (!manages_model && !model_due) {
        throw engine_error(errc::not_loaded, "no model is loaded");
    }
    if (n_waiting >= capacity) {
        throw engine_error(errc::busy, "the command queue is full (" + std::to_string(capacity) + ")");
    }
    cmd.id        = ++last_id;
    cmd.submitted = now_ns();
    cmd.cancelled = std::make_shared<std::atomic<bool>>(false);
    if (manages_model) {
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

// With a stack for what recurses once for each character of a text: std::regex, by which llama.cpp cuts the text
// of some models into words. Only what is used of it takes memory. Returns what pthread_create does.
int engine::impl::start_deep(pthread_t & thread, impl & self) {
    constexpr size_t deep   = sizeof(void *) >= 8 ? size_t{512} << 20 : size_t{64} << 20;
    constexpr size_t least  = size_t{8} << 20;
    int              failed = 0;
    for (size_t bytes = deep; bytes >= least; bytes /= 2) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        pthread_attr_setstacksize(&attributes, bytes);
        failed = pthread_create(
            &thread, &attributes,
            [](void * that) -> void * {
                static_cast<impl *>(that)->run();
                return nullptr;
            },
            &self);
        pthread_attr_destroy(&attributes);
        if (failed != EAGAIN && failed != ENOMEM) {
            break;  // else a limit of the address space may leave room for less
        }
    }
    return failed;
}

// The public face.

engine::engine(size_t queue_capacity) : impl_(std::make_unique<impl>(queue_capacity)) {
    log_install();
    load_backends();
    llama_backend_init();
    // Signals belong to the caller's threads; the engine's, and all that it makes, take none.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    const int failed = impl::start_deep(impl_->thread, *impl_);
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (failed != 0) {
        throw std::system_error(failed, std::generic_category(), "the engine's thread");
    }
    impl_->has_thread = true;
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

uint64_t engine::generate(generate_params params, uint64_t tag) {
    command cmd;
    cmd.what        = command::verb::generate;
    cmd.tag         = tag;
    cmd.deadline_ns = params.deadline_ns;
    cmd.generate    = std::move(params);
    return impl_->submit(std::move(cmd));
}

uint64_t engine::embed(embed_params params) {
    command cmd;
    cmd.what        = command::verb::embed;
    cmd.deadline_ns = params.deadline_ns;
    cmd.embed       = std::move(params);
    return impl_->submit(std::move(cmd));
}

uint64_t engine::score(score_params params) {
    command cmd;
    cmd.what                   = command::verb::score;
    cmd.deadline_ns            = params.deadline_ns;
    cmd.generate.prompt        = std::move(params.prompt);
    cmd.generate.system_prompt = std::move(params.system_prompt);
    cmd.generate.chat          = params.chat;
    cmd.score                  = std::move(params);
    return impl_->submit(std::move(cmd));
}

void engine::cancel(uint64_t id) noexcept {
    impl_->cancel(id);
}

void engine::set_sink(event_sink * sink) noexcept {
    const std::lock_guard<std::mutex> lock(impl_->sink_mutex);
    impl_->sink = sink;
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
    if (impl_->has_thread) {
        impl_->has_thread = false;
        pthread_join(impl_->thread, nullptr);
    }
}

}  // namespace ai4all
