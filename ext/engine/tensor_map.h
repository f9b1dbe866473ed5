// The tensors of a model by name. llama.cpp's own tests use this too; its header drags in all of the model's
// inside.

#pragma once

#include <string>
#include <utility>
#include <vector>

#include "ggml.h"
#include "llama.h"

const std::vector<std::pair<std::string, ggml_tensor *>> & llama_internal_get_tensor_map(const llama_model * model);
