// The chat template that a model file brings: a program of whoever made the file.

#pragma once

#include "chat.h"
#include "llama.h"

namespace ai4all {

// Reads a model's template; null when it has none that can be read. Reading one runs it, and nothing
// in it need ever end: one that takes more than half a second of processor time aborts the process,
// as a failed assertion of llama.cpp would.
common_chat_templates_ptr read_chat_template(const llama_model * model);

}  // namespace ai4all
