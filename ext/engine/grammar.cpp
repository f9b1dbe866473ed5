#include "grammar.h"

#include <algorithm>
#include <limits>
#include <string_view>
#include <unordered_set>
#include <utility>

#include "common.h"
#include "engine.h"

namespace ai4all {

namespace {

// Ways to go on at one time. Grammars of JSON have some tens.
constexpr size_t max_ways = 4096;
// Steps that one token may take: some tenths of a second.
constexpr size_t max_steps = 30'000'000;
// What making a node or a place counts as, so that they are bounded too: by some hundred thousand.
constexpr size_t cost_of_memory = 64;
// What is kept from one token to the next before that of the past is dropped.
constexpr size_t max_nodes  = 1u << 17;
constexpr size_t max_places = 1u << 13;

constexpr uint32_t unknown = UINT32_MAX;

constexpr uint32_t no_entry = UINT32_MAX;

[[noreturn]] void fail(const std::string & problem) {
    throw engine_error(errc::bad_request, "grammar: " + problem);
}

}  // namespace

token_table::token_table(const llama_vocab * vocab) {
    const int32_t n = llama_vocab_n_tokens(vocab);
    by_id_.assign(static_cast<size_t>(n), no_entry);
    is_end_.resize(static_cast<size_t>(n));
    for (llama_token token = 0; token < n; ++token) {
        is_end_[static_cast<size_t>(token)] = llama_vocab_is_eog(vocab, token);
        const std::string text              = common_token_to_piece(vocab, token, /*special=*/true);
        if (text.empty() || text[0] == '\0') {
            continue;
        }
        entries_.push_back({token, static_cast<uint32_t>(texts_.size()), static_cast<uint32_t>(text.size()), 0});
        texts_ += text;
    }
    const auto view = [this](const entry & e) { return std::string_view(text(e), e.size); };
    std::sort(entries_.begin(), entries_.end(), [&](const entry & a, const entry & b) {
        const int order = view(a).compare(view(b));
        return order != 0 ? order < 0 : a.token < b.token;
    });
    for (size_t i = 0; i < entries_.size(); ++i) {
        by_id_[static_cast<size_t>(entries_[i].token)] = static_cast<uint32_t>(i);
        if (i > 0) {
            const std::string_view before = view(entries_[i - 1]);
            const std::string_view here   = view(entries_[i]);
            const size_t           most   = std::min(before.size(), here.size());
            const auto             differ = std::mismatch(here.begin(), here.begin() + most, before.begin());
            entries_[i].shared            = static_cast<uint32_t>(differ.first - here.begin());
        }
    }
}

std::string token_table::text_of(llama_token token) const {
    const uint32_t index = token >= 0 && token < n_tokens() ? by_id_[static_cast<size_t>(token)] : no_entry;
    return index == no_entry ? std::string() : std::string(text(entries_[index]), entries_[index].size);
}

grammar::grammar(const std::string & text, const llama_vocab * vocab, std::shared_ptr<const token_table> tokens)
    : tokens_(std::move(tokens)), nodes_(1) {
    rules_ = parse_gbnf(text, [vocab](const std::string & name) {
        const auto ids = common_tokenize(vocab, name, /*add_special=*/false, /*parse_special=*/true);
        return ids.size() == 1 ? static_cast<int32_t>(ids[0]) : -1;
    });
    place_of({});
    stacks all;
    for (const uint32_t start : rules_.rules[rules_.root]) {
        const stacks & ways = ways_from(make(start, 0));
        all.insert(all.end(), ways.begin(), ways.end());
    }
    now_ = place_of(std::move(all));
    if (now_ == 0) {
        fail("begins in more than " + std::to_string(max_ways) + " ways");
    }
}

void grammar::spend(size_t steps) {
    spent_ += steps;
    if (spent_ > max_steps) {
        fail("has too many ways to go on to be followed");
    }
}

// The stack with what is at `at` on top of `below`.
uint32_t grammar::make(uint32_t at, uint32_t below) {
    if (rules_.elements[at].what == gbnf_element::kind::end) {
        return below;
    }
    const uint64_t key         = (static_cast<uint64_t>(at) << 32) | below;
    const auto [found, is_new] = numbers_.emplace(key, static_cast<uint32_t>(nodes_.size()));
    if (is_new) {
        spend(cost_of_memory);
        nodes_.push_back({at, below});
    }
    return found->second;
}

// The stacks with a character or a token on top that a stack comes to; itself, if it is one.
const grammar::stacks & grammar::ways_from(uint32_t id) {
    const auto known = ways_.find(id);
    if (known != ways_.end()) {
        return known->second;
    }
    stacks                       found;
    stacks                       todo{id};
    std::unordered_set<uint32_t> seen{id};
    while (!todo.empty()) {
        const uint32_t here = todo.back();
        todo.pop_back();
        const gbnf_element * top = top_of(here);
        if (!top || top->what != gbnf_element::kind::reference) {
            spend(cost_of_memory);
            found.push_back(here);
            continue;
        }
        const uint32_t rule = top->value;
        const uint32_t rest = make(nodes_[here].at + 1, nodes_[here].below);
        for (const uint32_t start : rules_.rules[rule]) {
            spend(1);
            const uint32_t next = make(start, rest);
            if (seen.insert(next).second) {
                todo.push_back(next);
            }
        }
    }
    return ways_.emplace(id, std::move(found)).first->second;
}

// The number of a place; 0 when there is no way, or more than are followed.
uint32_t grammar::place_of(stacks ways) {
    std::sort(ways.begin(), ways.end());
    ways.erase(std::unique(ways.begin(), ways.end()), ways.end());
    if (ways.size() > max_ways) {
        return 0;
    }
    const auto [found, is_new] = known_.emplace(std::move(ways), static_cast<uint32_t>(places_.size()));
    if (is_new) {
        spend(cost_of_memory * (1 + found->first.size() / 8));
        places_.push_back({found->first, {}});
        places_.back().next.fill(unknown);
    }
    return found->second;
}

// Where `character` leads; 0 is nowhere.
uint32_t grammar::step(uint32_t from, uint32_t character) {
    if (character < 128) {
        if (places_[from].next[character] == unknown) {
            const uint32_t to             = find_step(from, character);
            places_[from].next[character] = to;
        }
        return places_[from].next[character];
    }
    const uint64_t key   = (static_cast<uint64_t>(from) << 32) | character;
    const auto     known = steps_.find(key);
    if (known != steps_.end()) {
        return known->second;
    }
    const uint32_t to = find_step(from, character);
    steps_.emplace(key, to);
    return to;
}

uint32_t grammar::find_step(uint32_t from, uint32_t character) {
    stacks to;
    for (const uint32_t id : places_[from].ways) {
        spend(1);
        const gbnf_element * top = top_of(id);
        if (top && top->what == gbnf_element::kind::characters && matches(*top, character)) {
            const stacks & ways = ways_from(make(nodes_[id].at + 1, nodes_[id].below));
            spend(ways.size());
            to.insert(to.end(), ways.begin(), ways.end());
        }
    }
    return place_of(std::move(to));
}

bool grammar::matches(const gbnf_element & e, uint32_t character) {
    bool found = false;
    for (uint32_t i = e.value; i < e.value + e.count && !found; ++i) {
        found = rules_.ranges[i].first <= character && character <= rules_.ranges[i].last;
    }
    spend(e.count);
    return found != e.negated;
}

// Whether some character that begins so could match.
bool grammar::may_match(const gbnf_element & e, const partial & begun) const {
    // Two bytes for what one can say.
    if (begun.missing == 1 && begun.value < 2) {
        return false;
    }
    uint32_t       low  = begun.value << (begun.missing * 6);
    const uint32_t high = low | ((1u << (begun.missing * 6)) - 1);
    if (low == 0) {
        low = begun.missing == 2 ? 1u << 11 : begun.missing == 3 ? 1u << 16 : 0;
    }
    for (uint32_t i = e.value; i < e.value + e.count; ++i) {
        if (rules_.ranges[i].first <= high && low <= rules_.ranges[i].last) {
            return !e.negated;
        }
    }
    return e.negated;
}

namespace {

// One more byte of UTF-8. False when it cannot be; `whole` when it completes a character.
template <typename Partial>
bool take(Partial & begun, uint8_t byte, bool & whole) {
    whole = false;
    if (begun.missing > 0) {
        begun.value = (begun.value << 6) | (byte & 0x3Fu);
        whole       = --begun.missing == 0;
        return (byte & 0xC0) == 0x80;
    }
    if (byte < 0x80) {
        begun = {byte, 0};
        whole = true;
        return true;
    }
    begun.missing = byte >= 0xF0 ? 3 : byte >= 0xE0 ? 2 : 1;
    begun.value   = byte & (0x7Fu >> begun.missing);
    return byte >= 0xC0;
}

}  // namespace

uint32_t grammar::walk(uint32_t from, partial & begun, const std::string & text) {
    for (const char byte : text) {
        bool whole = false;
        if (from == 0 || !take(begun, static_cast<uint8_t>(byte), whole)) {
            return 0;
        }
        if (whole) {
            from  = begun.value == 0 ? 0 : step(from, begun.value);
            begun = {};
        }
    }
    return from;
}

// Whether a token may end here: always, unless it ends within a character that nothing could match.
bool grammar::ends_well(uint32_t here, const partial & begun) const {
    if (here == 0 || begun.missing == 0) {
        return here != 0;
    }
    const stacks & ways = places_[here].ways;
    return std::any_of(ways.begin(), ways.end(), [&](uint32_t id) {
        const gbnf_element * top = top_of(id);
        return top && top->what == gbnf_element::kind::characters && may_match(*top, begun);
    });
}

bool grammar::may_end(uint32_t here) const {
    const stacks & ways = places_[here].ways;
    return !ways.empty() && ways.front() == 0;
}

bool grammar::names_token(uint32_t id, llama_token token) const {
    const gbnf_element * top = top_of(id);
    return top && top->what == gbnf_element::kind::token &&
           (top->value == static_cast<uint32_t>(token)) != top->negated;
}

bool grammar::allows(llama_token token) {
    spent_ = 0;
    if (token < 0 || token >= tokens_->n_tokens()) {
        return false;
    }
    if (tokens_->is_end(token)) {
        return may_end(now_);
    }
    const std::string text = tokens_->text_of(token);
    if (text.empty()) {
        return false;
    }
    const stacks & ways = places_[now_].ways;
    if (std::any_of(ways.begin(), ways.end(), [&](uint32_t id) { return names_token(id, token); })) {
        return true;
    }
    partial        begun = begun_;
    const uint32_t to    = walk(now_, begun, text);
    return ends_well(to, begun);
}

size_t grammar::mask(float * logits) {
    spent_                     = 0;
    const auto        n_tokens = static_cast<size_t>(tokens_->n_tokens());
    std::vector<bool> allowed(n_tokens);

    // Where the bytes of the token before have led, after each of them. Tokens come in the order of
    // their bytes, and what begins like one that leads nowhere is not followed again.
    struct halt {
        uint32_t place;
        partial  begun;
    };
    std::vector<halt> path{{now_, begun_}};
    uint32_t          blocked = UINT32_MAX;
    for (const token_table::entry & e : tokens_->entries()) {
        if (e.shared >= blocked) {
            continue;
        }
        blocked                 = UINT32_MAX;
        const char * const text = tokens_->text(e);
        path.resize(std::min<size_t>(path.size(), e.shared + 1));
        for (auto i = static_cast<uint32_t>(path.size()) - 1; i < e.size && blocked == UINT32_MAX; ++i) {
            halt next  = path.back();
            bool whole = false;
            if (!take(next.begun, static_cast<uint8_t>(text[i]), whole)) {
                next.place = 0;
            } else if (whole) {
                next.place = next.begun.value == 0 ? 0 : step(next.place, next.begun.value);
                next.begun = {};
            }
            if (next.place == 0) {
                blocked = i + 1;
            } else {
                path.push_back(next);
            }
        }
        allowed[static_cast<size_t>(e.token)] =
            blocked == UINT32_MAX && ends_well(path.back().place, path.back().begun);
    }
    // Tokens that are named, and those that are all but some; in one pass, however many alternatives say so.
    std::vector<bool>                 named(n_tokens);
    std::vector<const gbnf_element *> others;
    bool                              is_any_named = false;
    for (const uint32_t id : places_[now_].ways) {
        const gbnf_element * top = top_of(id);
        if (!top || top->what != gbnf_element::kind::token) {
            continue;
        }
        is_any_named = true;
        if (!top->negated) {
            if (top->value < n_tokens) {  // the grammar's number, which may be no token
                named[top->value] = true;
            }
        } else if (others.empty() || (others.size() == 1 && others[0]->value != top->value)) {
            others.push_back(top);  // all but one, and all but another: all
        }
    }
    if (is_any_named) {
        for (const token_table::entry & e : tokens_->entries()) {
            const auto index = static_cast<size_t>(e.token);
            allowed[index]   = allowed[index] || named[index] || others.size() == 2 ||
                               (others.size() == 1 && others[0]->value != index);
        }
    }
    const bool end    = may_end(now_);
    size_t     n_left = 0;
    for (size_t token = 0; token < n_tokens; ++token) {
        if (!(tokens_->is_end(static_cast<llama_token>(token)) ? end : allowed[token])) {
            logits[token] = -std::numeric_limits<float>::infinity();
        } else if (logits[token] > -std::numeric_limits<float>::infinity()) {
            ++n_left;
        }
    }
    return n_left;
}

void grammar::accept(llama_token token) {
    spent_ = 0;
    if (!allows(token)) {
        throw engine_error(errc::compute_failed, "a token that the grammar does not allow was sampled");
    }
    if (tokens_->is_end(token)) {
        return;
    }
    stacks                       next;
    std::unordered_set<uint32_t> followed;  // many alternatives may lead to one
    for (const uint32_t id : places_[now_].ways) {
        if (names_token(id, token)) {
            const uint32_t to = make(nodes_[id].at + 1, nodes_[id].below);
            if (!followed.insert(to).second) {
                continue;
            }
            const stacks & ways = ways_from(to);
            spend(ways.size());
            next.insert(next.end(), ways.begin(), ways.end());
        }
    }
    partial        begun = begun_;
    const uint32_t to    = walk(now_, begun, tokens_->text_of(token));
    if (!ends_well(to, begun)) {
        begun = {};
    } else if (next.empty()) {
        now_ = to;
    } else {
        next.insert(next.end(), places_[to].ways.begin(), places_[to].ways.end());
    }
    if (!next.empty()) {
        now_ = place_of(std::move(next));
        if (now_ == 0) {
            fail("has too many ways to go on to be followed");
        }
    }
    begun_ = begun;
    if (nodes_.size() > max_nodes || places_.size() > max_places || steps_.size() > max_nodes) {
        forget();
    }
}

// Keep the nodes that the present place is made of, and forget the rest.
void grammar::forget() {
    std::vector<node>                      kept(1);
    std::unordered_map<uint64_t, uint32_t> numbers;
    std::unordered_map<uint32_t, uint32_t> moved{{0, 0}};
    stacks                                 ways = places_[now_].ways;
    for (uint32_t & top : ways) {
        // From the top down to what is moved already, and up again.
        stacks path;
        for (uint32_t id = top; moved.find(id) == moved.end(); id = nodes_[id].below) {
            path.push_back(id);
        }
        for (; !path.empty(); path.pop_back()) {
            const node old     = nodes_[path.back()];
            const node fresh   = {old.at, moved.at(old.below)};
            const auto number  = static_cast<uint32_t>(kept.size());
            moved[path.back()] = number;
            numbers.emplace((static_cast<uint64_t>(fresh.at) << 32) | fresh.below, number);
            kept.push_back(fresh);
        }
        top = moved.at(top);
    }
    nodes_   = std::move(kept);
    numbers_ = std::move(numbers);
    ways_.clear();
    places_.clear();
    known_.clear();
    steps_.clear();
    spent_ = 0;
    place_of({});
    now_ = place_of(std::move(ways));
}

}  // namespace ai4all
