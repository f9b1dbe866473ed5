// How the CPU stores weights other than as the file has them.

#pragma once

#include <string>
#include <vector>

namespace ai4all {

// Add our layouts to those of ggml. Before the first load; idempotent.
void cpu_layouts_install();

// Names of all layouts of this build on this CPU, such as CPU_REPACK.
std::vector<std::string> cpu_layouts();

}  // namespace ai4all
