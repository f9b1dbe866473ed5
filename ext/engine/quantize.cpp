#include <new>

#include "backends.h"
#include "engine.h"
#include "llama.h"
#include "log_sink.h"

namespace ai4all {

namespace {

struct named_type {
    const char * name;
    llama_ftype  type;
};

constexpr named_type types[] = {
    {"F32", LLAMA_FTYPE_ALL_F32},          {"F16", LLAMA_FTYPE_MOSTLY_F16},   {"BF16", LLAMA_FTYPE_MOSTLY_BF16},
    {"Q8_0", LLAMA_FTYPE_MOSTLY_Q8_0},     {"Q6_K", LLAMA_FTYPE_MOSTLY_Q6_K}, {"Q5_K_M", LLAMA_FTYPE_MOSTLY_Q5_K_M},
    {"Q5_K_S", LLAMA_FTYPE_MOSTLY_Q5_K_S}, {"Q5_0", LLAMA_FTYPE_MOSTLY_Q5_0}, {"Q4_K_M", LLAMA_FTYPE_MOSTLY_Q4_K_M},
    {"Q4_K_S", LLAMA_FTYPE_MOSTLY_Q4_K_S}, {"Q4_0", LLAMA_FTYPE_MOSTLY_Q4_0}, {"Q4_1", LLAMA_FTYPE_MOSTLY_Q4_1},
    {"IQ4_NL", LLAMA_FTYPE_MOSTLY_IQ4_NL},
};

}  // namespace

void quantize(const std::string & source, const std::string & target, const std::string & type, int32_t n_threads) {
    log_install();
    load_backends();
    llama_backend_init();
    llama_model_quantize_params params = llama_model_quantize_default_params();
    params.nthread                     = n_threads;
    params.allow_requantize            = true;
    bool known                         = false;
    for (const named_type & entry : types) {
        if (type == entry.name) {
            params.ftype = entry.type;
            known        = true;
        }
    }
    if (!known) {
        std::string names;
        for (const named_type & entry : types) {
            names += names.empty() ? entry.name : std::string(", ") + entry.name;
        }
        throw engine_error(errc::bad_request, "type: there is no '" + type + "'; use one of " + names);
    }
    log_take_errors();
    uint32_t status = 1;
    try {
        status = llama_model_quantize(source.c_str(), target.c_str(), &params);
    } catch (const std::bad_alloc &) {
        throw engine_error(errc::out_of_memory, "not enough memory to re-encode the model");
    } catch (const std::exception & error) {
        throw engine_error(errc::load_failed, error.what());
    }
    if (status != 0) {
        const std::string log = log_take_errors();
        throw engine_error(errc::load_failed, log.empty() ? "the model could not be re-encoded" : log);
    }
}

}  // namespace ai4all
