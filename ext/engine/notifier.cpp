#include "notifier.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <system_error>

#ifdef __linux__
#include <sys/eventfd.h>
#else
#include <sys/socket.h>
#endif

namespace ai4all {

#ifdef __linux__

notifier::notifier() : read_fd_(eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)), write_fd_(read_fd_) {
    if (read_fd_ < 0) {
        throw std::system_error(errno, std::generic_category(), "eventfd");
    }
}

notifier::~notifier() {
    close(read_fd_);
}

void notifier::signal() noexcept {
    const uint64_t one = 1;
    // Fails only when the counter is at its limit, and then the descriptor is readable anyway.
    [[maybe_unused]] const ssize_t written = write(write_fd_, &one, sizeof(one));
}

void notifier::clear() noexcept {
    uint64_t count = 0;
    // EAGAIN is normal: an earlier reader took what this signal announced.
    [[maybe_unused]] const ssize_t got = read(read_fd_, &count, sizeof(count));
}

#else

notifier::notifier() : read_fd_(-1), write_fd_(-1) {
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0) {
        throw std::system_error(errno, std::generic_category(), "socketpair");
    }
    for (const int fd : pair) {
        fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
        fcntl(fd, F_SETFD, FD_CLOEXEC);
    }
    read_fd_  = pair[0];
    write_fd_ = pair[1];
}

notifier::~notifier() {
    close(read_fd_);
    close(write_fd_);
}

void notifier::signal() noexcept {
    const char                     one     = 1;
    [[maybe_unused]] const ssize_t written = write(write_fd_, &one, 1);
}

void notifier::clear() noexcept {
    char bytes[64];
    while (read(read_fd_, bytes, sizeof(bytes)) == sizeof(bytes)) {
    }
}

#endif

}  // namespace ai4all
