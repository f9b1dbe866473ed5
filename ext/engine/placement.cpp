#include "placement.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <utility>

#include "../src/llama-ext.h"
#include "ggml.h"
#include "tensor_map.h"

namespace ai4all {

namespace {

constexpr const char * cpu_name = "CPU";

bool is_gpu(ggml_backend_dev_t dev) {
    const enum ggml_backend_dev_type type = ggml_backend_dev_type(dev);
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

// Memory of the machine counts for the CPU, whoever pinned it.
std::string owner_of(ggml_backend_buffer_type_t type) {
    ggml_backend_dev_t dev = ggml_backend_buft_get_device(type);
    return dev && is_gpu(dev) && !ggml_backend_buft_is_host(type) ? ggml_backend_dev_name(dev) : cpu_name;
}

// The layer that a tensor such as "blk.12.attn_q.weight" belongs to, or -1.
int32_t layer_of(const std::string & name) {
    return name.compare(0, 4, "blk.") == 0 ? std::atoi(name.c_str() + 4) : -1;
}

// The device that holds the most of each layer.
std::map<int32_t, std::string> owners_of_layers(const llama_model * model) {
    std::map<int32_t, std::map<std::string, size_t>> bytes;
    for (const auto & [name, tensor] : llama_internal_get_tensor_map(model)) {
        if (layer_of(name) >= 0 && tensor->buffer) {
            bytes[layer_of(name)][owner_of(ggml_backend_buffer_get_type(tensor->buffer))] += ggml_nbytes(tensor);
        }
    }
    std::map<int32_t, std::string> owners;
    for (const auto & [layer, by_device] : bytes) {
        owners[layer] = std::max_element(by_device.begin(), by_device.end(), [](const auto & a, const auto & b) {
                            return a.second < b.second;
                        })->first;
    }
    return owners;
}

}  // namespace

std::vector<ggml_backend_dev_t> devices_of(const load_params & params) {
    std::vector<ggml_backend_dev_t> devices;
    for (const std::string & name : params.devices) {
        if (name == cpu_name) {
            continue;
        }
        ggml_backend_dev_t dev = ggml_backend_dev_by_name(name.c_str());
        if (!dev || !is_gpu(dev)) {
            throw engine_error(errc::load_failed, "the device " + name + " is not here");
        }
        devices.push_back(dev);
    }
    devices.push_back(nullptr);
    return devices;
}

std::vector<device_share> placement_of(const llama_model * model, const llama_context * ctx) {
    std::map<std::string, device_share> by_device;
    for (const auto & [type, bytes] : llama_get_memory_breakdown(ctx)) {
        device_share & share = by_device[owner_of(type)];
        share.weights += bytes.model;
        share.context += bytes.context;
        share.compute += bytes.compute;
    }
    for (const auto & [layer, owner] : owners_of_layers(model)) {
        ++by_device[owner].n_layers;
    }
    device_share cpu = by_device[cpu_name];
    by_device.erase(cpu_name);
    std::vector<device_share> shares;
    for (const auto & [name, share] : by_device) {
        shares.push_back(share);
        shares.back().device = name;
    }
    cpu.device = cpu_name;
    shares.push_back(cpu);
    return shares;
}

std::string placement_name(const std::vector<device_share> & shares) {
    std::string name;
    for (const device_share & share : shares) {
        if (share.n_layers > 0) {
            name += (name.empty() ? "" : "+") + share.device;
        }
    }
    return name.empty() ? cpu_name : name;
}

}  // namespace ai4all
