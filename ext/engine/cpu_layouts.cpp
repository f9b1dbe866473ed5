#include "cpu_layouts.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "backends.h"
#include "ggml-backend.h"
#ifdef __linux__
#include <sys/mman.h>
#endif
#ifdef AI4ALL_KERNELS
#include "kernels.h"
#endif

namespace ai4all {

void cpu_layouts_install() {
#ifdef AI4ALL_KERNELS
    ai4all_register_interleaved();
#endif
}

std::vector<std::string> cpu_layouts() {
    cpu_layouts_install();
    std::vector<std::string> names;
    ggml_backend_dev_t       cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (!cpu) {
        return names;
    }
    const auto types = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu), "ggml_backend_dev_get_extra_bufts"));
    if (types) {
        for (ggml_backend_buffer_type_t * type = types(cpu); type && *type; ++type) {
            names.emplace_back(ggml_backend_buft_name(*type));
        }
    }
    return names;
}

static void verify_draft(bool on) {
#ifdef AI4ALL_KERNELS
    ai4all_verify_draft(on);
#else
    if (const draft_switch loaded = loaded_draft_switch()) {
        loaded(on);
    }
#endif
}

draft_verification::draft_verification() noexcept {
    verify_draft(true);
}

draft_verification::~draft_verification() {
    verify_draft(false);
}

void release_file_pages([[maybe_unused]] const std::string & path) noexcept {
#ifdef __linux__
    try {
        char * const real = realpath(path.c_str(), nullptr);
        if (!real) {
            return;
        }
        const std::string name = std::string(" ") + real;
        std::free(real);
        std::ifstream maps("/proc/self/maps");
        for (std::string line; std::getline(maps, line);) {
            unsigned long begin = 0;
            unsigned long end   = 0;
            if (line.size() > name.size() && line.compare(line.size() - name.size(), name.size(), name) == 0 &&
                std::sscanf(line.c_str(), "%lx-%lx", &begin, &end) == 2) {
                (void)madvise(reinterpret_cast<void *>(begin), end - begin, MADV_DONTNEED);
            }
        }
    } catch (const std::exception &) {
        // The pages stay; the system takes them when it needs them.
    }
#endif
}

}  // namespace ai4all
