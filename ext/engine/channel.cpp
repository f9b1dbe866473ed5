#include "channel.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <system_error>

#include "json.h"

namespace ai4all {

namespace {

constexpr size_t  length_bytes   = 4;
constexpr size_t  receive_bytes  = 64u << 10;
constexpr int64_t close_after_ns = 1'000'000'000;

#ifdef MSG_NOSIGNAL
constexpr int send_flags = MSG_NOSIGNAL;
#else
constexpr int send_flags = 0;  // whoever holds the socket ignores SIGPIPE
#endif

bool begins_with(const std::string & text, const char * prefix) {
    return text.compare(0, std::strlen(prefix), prefix) == 0;
}

void append_length(std::string & out, size_t length) {
    for (int shift = 24; shift >= 0; shift -= 8) {
        out.push_back(static_cast<char>((length >> shift) & 0xFF));
    }
}

size_t length_at(const std::string & in) {
    size_t length = 0;
    for (size_t i = 0; i < length_bytes; ++i) {
        length = length << 8 | static_cast<unsigned char>(in[i]);
    }
    return length;
}

template <typename Int>
Int integer(const common_json & fields, const char * name, Int otherwise = 0) {
    const common_json & value = fields.at(name);
    if (value.is_null()) {
        return otherwise;
    }
    const auto wide = value.get<int64_t>();
    // One beyond 63 bits comes out with the other sign.
    if (!value.is_number_integer() || (value.get<double>() < 0.0) != (wide < 0) ||
        wide < static_cast<int64_t>(std::numeric_limits<Int>::min()) ||
        wide > static_cast<int64_t>(std::numeric_limits<Int>::max())) {
        throw engine_error(errc::bad_request, std::string(name) + ": out of range");
    }
    return static_cast<Int>(wide);
}

std::string text(const common_json & fields, const char * name) {
    const common_json & value = fields.at(name);
    return value.is_null() ? std::string() : value.get<std::string>();
}

// Throws common_json_error.
uint64_t number_of(const common_json & command) {
    const common_json & number = command.at(1);
    if (!number.is_number_integer() || number.get<int64_t>() <= 0) {
        throw common_json_error("a command without a number");
    }
    return number.get<uint64_t>();
}

// The fields of a GenerateRequest by their names. Throws engine_error and common_json_error.
generate_params params_of(const common_json & fields) {
    generate_params params;
    params.prompt             = text(fields, "prompt");
    params.system_prompt      = text(fields, "system_prompt");
    params.chat               = !fields.at("system_prompt").is_null();
    params.max_tokens         = integer<int32_t>(fields, "max_tokens");
    params.temperature        = fields.at("temperature").get<float>();
    params.top_k              = integer<int32_t>(fields, "top_k");
    params.top_p              = fields.at("top_p").get<float>();
    params.min_p              = fields.at("min_p").get<float>();
    params.repetition_penalty = fields.at("repetition_penalty").get<float>();
    params.seed               = integer<uint32_t>(fields, "seed");
    params.ignore_eos         = fields.at("ignore_eos").get<bool>();
    params.deterministic      = fields.at("deterministic").get<bool>();
    params.grammar            = text(fields, "grammar");
    params.json_schema        = text(fields, "json_schema");
    params.logprobs           = integer<int32_t>(fields, "logprobs", -1);
    params.reuse_prefix       = fields.at("reuse_prefix").get<bool>();
    params.speculate          = fields.at("speculate").get<bool>();
    const common_json & stop  = fields.at("stop");
    for (size_t i = 0; i < stop.size(); ++i) {
        std::string end = stop.at(i).get<std::string>();
        if (!end.empty()) {
            params.stop.push_back(std::move(end));
        }
    }
    const common_json & deadline = fields.at("deadline");
    if (!deadline.is_null()) {
        // Seconds of the steady clock. One that has passed long ago still is one.
        const double ns    = std::clamp(deadline.get<double>() * 1e9, 1.0, 9e18);
        params.deadline_ns = static_cast<int64_t>(ns);
    }
    return params;
}

// As Python's logging has them. What llama.cpp calls information is of interest to whoever debugs.
int32_t python_level(int32_t level) {
    return level >= 4 ? 40 : level == 3 ? 30 : 10;
}

common_json described(const token_logprob & one) {
    return common_json::array({one.token, one.text, one.logprob});
}

// What a TokenEvent has, of tokens of one command that follow each other.
class token_run {
  public:
    void add(const event & e) {
        text_ += e.text;
        tokens_.push_back(e.token);
        n_tokens_ = e.n_tokens;
        if (e.logprobs.empty()) {
            return;
        }
        common_json likely = common_json::array();
        for (size_t i = 1; i < e.logprobs.size(); ++i) {
            likely.push_back(described(e.logprobs[i]));
        }
        const token_logprob & chosen = e.logprobs.front();
        logprobs_.push_back(common_json::object(
            {{"token", chosen.token}, {"text", chosen.text}, {"logprob", chosen.logprob}, {"top", likely}}));
    }

