// What the native tests share: checks, small requests, and the events of an engine by command.

#pragma once

#include <poll.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "engine.h"

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                        \
        }                                                                        \
    } while (0)

namespace ai4all {

template <typename F>
errc code_of(F call) {
    try {
        call();
    } catch (const engine_error & error) {
        return error.code();
    }
    return errc::ok;
}

// Collects events by command until each of `ids` has ended.
struct history {
    std::map<uint64_t, std::vector<event>> of;

    static bool is_last(const event & e) {
        return e.kind != event_kind::load_progress && e.kind != event_kind::prompt_progress &&
               e.kind != event_kind::token;
    }
    bool ended(uint64_t id) const {
        const auto found = of.find(id);
        return found != of.end() && is_last(found->second.back());
    }
    const event &        last(uint64_t id) const { return of.at(id).back(); }
    std::vector<int32_t> tokens(uint64_t id) const {
        std::vector<int32_t> result;
        for (const event & e : of.at(id)) {
            if (e.kind == event_kind::token) {
                result.push_back(e.token);
            }
        }
        return result;
    }
    std::string text(uint64_t id) const {
        std::string result;
        for (const event & e : of.at(id)) {
            if (e.kind == event_kind::token || e.kind == event_kind::finished) {
                result += e.text;
            }
        }
        return result;
    }
    void take(engine & e) {
        std::vector<event> events;
        e.drain(events);
        for (event & item : events) {
            CHECK(of[item.id].empty() || !is_last(of[item.id].back()));  // nothing comes after the last
            of[item.id].push_back(std::move(item));
        }
    }
    void wait(engine & e, const std::vector<uint64_t> & ids) {
        for (const uint64_t id : ids) {
            wait_until(e, [&] { return ended(id); });
        }
    }
    void wait_until(engine & e, const std::function<bool()> & done) {
        while (!done()) {
            pollfd ready = {e.fd(), POLLIN, 0};
            CHECK(poll(&ready, 1, 60000) == 1);
            take(e);
        }
    }
};

inline load_params small_load(const std::string & path, uint32_t n_slots) {
    load_params params;
    params.path            = path;
    params.n_ctx           = 512;
    params.n_batch         = 64;
    params.n_ubatch        = 64;
    params.n_slots         = n_slots;
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    return params;
}

inline generate_params greedy(const std::string & prompt, int32_t max_tokens) {
    generate_params params;
    params.prompt     = prompt;
    params.max_tokens = max_tokens;
    params.ignore_eos = true;
    return params;
}

inline std::string words(size_t n) {
    std::string text;
    for (size_t i = 0; i < n; ++i) {
        text += "the sea ";
    }
    return text;
}

}  // namespace ai4all
