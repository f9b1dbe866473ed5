// Where llama.cpp's log lines go: a bounded ring, without Python and without stderr.

#pragma once

#include <string>

namespace ai4all {

// Route the libraries' logs here and install the abort handler. Once in a process.
void log_install();

// The error lines that this thread caused since the last call, joined; for load failures.
std::string log_take_errors();

}  // namespace ai4all
