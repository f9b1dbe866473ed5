// What the engine asks of the kernels.

//
// In a library that is loaded at run time the engine looks them up by name. Nothing may run by itself
// when such a library is opened: each is opened, also those for CPUs that this one is not, just to ask
// it whether it fits.

#pragma once

#if defined(__GNUC__)
#define AI4ALL_KERNEL_API __attribute__((visibility("default")))
#else
#define AI4ALL_KERNEL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Offer the interleaved layout to every model that is loaded from now on; idempotent. Without effect
// where the CPU lacks the instructions. Belongs before the first load, since ggml asks once.
AI4ALL_KERNEL_API void ai4all_register_interleaved(void);

// While on, a decode of a few tokens of one sequence gives, to the last bit, what decodes of one token
// after the other would have given. For the verification of a draft; of the whole process.
AI4ALL_KERNEL_API void ai4all_verify_draft(bool on);

#ifdef __cplusplus
}
#endif
