#include "cpu_layouts.h"

#include "ggml-backend.h"
#ifdef AI4ALL_KERNELS
#include "interleaved.h"
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

}  // namespace ai4all
