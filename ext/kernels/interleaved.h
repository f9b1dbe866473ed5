// Matrix products over Q4_1 weights of which eight rows lie side by side. See interleaved.cpp.

#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// Offer the layout to every model that is loaded from now on; idempotent. Without effect where the
// CPU lacks the instructions. Belongs before the first load, since ggml asks once.
void ai4all_register_interleaved(void);

#ifdef __cplusplus
}
#endif
