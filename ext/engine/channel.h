// One end of a stream socket over which an engine is asked to compute.
//
// Frames are a four-byte length, big-endian, and a JSON list. Generations are served here: a thread of the
// channel's own reads them, and the engine's thread answers, so that no interpreter stands between a
// request and its tokens. Every other frame is handed to the caller.
//
// Order is kept where it matters. A generation that comes while the caller still works on a load or an
// unload is handed to him as well, so that it cannot overtake what it was sent after.

#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "engine.h"
#include "notifier.h"

namespace ai4all {

struct channel_options {
    int64_t tick_ns         = 250'000'000;  // between two ticks while generations run
    int32_t log_level       = 30;           // least level of the lines that are passed on, as Python has them
    size_t  max_frame_bytes = 64u << 20;
};

class channel : event_sink {
  public:
    // Borrows both; the descriptor is made non-blocking. The engine's tagged events come here.
    channel(engine & served, int descriptor, channel_options options);
    ~channel();
    channel(const channel &)             = delete;
    channel & operator=(const channel &) = delete;

    // --- any thread -------------------------------------------------------------------------

    // Readable when there is something to take.
    int fd() const noexcept { return wake_caller_.fd(); }
    // Move out the frames for the caller, without their lengths; false once no more can come, because the
    // other end has gone or does not keep to the format.
    bool take(std::vector<std::string> & frames);
    // Send one frame, after all that were sent before. It answers so many of the loads and unloads that
    // were taken: whoever has read it finds them served.
    void send(const std::string & content, size_t n_served = 0);
    // So many of them have been served without an answer.
    void served(size_t n_frames) noexcept;
    // Send what is left, for at most a second, and say no more. The engine is to be stopped first.
    void close() noexcept;

  private:
    void run() noexcept;
    bool receive();
    void take_frame(std::string content);
    bool serve_generation(const std::string & content);
    bool serve_cancel(const std::string & content);
    void tick();
    void take(const std::vector<event> & events) noexcept override;
    void write(const std::string & content);
    bool flush(const std::lock_guard<std::mutex> & held) noexcept;
    void break_off() noexcept;

    engine &              engine_;
    const int             descriptor_;
    const channel_options options_;
    notifier              wake_caller_;
    notifier              wake_thread_;
    std::atomic<bool>     closing_{false};

    // The channel's thread only.
    std::string received_;
    int64_t     next_tick_ = 0;

    std::mutex               handed_mutex_;  // of what follows
    std::vector<std::string> handed_;
    size_t                   n_handed_ = 0;  // loads and unloads ever, and how many of them have been served
    size_t                   n_served_ = 0;
    bool                     lost_     = false;

    std::mutex                             live_mutex_;  // of what follows
    std::unordered_map<uint64_t, uint64_t> live_;        // id in the engine by number; 0 until it has one

    std::mutex  out_mutex_;  // of what follows
    std::string unsent_;

    std::thread thread_;
};

}  // namespace ai4all
