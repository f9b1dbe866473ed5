#include "draft_odds.h"

#include <algorithm>

namespace ai4all {

namespace {

// Steps to sit out at first; four times as many with each failure, so that a model which never pays
// costs almost nothing in a long text.
constexpr size_t first_rest   = 48;
constexpr size_t longest_rest = 4096;
// Drafts in a row that pay: after them, a failure is a first one again.
constexpr size_t good_while = 16;
// Drafts must give this much to be kept up.
constexpr double smallest_gain = 1.02;
constexpr double fading        = 0.93;

uint8_t bucket_of(float margin) noexcept {
    return margin < 0.5f ? 0 : margin < 1.5f ? 1 : margin < 3.0f ? 2 : 3;
}

}  // namespace

void draft_record::see(bool right) noexcept {
    right_ = right_ * fading + (right ? 1.0 : 0.0);
    tried_ = tried_ * fading + 1.0;
}

bool draft_odds::plan(size_t room, size_t ahead, const draft_price & price) noexcept {
    if (quiet_ > 0) {
        if (--quiet_ == 0) {
            begin_again();
        }
        return false;
    }
    const double      each = price.token + price.verify;
    const draft_worth best = worth_of_draft(all_.share(), std::min(room, longest_draft), each);
    if (best.n_tokens == 0) {
        if (worth_of_draft(draft_odds().all_.share(), std::min(room, longest_draft), each).n_tokens > 0) {
            rest();  // it is the record that speaks against it, and records change
        }
        return false;
    }
    // What is left to read must be won back by tokens to come. Nobody knows how many there will be:
    // at most as many as there may be, and a text that has gone on for long may go on as long again.
    if (price.behind > (1.0 - 1.0 / best.gain) * static_cast<double>(ahead)) {
        return false;
    }
    price_    = price;
    n_taken_  = 0;
    chance_   = 1.0;
    expected_ = 1.0;
    time_     = 1.0;
    return true;
}

bool draft_odds::take(float margin) noexcept {
    time_ += price_.token;
    if (n_taken_ == longest_draft) {
        return false;
    }
    const uint8_t bucket = bucket_of(margin);
    const double  chance = chance_ * by_margin_[bucket].share();
    // A token more is worth checking while it gives more for its time than the step does without it.
    if (chance * time_ <= price_.verify * expected_) {
        return false;
    }
    margins_[n_taken_++] = bucket;
    chance_              = chance;
    expected_ += chance;
    time_ += price_.verify;
    return true;
}

bool draft_odds::more() const noexcept {
    return n_taken_ < longest_draft && chance_ * all_.share() * time_ > (price_.token + price_.verify) * expected_;
}

void draft_odds::learn(size_t n_right) noexcept {
    // What came after the first wrong token was never asked for.
    for (size_t i = 0; i < std::min(n_right + 1, n_taken_); ++i) {
        all_.see(i < n_right);
        by_margin_[margins_[i]].see(i < n_right);
    }
    got_  = got_ * fading + 1.0 + static_cast<double>(n_right);
    paid_ = paid_ * fading + time_;
    if (got_ < smallest_gain * paid_) {
        rest();
    } else if (++n_learned_ == good_while) {
        rest_ = 0;
    }
}

void draft_odds::rest() noexcept {
    quiet_     = rest_ > 0 ? rest_ : first_rest;
    rest_      = std::min(quiet_ * 4, longest_rest);
    n_learned_ = 0;
}

void draft_odds::begin_again() noexcept {
    const size_t rest = rest_;
    *this             = draft_odds();
    rest_             = rest;
}

}  // namespace ai4all
