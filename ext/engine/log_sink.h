// Where llama.cpp's log lines go: a bounded ring, without Python and without stderr.

#pragma once

#include <cstdint>
#include <string>

#include "llama.h"

namespace ai4all {

// Route the libraries' logs here and install the abort handler. Once in a process.
void log_install();

// The error lines that this thread caused since the last call, joined; for load failures.
std::string log_take_errors();

// llama_decode. What it says of a decode that the abort callback broke off (status 2) is no error of anybody's,
// and is logged for whoever debugs.
int32_t decode(llama_context * ctx, const llama_batch & batch);

}  // namespace ai4all
