// A GPU made of the CPU: a device of its own to everything above it, with memory that can run out.

#pragma once

#include <cstddef>

// Register "Shadow0". Once in a process, before the first load.
void shadow_gpu_register();

// Bytes that it can hold from now on.
void shadow_gpu_set_memory(size_t total);
