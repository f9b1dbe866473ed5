// How the CPU stores weights other than as the file has them.

#pragma once

#include <string>
#include <vector>

namespace ai4all {

// Add our layouts to those of ggml. Before the first load; idempotent.
void cpu_layouts_install();

// Names of all layouts of this build on this CPU, such as CPU_REPACK.
std::vector<std::string> cpu_layouts();

// While one of these lives, several tokens of one sequence are computed as one after the other.
struct draft_verification {
    draft_verification() noexcept;
    ~draft_verification();
    draft_verification(const draft_verification &)             = delete;
    draft_verification & operator=(const draft_verification &) = delete;
};

// Let go of the pages of a mapped model file. Those of weights that were copied into another layout are
// not needed again; the others come back from the system's cache when they are used.
void release_file_pages(const std::string & path) noexcept;

}  // namespace ai4all
