#include "backends.h"

#include <mutex>

#include "ggml-backend.h"

#ifdef AI4ALL_LOADS_BACKENDS
#include <dlfcn.h>

#include <algorithm>
#include <filesystem>
#endif

namespace ai4all {

namespace {

std::vector<std::pair<std::string, std::string>> not_loaded;
std::string                                      chosen_cpu;
draft_switch                                     verify_draft = nullptr;

#ifdef AI4ALL_LOADS_BACKENDS

namespace fs = std::filesystem;

const std::string prefix = "libggml-";
const std::string cpu    = "cpu";

struct found_backend {
    std::string name;  // "cuda", "cpu-haswell"
    fs::path    path;
};

fs::path own_folder() {
    Dl_info info;
    if (!dladdr(reinterpret_cast<void *>(&load_backends), &info) || !info.dli_fname) {
        return {};
    }
    std::error_code ignored;
    return fs::absolute(info.dli_fname, ignored).parent_path() / "libs";
}

std::vector<found_backend> find_backends(const fs::path & folder) {
    std::vector<found_backend> found;
    std::error_code            error;
    for (fs::directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
        const std::string stem = it->path().stem().string();
        if (it->path().extension() == ".so" && stem.compare(0, prefix.size(), prefix) == 0) {
            found.push_back({stem.substr(prefix.size()), it->path()});
        }
    }
    std::sort(found.begin(), found.end(), [](const auto & a, const auto & b) { return a.name < b.name; });
    return found;
}

std::string last_error() {
    const char * text = dlerror();
    return text ? text : "unknown error";
}

// What the library says of this machine's CPU: 0 does not run here, more is better.
int score_of(const found_backend & backend) {
    void * handle = dlopen(backend.path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        not_loaded.emplace_back(backend.name, last_error());
        return 0;
    }
    const auto score = reinterpret_cast<int (*)()>(dlsym(handle, "ggml_backend_score"));
    const int  value = score ? score() : 1;
    dlclose(handle);
    return value;
}

void load(const found_backend & backend) {
    if (ggml_backend_load(backend.path.c_str())) {
        return;
    }
    // ggml only logs why; asked again, the loader says it to us.
    void *            handle = dlopen(backend.path.c_str(), RTLD_NOW | RTLD_LOCAL);
    const std::string why    = handle ? "it refuses this machine" : last_error();
    if (handle) {
        dlclose(handle);
    }
    not_loaded.emplace_back(backend.name, why);
}

// Kernels of ours that were compiled into the library. They wait to be called: whatever ran by itself
// when a library is opened would be an illegal instruction in one that does not fit.
void offer_own_kernels(const found_backend & backend) {
    if (void * handle = dlopen(backend.path.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD)) {
        if (const auto offer = reinterpret_cast<void (*)()>(dlsym(handle, "ai4all_register_interleaved"))) {
            offer();
        }
        verify_draft = reinterpret_cast<draft_switch>(dlsym(handle, "ai4all_verify_draft"));
    }
}

void load_all() {
    const found_backend * best  = nullptr;
    int                   value = 0;
    const auto            found = find_backends(own_folder());
    for (const found_backend & backend : found) {
        if (backend.name.compare(0, cpu.size(), cpu) != 0) {
            // GPUs first: the order of devices is the order in which they are asked.
            load(backend);
        } else if (const int score = score_of(backend); score > value) {
            best  = &backend;
            value = score;
        }
    }
    if (best) {
        load(*best);
        offer_own_kernels(*best);
        chosen_cpu = best->name.size() > cpu.size() ? best->name.substr(cpu.size() + 1) : "";
    } else {
        not_loaded.emplace_back(cpu, "no variant of it runs on this machine");
    }
}

#else

void load_all() {}

#endif

}  // namespace

void load_backends() {
    static std::once_flag once;
    std::call_once(once, load_all);
}

const std::vector<std::pair<std::string, std::string>> & backends_not_loaded() {
    return not_loaded;
}

const std::string & cpu_variant() {
    return chosen_cpu;
}

draft_switch loaded_draft_switch() {
    return verify_draft;
}

}  // namespace ai4all
