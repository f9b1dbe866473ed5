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
    // Time of a decode of one token; 0 until measured.
    double one_ns() const noexcept { return one_ns_; }
    // Share of a one-token decode that each further token adds.
    double per_token() const noexcept { return more_; }

  private:
    double one_ns_ = 0.0;
    double more_   = 0.4;  // until measured: a machine on which batching helps little
};

// How long a draft should be, and how many times as fast it makes decoding. No tokens: it does not.
struct draft_worth {
    size_t n_tokens = 0;
    double gain     = 1.0;
};

// Each token is right with probability `p` while those before it were, and costs a share `cost` of a
// decode of one token.
draft_worth worth_of_draft(double p, size_t room, double cost) noexcept;

class lookup_drafter {
  public:
    // A continuation of `tokens` that may be right, at most `room` long; often empty.
    std::vector<llama_token> draft(const std::vector<llama_token> & tokens, size_t room, const decode_cost & cost);

    // The last draft was tried: so many of its tokens were right.
    void learn(size_t n_drafted, size_t n_right) noexcept;

    // Whether the last draft followed a match so long that it is hardly chance.
    bool is_quotation() const noexcept { return bucket_ + 1 == records_.size(); }

  private:
    struct record {
        double right;
        double tried;
    };

    // By length of the match; each begins as a weak belief that observation soon outweighs.
    std::array<record, 3> records_ = {{{1.2, 3.0}, {2.0, 3.0}, {2.7, 3.0}}};
    size_t                bucket_  = 0;
    size_t                quiet_   = 0;  // steps to sit out after drafts that did not pay
};

}  // namespace ai4all
