// How many tokens one decode may have so that each gets the bits that it would have got alone.

#pragma once

#include <cstdint>

#include "llama.h"

namespace ai4all {

// At most `limit`, at least 1. Kernels of ggml for several tokens may add up in another order than those for
// one, from some count on and for some types of weights; a draft that is verified by them may end in
// another text. Measured on a few rows of one weight of each kind that lies in the machine's memory;
// other devices are not asked. Engine thread only.
// Throws engine_error: out_of_memory.
int32_t longest_exact_batch(const llama_model * model, int32_t limit);

}  // namespace ai4all
