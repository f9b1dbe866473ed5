#include <algorithm>

#include "backends.h"
#include "cpu_layouts.h"
#include "engine.h"
#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"
#include "log_sink.h"

namespace ai4all {

build_info get_build_info() {
    log_install();
    load_backends();
    build_info info;
    info.llama_commit = AI4ALL_LLAMA_COMMIT;
    if (info.llama_commit.empty()) {
        info.llama_commit = ggml_commit();
    }
    info.ggml_version = ggml_version();
    info.compiler     = AI4ALL_COMPILER;
    info.build_type   = AI4ALL_BUILD_TYPE;
    info.sanitize     = AI4ALL_SANITIZE;
    info.cpu_variant  = cpu_variant();
    info.not_loaded   = backends_not_loaded();
    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        ggml_backend_reg_t reg = ggml_backend_reg_get(i);
        info.backends.emplace_back(ggml_backend_reg_name(reg));
        const auto features = reinterpret_cast<ggml_backend_get_features_t>(
            ggml_backend_reg_get_proc_address(reg, "ggml_backend_get_features"));
        if (!features || info.backends.back() != "CPU") {
            continue;
        }
        for (ggml_backend_feature * feature = features(reg); feature->name; ++feature) {
            if (std::string(feature->value) == "1") {
                info.cpu_features.emplace_back(feature->name);
            }
        }
    }
    for (std::string & name : cpu_layouts()) {
        info.cpu_features.push_back(std::move(name));
    }
    return info;
}

std::vector<device_info> get_devices() {
    log_install();
    load_backends();
    std::vector<device_info> devices;
    for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
        ggml_backend_dev_t     dev = ggml_backend_dev_get(i);
        ggml_backend_dev_props props;
        ggml_backend_dev_get_props(dev, &props);

        device_info device;
        device.name         = props.name ? props.name : "";
        device.description  = props.description ? props.description : "";
        device.backend      = ggml_backend_reg_name(ggml_backend_dev_backend_reg(dev));
        device.id           = props.device_id ? props.device_id : "";
        device.memory_total = props.memory_total;
        device.memory_free  = props.memory_free;
        switch (props.type) {
            case GGML_BACKEND_DEVICE_TYPE_CPU: device.kind = "cpu"; break;
            case GGML_BACKEND_DEVICE_TYPE_GPU: device.kind = "gpu"; break;
            case GGML_BACKEND_DEVICE_TYPE_IGPU: device.kind = "igpu"; break;
            default: device.kind = "accel"; break;
        }
        devices.push_back(std::move(device));
    }
    return devices;
}

}  // namespace ai4all
