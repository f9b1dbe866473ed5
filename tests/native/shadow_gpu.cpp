#include "shadow_gpu.h"

#include <atomic>

#include "ggml-backend-impl.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"

namespace {

std::atomic<size_t> memory_total{1u << 30};
std::atomic<size_t> memory_used{0};

extern ggml_backend_device      device;
extern ggml_backend_buffer_type buffer_type;
extern ggml_backend_reg         registry;

void (*free_cpu_buffer)(ggml_backend_buffer_t) = nullptr;

ggml_backend_buffer_t alloc_buffer(ggml_backend_buffer_type_t type, size_t size) {
    if (memory_used + size > memory_total) {
        return nullptr;
    }
    // Memory of the CPU under another name: not "host", so that nobody reads it without a copy.
    ggml_backend_buffer_t buffer = ggml_backend_buft_alloc_buffer(ggml_backend_cpu_buffer_type(), size);
    if (buffer) {
        memory_used += size;
        buffer->buft              = type;
        free_cpu_buffer           = buffer->iface.free_buffer;
        buffer->iface.free_buffer = [](ggml_backend_buffer_t each) {
            memory_used -= each->size;
            free_cpu_buffer(each);
        };
    }
    return buffer;
}

ggml_guid_t guid() {
    static ggml_guid id = {'s', 'h', 'a', 'd', 'o', 'w', '-', 'g', 'p', 'u'};
    return &id;
}

ggml_backend_t cpu_of(ggml_backend_t backend) {
    return static_cast<ggml_backend_t>(backend->context);
}

ggml_backend_i backend_interface() {
    ggml_backend_i iface = {};
    iface.get_name       = [](ggml_backend_t) { return "Shadow0"; };
    iface.free           = [](ggml_backend_t backend) {
        ggml_backend_free(cpu_of(backend));
        delete backend;
    };
    iface.graph_compute = [](ggml_backend_t backend, ggml_cgraph * graph) {
        return ggml_backend_graph_compute(cpu_of(backend), graph);
    };
    return iface;
}

ggml_backend_device_i device_interface() {
    ggml_backend_device_i iface = {};
    iface.get_name              = [](ggml_backend_dev_t) { return "Shadow0"; };
    iface.get_description       = [](ggml_backend_dev_t) { return "a GPU made of the CPU"; };
    iface.get_type              = [](ggml_backend_dev_t) { return GGML_BACKEND_DEVICE_TYPE_GPU; };
    iface.get_memory            = [](ggml_backend_dev_t, size_t * free, size_t * total) {
        *total = memory_total;
        *free  = memory_total > memory_used ? memory_total - memory_used : 0;
    };
    iface.get_props = [](ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
        *props             = {};
        props->name        = dev->iface.get_name(dev);
        props->description = dev->iface.get_description(dev);
        props->type        = dev->iface.get_type(dev);
        props->device_id   = "0000:5d:00.0";
        dev->iface.get_memory(dev, &props->memory_free, &props->memory_total);
    };
    iface.init_backend = [](ggml_backend_dev_t, const char *) -> ggml_backend_t {
        return new ggml_backend{guid(), backend_interface(), &device, ggml_backend_cpu_init()};
    };
    iface.get_buffer_type = [](ggml_backend_dev_t) { return &buffer_type; };
    iface.supports_op     = [](ggml_backend_dev_t, const ggml_tensor * op) {
        return ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
    };
    iface.supports_buft = [](ggml_backend_dev_t, ggml_backend_buffer_type_t type) { return type == &buffer_type; };
    return iface;
}

ggml_backend_buffer_type_i buffer_type_interface() {
    ggml_backend_buffer_type_i iface = {};
    iface.get_name                   = [](ggml_backend_buffer_type_t) { return "Shadow0"; };
    iface.alloc_buffer               = alloc_buffer;
    iface.get_alignment              = [](ggml_backend_buffer_type_t) {
        return ggml_backend_buft_get_alignment(ggml_backend_cpu_buffer_type());
    };
    return iface;
}

ggml_backend_reg_i registry_interface() {
    ggml_backend_reg_i iface = {};
    iface.get_name           = [](ggml_backend_reg_t) { return "Shadow"; };
    iface.get_device_count   = [](ggml_backend_reg_t) -> size_t { return 1; };
    iface.get_device         = [](ggml_backend_reg_t, size_t) { return &device; };
    return iface;
}

ggml_backend_reg         registry    = {GGML_BACKEND_API_VERSION, registry_interface(), nullptr};
ggml_backend_device      device      = {device_interface(), &registry, nullptr};
ggml_backend_buffer_type buffer_type = {buffer_type_interface(), &device, nullptr};

}  // namespace

void shadow_gpu_register() {
    ggml_backend_register(&registry);
}

void shadow_gpu_set_memory(size_t total) {
    memory_total = total;
}
