// Loads models that may be spoiled, each in a process of its own, and lets each generate a little:
// spoiled_models PATH..., or without arguments paths on standard input, one a line. Prints what became
// of each, in their order:
//
//   refused CODE   the load or the generation ended in an error of ours
//   answered       the generation ended
//   aborted        an assertion of llama.cpp's ended the process
//   report         a sanitizer ended it: the run as a whole fails
//   hung           it took over a minute
//   status N       anything else
//
// Meant for the sanitizer presets; tests/spoiled_models.py makes the models.

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>

#include "engine.h"
#include "harness.h"

using namespace ai4all;

// What the sanitizers are told to exit with; the codes of our own errors stay below it.
static const int      sanitizer_status = 86;
static const int      answered_status  = 40;
static const unsigned patience_s       = 60;

static int try_model(const std::string & path) {
    engine         e(2);
    history        h;
    const uint64_t load = e.load(small_load(path, 1));
    h.wait(e, {load});
    if (h.last(load).kind != event_kind::loaded) {
        return static_cast<int>(h.last(load).code);
    }
    generate_params params  = greedy("Hello", 4);
    const uint64_t  request = e.generate(params);
    h.wait(e, {request});
    const errc code = h.last(request).code;
    return code == errc::ok ? answered_status : static_cast<int>(code);
}

static std::string what_became(int status) {
    if (WIFSIGNALED(status)) {
        switch (WTERMSIG(status)) {
            case SIGABRT: return "aborted";
            case SIGALRM: return "hung";
            default: return "report";  // no sanitizer was quick enough
        }
    }
    const int code = WEXITSTATUS(status);
    if (code == sanitizer_status) {
        return "report";
    }
    if (code == answered_status) {
        return "answered";
    }
    if (code > 0 && code < static_cast<int>(errc::end)) {
        return std::string("refused ") + errc_name(static_cast<errc>(code));
    }
    return "status " + std::to_string(code);
}

// Prints what became of a model; false for a report.
static bool look_at(const std::string & path) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(patience_s);
        int status = 1;
        try {
            status = try_model(path);
        } catch (const engine_error & error) {
            status = static_cast<int>(error.code());
        }
        std::_Exit(status);
    }
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    const std::string became = what_became(status);
    std::printf("%s\n", became.c_str());
    std::fflush(stdout);
    return became != "report";
}

int main(int argc, char ** argv) {
    bool is_clean = true;
    for (int i = 1; i < argc; ++i) {
        is_clean = look_at(argv[i]) && is_clean;
    }
    std::string path;
    while (argc == 1 && std::getline(std::cin, path)) {
        is_clean = look_at(path) && is_clean;
    }
    return is_clean ? 0 : 1;
}