    common_json fields() const {
        common_json all =
            common_json::object({{"text", text_}, {"token_ids", tokens_}, {"completion_tokens", n_tokens_}});
        if (!logprobs_.empty()) {
            all["logprobs"] = logprobs_;
        }
        return all;
    }

  private:
    std::string          text_;
    std::vector<int32_t> tokens_;
    int32_t              n_tokens_ = 0;
    common_json          logprobs_ = common_json::array();
};

common_json message(uint64_t number, const char * kind, const common_json & body) {
    return common_json::array({number, kind, body});
}

common_json failure(uint64_t number, errc code, const std::string & text, int32_t n_prompt, int32_t n_tokens) {
    return message(number, "failed", common_json::array({errc_name(code), text, n_prompt, n_tokens}));
}

common_json message_of(const event & e) {
    if (e.kind == event_kind::prompt_progress) {
        return message(e.tag, "prompt", common_json::object({{"processed", e.n_prompt_done}, {"total", e.n_prompt}}));
    }
    if (e.kind == event_kind::finished) {
        const timeline &  t     = e.times;
        const common_json times = common_json::array(
            {t.submitted, t.model_ready, t.admitted, t.prompt_done, t.first_token, t.last_token, t.finished});
        return message(
            e.tag, "finished",
            common_json::array({e.text, e.reason == stop_reason::stop ? "stop" : "length", e.n_prompt, e.n_tokens,
                                e.n_reused, e.n_neighbours, e.n_drafted, e.n_draft_right, e.n_by_model, times}));
    }
    return failure(e.tag, e.code, e.text, e.n_prompt, e.n_tokens);
}

}  // namespace

channel::channel(engine & served, int descriptor, channel_options options)
    : engine_(served), descriptor_(descriptor), options_(options) {
    const int flags = fcntl(descriptor_, F_GETFL);
    if (flags < 0 || fcntl(descriptor_, F_SETFL, flags | O_NONBLOCK) < 0) {
        throw std::system_error(errno, std::generic_category(), "the channel's descriptor");
    }
    // Signals belong to the caller's threads.
    sigset_t all;
    sigset_t before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    engine_.set_sink(this);
    try {
        thread_ = std::thread([this] { run(); });
    } catch (...) {
        engine_.set_sink(nullptr);
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

channel::~channel() {
    close();
    engine_.set_sink(nullptr);
}

// Any thread.

bool channel::take(std::vector<std::string> & frames) {
    frames.clear();
    wake_caller_.clear();
    const std::lock_guard<std::mutex> lock(handed_mutex_);
    frames.swap(handed_);
    return !lost_;
}

void channel::send(const std::string & content, size_t n_served) {
    const std::lock_guard<std::mutex> lock(handed_mutex_);
    write(content);
    n_served_ += n_served;
}

void channel::served(size_t n_frames) noexcept {
    const std::lock_guard<std::mutex> lock(handed_mutex_);
    n_served_ += n_frames;
}

void channel::write(const std::string & content) {
    const std::lock_guard<std::mutex> lock(out_mutex_);
    append_length(unsent_, content.size());
    unsent_ += content;
    if (!flush(lock)) {
        wake_thread_.signal();  // it waits until there is room
    }
}

void channel::close() noexcept {
    closing_ = true;
    wake_thread_.signal();
    if (thread_.joinable()) {
        thread_.join();
    }
}

// True when nothing is left to be sent.
bool channel::flush(const std::lock_guard<std::mutex> & /*held*/) noexcept {
    size_t sent = 0;
    while (sent < unsent_.size()) {
        const ssize_t n = ::send(descriptor_, unsent_.data() + sent, unsent_.size() - sent, send_flags);
        if (n > 0) {
            sent += static_cast<size_t>(n);
        } else if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
            break;
        } else if (n == 0 || errno != EINTR) {
            sent = unsent_.size();  // the other end has gone, which its reader sees
        }
    }
    unsent_.erase(0, sent);
    return unsent_.empty();
}

void channel::break_off() noexcept {
    {
        const std::lock_guard<std::mutex> lock(handed_mutex_);
        lost_ = true;
    }
    shutdown(descriptor_, SHUT_RDWR);
    wake_caller_.signal();
}

// The channel's thread.

void channel::run() noexcept {
    int64_t until = std::numeric_limits<int64_t>::max();
    bool    lost  = false;
    while (true) {
        bool is_busy = false;
        bool is_full = false;
        {
            const std::lock_guard<std::mutex> lock(live_mutex_);
            is_busy = !live_.empty();
        }
        {
            const std::lock_guard<std::mutex> lock(out_mutex_);
            is_full = !flush(lock);
        }
        const int64_t now = now_ns();
        if (closing_) {
            until = std::min(until, now + close_after_ns);
            if (!is_full || lost || now >= until) {
                return;
            }
        }
        // The timeout is rounded up: not a turn for each fraction of a millisecond.
        const int64_t due  = closing_ ? until : is_busy ? next_tick_ : -1;
        const int  timeout = due < 0 ? -1 : static_cast<int>(std::max<int64_t>(0, (due - now + 999'999) / 1'000'000));
        const auto events  = static_cast<short>((lost || closing_ ? 0 : POLLIN) | (is_full ? POLLOUT : 0));
        pollfd     ready[] = {{lost ? -1 : descriptor_, events, 0}, {wake_thread_.fd(), POLLIN, 0}};
        if (poll(ready, 2, timeout) < 0 && errno != EINTR) {
            break_off();
            return;
        }
        if (ready[1].revents != 0) {
            wake_thread_.clear();
        }
        if (!is_busy) {
            next_tick_ = now_ns() + options_.tick_ns;
        }
        try {
            if (!closing_ && ready[0].revents != 0 && !receive()) {
                lost = true;
                break_off();
            }
            if (is_busy && now_ns() >= next_tick_) {
                tick();
            }
        } catch (const std::exception &) {
            // Out of memory, or a frame that is none: nothing that follows could be relied on.
            lost = true;
            break_off();
        }
    }
}

// False when nothing more will come.
bool channel::receive() {
    const size_t before = received_.size();
    received_.resize(before + receive_bytes);
    const ssize_t n = recv(descriptor_, received_.data() + before, receive_bytes, 0);
    received_.resize(before + static_cast<size_t>(std::max<ssize_t>(n, 0)));
    if (n <= 0) {
        return n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR);
    }
    while (received_.size() >= length_bytes) {
        const size_t length = length_at(received_);
        if (length > options_.max_frame_bytes) {
            return false;
        }
        if (received_.size() < length_bytes + length) {
            break;
        }
        std::string content = received_.substr(length_bytes, length);
        received_.erase(0, length_bytes + length);
        take_frame(std::move(content));
    }
    return true;
}

void channel::take_frame(std::string content) {
    if (begins_with(content, "[\"generate\",") ? serve_generation(content)
                                               : begins_with(content, "[\"cancel\",") && serve_cancel(content)) {
        return;
    }
    {
        const std::lock_guard<std::mutex> lock(handed_mutex_);
        if (begins_with(content, "[\"load\",") || begins_with(content, "[\"unload\",")) {
            ++n_handed_;
        }
        handed_.push_back(std::move(content));
    }
    wake_caller_.signal();
}

bool channel::serve_generation(const std::string & content) {
    {
        const std::lock_guard<std::mutex> lock(handed_mutex_);
        if (n_served_ != n_handed_) {
            return false;
        }
    }
    const common_json command = common_json::parse(content);
    const uint64_t    number  = number_of(command);
    {
        // Before the engine has it: it may end at once.
        const std::lock_guard<std::mutex> lock(live_mutex_);
        live_[number] = 0;
    }
    common_json problem;
    try {
        const uint64_t id = engine_.generate(params_of(command.at(2)), number);

        const std::lock_guard<std::mutex> lock(live_mutex_);
        const auto                        found = live_.find(number);
        if (found != live_.end()) {
            found->second = id;
        }
        return true;
    } catch (const engine_error & error) {
        problem = failure(number, error.code(), error.what(), 0, 0);
    } catch (const common_json_error & error) {
        problem = failure(number, errc::compute_failed, std::string("no request: ") + error.what(), 0, 0);
    }
    {
        const std::lock_guard<std::mutex> lock(live_mutex_);
        live_.erase(number);
    }
    write(common_json::array({problem}).dump_safe());
    return true;
}

bool channel::serve_cancel(const std::string & content) {
    const uint64_t number = number_of(common_json::parse(content));
    uint64_t       id     = 0;
    {
        const std::lock_guard<std::mutex> lock(live_mutex_);
        const auto                        found = live_.find(number);
        if (found == live_.end()) {
            return false;  // the caller's, or ended
        }
        id = found->second;
    }
    engine_.cancel(id);
    return true;
}

void channel::tick() {
    next_tick_ = now_ns() + options_.tick_ns;
    write(common_json::array({common_json::array({"tick", pulse()})}).dump_safe());
}

// The engine's thread.

void channel::take(const std::vector<event> & events) noexcept {
    try {
        common_json                   said = common_json::array();
        std::map<uint64_t, token_run> runs;  // sequences take turns; their tokens are told together
        for (const event & e : events) {
            if (e.kind == event_kind::token) {
                runs[e.tag].add(e);
                continue;
            }
            const auto before = runs.find(e.tag);
            if (before != runs.end()) {
                said.push_back(message(e.tag, "token", before->second.fields()));
                runs.erase(before);
            }
            said.push_back(message_of(e));
        }
        for (const auto & [number, run] : runs) {
            said.push_back(message(number, "token", run.fields()));
        }
        for (const log_line & line : drain_log()) {
            const int32_t level = python_level(line.level);
            if (level >= options_.log_level) {
                said.push_back(common_json::array({"log", level, line.text}));
            }
        }
        {
            // First, so that nobody who has read the end finds it still running.
            const std::lock_guard<std::mutex> lock(live_mutex_);
            for (const event & e : events) {
                if (e.kind == event_kind::finished || e.kind == event_kind::failed) {
                    live_.erase(e.tag);
                }
            }
        }
        write(said.dump_safe());
    } catch (const std::exception &) {
        // Whoever waits for an end must not wait for ever.
        break_off();
    }
}

}  // namespace ai4all
