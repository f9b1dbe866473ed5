#include "log_sink.h"

#include <sys/uio.h>
#include <unistd.h>

#include <cstring>
#include <deque>
#include <mutex>
#include <vector>

#include "engine.h"
#include "ggml.h"
#include "llama.h"
#include "log.h"

namespace ai4all {

namespace {

constexpr size_t max_lines = 1024;

std::mutex           ring_mutex;
std::deque<log_line> ring;
// A line comes in pieces: GGML_LOG_LEVEL_CONT continues the one before.
std::string open_text;
int32_t     open_level = 0;

thread_local std::string thread_errors;

// Pieces of lines that wait until it is known how a decode of this thread ended; null outside of one.
thread_local std::vector<log_line> * held_back = nullptr;

void close_line() {
    while (!open_text.empty() && (open_text.back() == '\n' || open_text.back() == ' ')) {
        open_text.pop_back();
    }
    if (!open_text.empty()) {
        if (ring.size() == max_lines) {
            ring.pop_front();
        }
        ring.push_back({open_level, std::move(open_text)});
    }
    open_text.clear();
}

void log_piece(ggml_log_level level, const char * text) {
    if (level == GGML_LOG_LEVEL_ERROR && thread_errors.size() < 4096) {
        thread_errors += text;
    }
    const std::lock_guard<std::mutex> lock(ring_mutex);
    if (level != GGML_LOG_LEVEL_CONT) {
        close_line();
        open_level = static_cast<int32_t>(level);
    }
    open_text += text;
    if (!open_text.empty() && open_text.back() == '\n') {
        close_line();
    }
}

void sink(ggml_log_level level, const char * text, void * /*user_data*/) {
    if (held_back != nullptr) {
        held_back->push_back({static_cast<int32_t>(level), text});
    } else {
        log_piece(level, text);
    }
}

// GGML_ASSERT ends in abort() whatever this does: it can only say what happened. Without it the
// default handler would fork a debugger. Only async-signal-safe calls.
// In one write, so that threads that fail together do not mix their lines: a supervisor reads them.
void on_abort(const char * message) {
    constexpr char prefix[] = "ai4all engine aborted: ";
    const iovec    line[]   = {
        {const_cast<char *>(prefix), sizeof(prefix) - 1},
        {const_cast<char *>(message), std::strlen(message)},
        {const_cast<char *>("\n"), 1},
    };
    [[maybe_unused]] const ssize_t written = writev(STDERR_FILENO, line, 3);
}

}  // namespace

void log_install() {
    static std::once_flag once;
    std::call_once(once, [] {
        ggml_set_abort_callback(on_abort);
        llama_log_set(sink, nullptr);
        common_log_set_verbosity_thold(-1);  // its own logger would start a thread and print
    });
}

std::string log_take_errors() {
    std::string text = std::move(thread_errors);
    thread_errors.clear();
    while (!text.empty() && text.back() == '\n') {
        text.pop_back();
    }
    return text;
}

int32_t decode(llama_context * ctx, const llama_batch & batch) {
    struct holding {
        std::vector<log_line> pieces;
        holding() { held_back = &pieces; }
        ~holding() { held_back = nullptr; }
    } held;
    const int32_t status = llama_decode(ctx, batch);
    held_back            = nullptr;
    for (const log_line & piece : held.pieces) {
        const auto level      = static_cast<ggml_log_level>(piece.level);
        const bool is_no_news = status == 2 && level != GGML_LOG_LEVEL_CONT;
        log_piece(is_no_news ? GGML_LOG_LEVEL_DEBUG : level, piece.text.c_str());
    }
    return status;
}

std::vector<log_line> drain_log() {
    const std::lock_guard<std::mutex> lock(ring_mutex);
    std::vector<log_line>             lines(ring.begin(), ring.end());
    ring.clear();
    return lines;
}

}  // namespace ai4all
