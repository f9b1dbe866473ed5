// The backends of ggml that this process has.

#pragma once

#include <string>
#include <utility>
#include <vector>

namespace ai4all {

// Any thread. Loads what lies in libs/ beside the engine, once; does nothing where the backends are
// linked in. Nothing is ever taken from the working directory, from beside the interpreter or from a
// place that a variable names. Must come before the first call into llama.cpp.
void load_backends();

// Any thread, after load_backends(). Of each backend that was built but could not be loaded, its
// name ("cuda") and why.
const std::vector<std::pair<std::string, std::string>> & backends_not_loaded();

// Any thread, after load_backends(). Which of several CPU variants was chosen ("haswell"); empty
// where there is but one.
const std::string & cpu_variant();

// Any thread, after load_backends(). ai4all_verify_draft() of the CPU backend that was loaded; null where
// it has none, or is linked in.
using draft_switch = void (*)(bool);
draft_switch loaded_draft_switch();

}  // namespace ai4all
