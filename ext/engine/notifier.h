// A file descriptor that an event loop watches: an eventfd on Linux, a socketpair elsewhere.

#pragma once

namespace ai4all {

class notifier {
  public:
    notifier();
    ~notifier();
    notifier(const notifier &)             = delete;
    notifier & operator=(const notifier &) = delete;

    int  fd() const noexcept { return read_fd_; }
    void signal() noexcept;  // any thread
    void clear() noexcept;   // the reader, before it takes what was signalled

  private:
    int read_fd_;
    int write_fd_;
};

}  // namespace ai4all
