// Speculation by prompt lookup: what followed the last time the text ended like this.
//
// A draft costs time whether it is right or not, so its length is chosen by what was measured: how
// often drafts of this request were right, and what a token more in a decode costs on this machine.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "llama.h"

namespace ai4all {

// Most tokens in one draft.
constexpr size_t longest_draft = 16;

// What a decode costs by the number of its tokens, as measured on one loaded model.
class decode_cost {
  public:
    void learn(size_t n_tokens, int64_t ns) noexcept;
    bool known() const noexcept { return one_ns_ > 0.0; }
    // Share of a one-token decode that each further token adds.
    double per_token() const noexcept { return more_; }

  private:
    double one_ns_ = 0.0;
    double more_   = 0.4;  // until measured: a machine on which batching helps little
};

class lookup_drafter {
  public:
    // A continuation of `tokens` that may be right, at most `room` long; often empty.
    std::vector<llama_token> draft(const std::vector<llama_token> & tokens, size_t room, const decode_cost & cost);

    // The last draft was tried: so many of its tokens were right.
    void learn(size_t n_drafted, size_t n_right) noexcept;

  private:
    struct record {
        double right;
        double tried;
    };

    size_t worthwhile(double p, size_t room, double cost) const noexcept;

    // By length of the match; each begins as a weak belief that observation soon outweighs.
    std::array<record, 3> records_ = {{{1.2, 3.0}, {2.0, 3.0}, {2.7, 3.0}}};
    size_t                bucket_  = 0;
    size_t                quiet_   = 0;  // steps to sit out after drafts that did not pay
};

}  // namespace ai4all
