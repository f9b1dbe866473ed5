// What the engine asks of the kernels.

#pragma once

#ifdef __cplusplus
extern "C" {
#endif

// Offer the interleaved layout to every model that is loaded from now on; idempotent. Without effect
// where the CPU lacks the instructions. Belongs before the first load, since ggml asks once.
void ai4all_register_interleaved(void);

// While on, a decode of a few tokens of one sequence gives, to the last bit, what decodes of one token
// after the other would have given. For the verification of a draft; of the whole process.
void ai4all_verify_draft(bool on);

#ifdef __cplusplus
}
#endif
