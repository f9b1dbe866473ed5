// Where a model's layers really are, on a machine with a GPU that this program makes up:
// placement_test MODEL.gguf, or placement_test MODEL.gguf N to print what N layers on it take.

#include <poll.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "engine.h"
#include "shadow_gpu.h"

using namespace ai4all;

static std::string model_path;

#define CHECK(condition)                                                         \
    do {                                                                         \
        if (!(condition)) {                                                      \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                        \
        }                                                                        \
    } while (0)

// The last event of a command, and the tokens before it.
static event last_of(engine & e, uint64_t id, std::vector<int32_t> * tokens = nullptr) {
    for (;;) {
        pollfd ready = {e.fd(), POLLIN, 0};
        CHECK(poll(&ready, 1, 60000) == 1);
        std::vector<event> events;
        e.drain(events);
        for (event & item : events) {
            CHECK(item.id == id);
            if (item.kind == event_kind::token && tokens) {
                tokens->push_back(item.token);
            } else if (item.kind == event_kind::loaded || item.kind == event_kind::finished ||
                       item.kind == event_kind::failed) {
                return item;
            }
        }
    }
}

static load_params params_for(int32_t n_gpu_layers, std::vector<std::string> devices) {
    load_params params;
    params.path            = model_path;
    params.n_ctx           = 512;
    params.n_batch         = 64;
    params.n_ubatch        = 64;
    params.n_gpu_layers    = n_gpu_layers;
    params.devices         = std::move(devices);
    params.n_threads       = 1;
    params.n_threads_batch = 1;
    return params;
}

static model_info loaded(engine & e, int32_t n_gpu_layers, std::vector<std::string> devices = {}) {
    const event last = last_of(e, e.load(params_for(n_gpu_layers, std::move(devices))));
    if (last.kind != event_kind::loaded) {
        std::fprintf(stderr, "%s\n", last.text.c_str());
    }
    CHECK(last.kind == event_kind::loaded);
    return e.model();
}

static event refused(engine & e, int32_t n_gpu_layers, std::vector<std::string> devices = {}) {
    const event last = last_of(e, e.load(params_for(n_gpu_layers, std::move(devices))));
    CHECK(last.kind == event_kind::failed);
    return last;
}

static std::vector<int32_t> answer(engine & e) {
    generate_params params;
    params.prompt     = "the sea the sea the sea the sea";
    params.max_tokens = 24;
    params.ignore_eos = true;
    std::vector<int32_t> tokens;
    CHECK(last_of(e, e.generate(params), &tokens).kind == event_kind::finished);
    return tokens;
}

static void test_devices() {
    bool found = false;
    for (const device_info & device : get_devices()) {
        if (device.name == "Shadow0") {
            found = true;
            CHECK(device.kind == "gpu" && device.backend == "Shadow" && device.id == "0000:5d:00.0");
            CHECK(device.memory_total == 1u << 30 && device.memory_free == device.memory_total);
        }
    }
    CHECK(found);
}

static void test_placement() {
    engine     e(16);
    model_info whole = loaded(e, -1);
    CHECK(whole.device == "Shadow0");
    CHECK(whole.placement.size() == 2 && whole.placement[1].device == "CPU");
    CHECK(whole.placement[0].n_layers == 2 && whole.placement[1].n_layers == 0);
    CHECK(whole.placement[0].context > 0 && whole.placement[1].context == 0);
    CHECK(whole.placement[0].weights > 0 && whole.placement[0].compute > 0);
    const std::vector<int32_t> on_gpu = answer(e);

    model_info cpu = loaded(e, 0);
    CHECK(cpu.device == "CPU" && cpu.placement.size() == 1);
    CHECK(cpu.placement[0].n_layers == 2 && cpu.placement[0].context == whole.placement[0].context);
    CHECK(answer(e) == on_gpu);
    CHECK(loaded(e, -1, {"CPU"}).placement.size() == 1);

    // The output counts as a layer: with two, one of the model's own is left to the CPU.
    model_info split = loaded(e, 2, {"Shadow0"});
    CHECK(split.device == "Shadow0+CPU");
    CHECK(split.placement[0].n_layers == 1 && split.placement[1].n_layers == 1);
    CHECK(split.placement[0].context == split.placement[1].context);
    CHECK(answer(e) == on_gpu);
}

static void test_what_is_not_here() {
    engine      e(16);
    const event absent = refused(e, -1, {"Shadow1"});
    CHECK(absent.code == errc::load_failed && absent.text == "the device Shadow1 is not here");

    shadow_gpu_set_memory(1000);
    const event full = refused(e, -1, {"Shadow0"});
    CHECK(full.code == errc::out_of_memory);
    // For the weights alone there is room.
    shadow_gpu_set_memory(1u << 30);
    const uint64_t weights = loaded(e, -1).placement[0].weights;
    CHECK(last_of(e, e.load(params_for(0, {}))).kind == event_kind::loaded);
    shadow_gpu_set_memory(weights + 1000);
    CHECK(refused(e, -1, {"Shadow0"}).code == errc::out_of_memory);
    shadow_gpu_set_memory(1u << 30);
    CHECK(loaded(e, -1).device == "Shadow0");
}

int main(int argc, char ** argv) {
    if (argc != 2 && argc != 3) {
        std::fprintf(stderr, "usage: %s MODEL.gguf [N]\n", argv[0]);
        return 2;
    }
    model_path = argv[1];
    shadow_gpu_register();
    if (argc == 3) {
        engine e(16);
        for (const device_share & share : loaded(e, std::atoi(argv[2])).placement) {
            std::printf("{\"device\":\"%s\",\"n_layers\":%d,\"weights\":%llu,\"context\":%llu,\"compute\":%llu}\n",
                        share.device.c_str(), share.n_layers, static_cast<unsigned long long>(share.weights),
                        static_cast<unsigned long long>(share.context), static_cast<unsigned long long>(share.compute));
        }
        return 0;
    }
    test_devices();
    test_placement();
    test_what_is_not_here();
    std::printf("3 passed, 0 failed\n");
    return 0;
}
