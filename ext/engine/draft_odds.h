// Whether a draft model pays: what its drafts cost, and how often they were right for one request.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "lookup.h"

namespace ai4all {

// What a draft costs now; 1 is a decode of one token by the target.
struct draft_price {
    double token  = 0.0;  // the draft model computes a token more
    double verify = 0.0;  // the target checks a token more
    double behind = 0.0;  // the draft model reads what it has not seen yet
};

// How often something was right. Old observations fade: a text may become easier, or harder.
class draft_record {
  public:
    constexpr draft_record(double right, double tried) : right_(right), tried_(tried) {}
    void   see(bool right) noexcept;
    double share() const noexcept { return right_ / tried_; }

  private:
    double right_;
    double tried_;
};

// One request's experience with the draft model. A draft goes: plan(), then take() for each token and
// more() before the next, then learn().
class draft_odds {
  public:
    // Whether a draft of at most `room` tokens is worth it, for a request that has perhaps `ahead` more
    // tokens to come. Counts down the rest after drafts that did not pay.
    bool plan(size_t room, size_t ahead, const draft_price & price) noexcept;

    // The draft model computed a token whose logit leads the next best by `margin`: whether the
    // target should check it. After a no the draft is over.
    bool take(float margin) noexcept;

    // Whether computing one more token is worth it.
    bool more() const noexcept;

    // The draft was tried, perhaps an empty one: so many of its tokens were right.
    void learn(size_t n_right) noexcept;

    // Steps that are still to be sat out.
    size_t resting() const noexcept { return quiet_; }

  private:
    void rest() noexcept;
    void begin_again() noexcept;

    // Each belief begins weak, so that observation soon outweighs it.
    draft_record                all_       = {2.4, 3.0};
    std::array<draft_record, 4> by_margin_ = {{{1.35, 3.0}, {1.95, 3.0}, {2.4, 3.0}, {2.8, 3.0}}};
    // Tokens that steps with a draft gave, and their time in decodes of one token.
    double got_  = 7.2;
    double paid_ = 6.0;

    size_t quiet_     = 0;
    size_t rest_      = 0;  // length of the next rest; 0: the first
    size_t n_learned_ = 0;  // drafts since the last rest

    // The draft that is being made.
    draft_price                        price_;
    std::array<uint8_t, longest_draft> margins_  = {};
    size_t                             n_taken_  = 0;
    double                             chance_   = 1.0;  // that all of it is right
    double                             expected_ = 1.0;  // tokens that the step will give
    double                             time_     = 1.0;  // of the step
};

}  // namespace ai4all
