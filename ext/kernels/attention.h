// Attention of a verified draft. See attention.cpp.

#pragma once

#include "traits.h"

namespace ai4all::kernels {

// What computes this operation here; null for ggml's own way.
ggml::cpu::tensor_traits * attention_for(const ggml_tensor * op);

}  // namespace ai4all::kernels
