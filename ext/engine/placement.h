// Which devices a model runs on: what is asked for, and what came of it. Engine thread only.

#pragma once

#include <string>
#include <vector>

#include "engine.h"
#include "ggml-backend.h"
#include "llama.h"

namespace ai4all {

// The devices of a load as llama.cpp takes them: ended by a null pointer, empty for the CPU alone.
// Throws engine_error: load_failed (one of them is not here, or is no GPU).
std::vector<ggml_backend_dev_t> devices_of(const load_params & params);

// What each device really holds, read from the buffers; the CPU last, and always there.
std::vector<device_share> placement_of(const llama_model * model, const llama_context * ctx);

// The devices that hold layers, by share: "CPU", "CUDA0", "CUDA0+CUDA1", "CUDA0+CPU".
std::string placement_name(const std::vector<device_share> & shares);

}  // namespace ai4all
