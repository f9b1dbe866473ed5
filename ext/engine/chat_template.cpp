#include "chat_template.h"

#include <pthread.h>
#include <time.h>

#include <chrono>
#include <future>
#include <thread>

#include "ggml.h"

namespace ai4all {

namespace {

// Real templates take some milliseconds.
constexpr double most_seconds = 0.5;
constexpr auto   look_every   = std::chrono::milliseconds(20);

// Processor time of a thread, which a busy or sleeping machine does not add to; elapsed time where
// the system does not tell.
class stopwatch {
  public:
    explicit stopwatch(std::thread & thread) : begun_(std::chrono::steady_clock::now()) {
#if defined(__linux__)
        known_ = pthread_getcpuclockid(thread.native_handle(), &clock_) == 0;
#else
        (void)thread;
#endif
    }

    double seconds() const {
#if defined(__linux__)
        timespec spent = {};
        if (known_ && clock_gettime(clock_, &spent) == 0) {
            return static_cast<double>(spent.tv_sec) + static_cast<double>(spent.tv_nsec) / 1e9;
        }
#endif
        return std::chrono::duration<double>(std::chrono::steady_clock::now() - begun_).count() / 10.0;
    }

  private:
    std::chrono::steady_clock::time_point begun_;
#if defined(__linux__)
    clockid_t clock_ = 0;
    bool      known_ = false;
#endif
};

}  // namespace

common_chat_templates_ptr read_chat_template(const llama_model * model) {
    std::packaged_task<common_chat_templates_ptr()> reading([model]() -> common_chat_templates_ptr {
        try {
            return common_chat_templates_init(model, "");
        } catch (const std::exception &) {
            // One that cannot be parsed costs chat requests, not the model.
            return nullptr;
        }
    });
    std::future<common_chat_templates_ptr>          result = reading.get_future();
    std::thread                                     thread(std::move(reading));
    const stopwatch                                 watch(thread);
    while (result.wait_for(look_every) != std::future_status::ready) {
        if (watch.seconds() > most_seconds) {
            // There is no way to end a thread from outside and go on.
            GGML_ABORT("the chat template does not end");
        }
    }
    thread.join();
    return result.get();
}

}  // namespace ai4all
