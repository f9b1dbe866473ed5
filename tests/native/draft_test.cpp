// Speculation by a draft model: draft_test TINY.gguf, with the other models of models.py beside it.
//
// Lengths of drafts are fixed here, so that what is tested does not hang on how fast the machine is.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "draft_model.h"
#include "draft_odds.h"
#include "engine.h"
#include "harness.h"

using namespace ai4all;

static std::string folder;

// A draft model beside the tiny one; `length` tokens in each draft, 0: as many as pay.
static load_params with_draft(const std::string & name, uint32_t length = 6, uint32_t n_slots = 1) {
    load_params params  = small_load(folder + "tiny.gguf", n_slots);
    params.draft_path   = folder + name;
    params.draft_tokens = length;
    return params;
}

static std::vector<generate_params> kinds_of_requests() {
    std::vector<generate_params> requests;
    for (const int n : {0, 3, 40}) {
        requests.push_back(greedy("Hello, world! " + words(n), 60));
    }
    generate_params drawn = greedy("Hello", 60);
    drawn.temperature     = 1.2f;
    drawn.top_p           = 0.9f;
    drawn.seed            = 11;
    requests.push_back(drawn);
    drawn.repetition_penalty = 1.3f;
    requests.push_back(drawn);
    generate_params penalty    = greedy("They have", 60);
    penalty.repetition_penalty = 1.1f;
    requests.push_back(penalty);
    generate_params schema = greedy("Hello", 120);
    schema.ignore_eos      = false;
    schema.json_schema     = R"({"type":"array","items":{"type":"boolean"},"minItems":8,"maxItems":12})";
    requests.push_back(schema);
    return requests;
}

// Each request with and without speculation: the tokens must be the same.
static void compare(engine & e, history & h, event & sum) {
    for (generate_params params : kinds_of_requests()) {
        const uint64_t with    = e.generate(params);
        params.speculate       = false;
        const uint64_t without = e.generate(params);
        h.wait(e, {with, without});
        CHECK(h.last(with).kind == event_kind::finished);
        CHECK(h.tokens(with) == h.tokens(without) && h.text(with) == h.text(without));
        CHECK(h.last(with).reason == h.last(without).reason);
        CHECK(h.last(without).n_drafted == 0 && h.last(without).n_by_model == 0);
        CHECK(h.last(with).n_by_model <= h.last(with).n_drafted);
        sum.n_drafted += h.last(with).n_drafted;
        sum.n_draft_right += h.last(with).n_draft_right;
        sum.n_by_model += h.last(with).n_by_model;
    }
}

static void test_odds() {
    const draft_price cheap = {0.05, 0.1, 0.0};
    draft_odds        odds;
    CHECK(odds.plan(8, 100, cheap) && odds.take(9.0f) && odds.more());
    CHECK(!odds.plan(0, 100, cheap));

    // Where the draft model costs as much as the target, it is not asked, and there is no rest to wait for.
    draft_odds dear;
    CHECK(!dear.plan(8, 100, {1.0, 0.3, 0.0}) && dear.resting() == 0);
    CHECK(dear.plan(8, 100, cheap));

    // What it has to read first must be won back.
    CHECK(!dear.plan(8, 10, {0.05, 0.1, 40.0}) && dear.resting() == 0);
    CHECK(dear.plan(8, 1000, {0.05, 0.1, 40.0}));

    // A doubtful token is left out where checking is dear, and taken where it costs nothing.
    draft_odds doubtful;
    CHECK(doubtful.plan(8, 100, {0.01, 0.6, 0.0}) && !doubtful.take(0.1f));
    CHECK(doubtful.plan(8, 100, {0.01, 0.01, 0.0}) && doubtful.take(0.1f));

    // Never longer than a draft may be, however good it is.
    draft_odds endless;
    for (int i = 0; i < 50; ++i) {
        CHECK(endless.plan(100, 1000, {0.001, 0.001, 0.0}));
        size_t n = 0;
        while (endless.take(9.0f)) {
            ++n;
        }
        CHECK(n == longest_draft && !endless.more());
        endless.learn(n);
    }

    // Drafts that are always wrong end by themselves, are tried again, and rest longer each time.
    draft_odds          wrong;
    std::vector<size_t> rests;
    size_t              tried = 0;
    for (int step = 0; step < 3000; ++step) {
        const size_t before = wrong.resting();
        if (wrong.plan(8, 1000, cheap)) {
            ++tried;
            wrong.take(9.0f);
            wrong.learn(0);
        }
        if (before == 0 && wrong.resting() > 0) {
            rests.push_back(wrong.resting());
        }
    }
    CHECK(rests.size() >= 3 && tried < 60);
    CHECK(rests[1] > rests[0] && rests[2] > rests[1]);

    // What was right for long is kept up, and a failure after that is a first one again.
    draft_odds changing;
    const auto until_rest = [&](size_t n_right) {
        for (int i = 0; i < 200 && changing.resting() == 0; ++i) {
            if (changing.plan(4, 1000, cheap)) {
                changing.take(9.0f);
                changing.take(9.0f);
                changing.learn(n_right);
            }
        }
        return changing.resting();
    };
    const size_t first = until_rest(0);
    CHECK(first > 0);
    while (changing.resting() > 0) {
        changing.plan(4, 1000, cheap);
    }
    CHECK(until_rest(2) == 0);
    CHECK(until_rest(0) == first);
}

// How many times as fast as plain decoding a text becomes, of whose tokens a draft model guesses a share
// right: `sure` of those it is sure of, which are two of three, and `unsure` of the others. Reading what
// it has missed costs a fiftieth of a decode for each token.
static double gain_of(const char * name, draft_odds & odds, size_t n_tokens, double sure, double unsure,
                      const draft_price & each) {
    std::mt19937                           random(7);
    std::uniform_real_distribution<double> share(0.0, 1.0);
    double                                 time   = 0.0;
    size_t                                 done   = 0;
    size_t                                 behind = 200;  // its prompt
    while (done < n_tokens) {
        draft_price price = each;
        price.behind      = behind > 2 ? static_cast<double>(behind) / 50.0 : 0.0;
        size_t n_right    = 0;
        time += 1.0;
        if (odds.plan(longest_draft, std::min(n_tokens - done, 64 + done), price)) {
            time += price.behind;
            behind       = 0;
            bool   right = true;
            size_t n     = 0;
            do {
                const bool is_sure = share(random) < 2.0 / 3.0;
                time += price.token;
                if (!odds.take(is_sure ? 5.0f : 0.2f)) {
                    break;
                }
                ++n;
                time += price.verify;
                right = right && share(random) < (is_sure ? sure : unsure);
                n_right += right ? 1 : 0;
            } while (odds.more());
            odds.learn(n_right);
            CHECK(n <= longest_draft);
        }
        done += 1 + n_right;
        behind += 1 + n_right;
    }
    std::printf("  %s, %zu tokens: %.3f\n", name, n_tokens, static_cast<double>(done) / time);
    return static_cast<double>(done) / time;
}

static void test_gains() {
    const draft_price cheap = {0.1, 0.1, 0.0};
    draft_odds        good;
    CHECK(gain_of("good", good, 2000, 0.95, 0.5, cheap) > 1.6);
    // Doubtful tokens are left out where checking is dear, which makes the difference.
    draft_odds careful;
    CHECK(gain_of("doubtful", careful, 2000, 0.95, 0.2, {0.1, 0.4, 0.0}) > 1.1);
    // What does not pay costs little, in a short text and in a long one.
    for (const size_t n_tokens : {250u, 4000u}) {
        draft_odds poor;
        CHECK(gain_of("poor", poor, n_tokens, 0.2, 0.1, cheap) > 0.96);
        draft_odds dear;
        CHECK(gain_of("dear", dear, n_tokens, 0.6, 0.3, {0.5, 0.4, 0.0}) > 0.96);
    }
    // A text that becomes easy is noticed.
    draft_odds changing;
    CHECK(gain_of("first poor", changing, 1000, 0.1, 0.1, cheap) < 1.0);
    CHECK(gain_of("then good", changing, 4000, 0.95, 0.5, cheap) > 1.3);
}

static void test_own_draft() {
    // The model as its own draft: what it drafts is what it would say.
    engine         e(64);
    history        h;
    const uint64_t load = e.load(with_draft("tiny.gguf"));
    h.wait(e, {load});
    CHECK(h.last(load).kind == event_kind::loaded);
    for (const int n : {0, 5, 60}) {
        generate_params params = greedy("Hello, world! " + words(n), 40);
        const uint64_t  with   = e.generate(params);
        params.speculate       = false;
        const uint64_t without = e.generate(params);
        h.wait(e, {with, without});
        CHECK(h.tokens(with) == h.tokens(without));
        CHECK(h.last(with).n_by_model >= 10);
        // Some may have been looked up, and those may be wrong.
        CHECK(h.last(with).n_draft_right >= h.last(with).n_by_model);
    }
    event sum;
    compare(e, h, sum);
    CHECK(sum.n_by_model > 0);
}

static void test_other_draft() {
    // Another model's drafts are mostly wrong, a coarser copy's mostly right: the text does not change.
    for (const char * name : {"other.gguf", "close.gguf"}) {
        engine         e(64);
        history        h;
        const uint64_t load = e.load(with_draft(name));
        h.wait(e, {load});
        event sum;
        compare(e, h, sum);
        std::printf("  %s: drafted %d tokens, %d by the model, %d right\n", name, sum.n_drafted, sum.n_by_model,
                    sum.n_draft_right);
        CHECK(sum.n_by_model > 100 && sum.n_draft_right < sum.n_drafted);
    }
}

static void test_measured_lengths() {
    engine         e(64);
    history        h;
    const uint64_t load = e.load(with_draft("close.gguf", 0));
    h.wait(e, {load});
    event sum;
    compare(e, h, sum);
}

static void test_it_ends_by_itself() {
    // A draft model that costs little, so that it is asked, and is always wrong, so that it must not be for
    // long. Where a machine finds it dear after all, there is nothing to end.
    engine      e(64);
    history     h;
    load_params params  = with_draft("thin.gguf", 0);
    params.path         = folder + "deep.gguf";
    const uint64_t load = e.load(params);
    // Drawn hot: a text that repeats nothing, so that there is nothing to look up. Not compared: over so many
    // layers of random weights, the last bits of a product of several rows turn a drawn text elsewhere.
    generate_params request = greedy("Hello, world!", 400);
    request.temperature     = 1.5f;
    request.seed            = 3;
    const uint64_t id       = e.generate(request);
    h.wait(e, {load, id});
    std::printf("  drafted %d tokens\n", h.last(id).n_by_model);
    CHECK(h.last(id).n_tokens == 400 && h.last(id).n_by_model <= 100);
}

static void test_refusals() {
    engine         e(64);
    history        h;
    const uint64_t strange = e.load(with_draft("strange.gguf"));
    const uint64_t missing = e.load(with_draft("missing.gguf"));
    h.wait(e, {strange, missing});
    for (const uint64_t id : {strange, missing}) {
        CHECK(h.last(id).code == errc::load_failed && h.last(id).text.rfind("draft_model: ", 0) == 0);
    }
    CHECK(h.last(strange).text.find("token 300 is 'nowhere'") != std::string::npos);
    CHECK(!e.has_model());
    CHECK(code_of([&] { e.generate(greedy("x", 1)); }) == errc::not_loaded);

    // What failed leaves nothing behind.
    const uint64_t load = e.load(small_load(folder + "tiny.gguf", 1));
    const uint64_t work = e.generate(greedy("Hello", 8));
    h.wait(e, {load, work});
    CHECK(h.last(work).kind == event_kind::finished && h.last(work).n_by_model == 0);
}

static void test_progress() {
    engine         e(64);
    history        h;
    const uint64_t load = e.load(with_draft("other.gguf"));
    h.wait(e, {load});
    float last = 0.0f;
    for (const event & item : h.of[load]) {
        if (item.kind == event_kind::load_progress) {
            CHECK(item.progress >= last && item.progress <= 1.0f);
            last = item.progress;
        }
    }
    CHECK(last > 0.9f);
}

static void test_deterministic() {
    engine          e(64);
    history         h;
    const uint64_t  load   = e.load(with_draft("tiny.gguf"));
    generate_params params = greedy("Hello, world!", 40);
    params.deterministic   = true;
    const uint64_t alone   = e.generate(params);
    h.wait(e, {load, alone});
    CHECK(h.last(alone).n_drafted == 0 && h.last(alone).n_by_model == 0);
}

static void test_cancel() {
    engine         e(64);
    history        h;
    const uint64_t load     = e.load(with_draft("tiny.gguf"));
    const uint64_t expected = e.generate(greedy("Hello", 40));
    h.wait(e, {load, expected});
    for (int i = 0; i < 20; ++i) {
        const uint64_t running = e.generate(greedy("Hello", 100000));
        h.wait_until(e, [&] { return h.of.count(running) && h.tokens(running).size() > 3; });
        std::this_thread::sleep_for(std::chrono::microseconds(37 * i));
        e.cancel(running);
        generate_params late = greedy("Hello", 100000);
        late.deadline_ns     = now_ns() + 3'000'000 + 100'000 * i;
        const uint64_t soon  = e.generate(late);
        const uint64_t after = e.generate(greedy("Hello", 40));
        h.wait(e, {running, soon, after});
        // On a fast machine they may reach the end of the context first.
        CHECK(h.last(running).code == errc::cancelled || h.last(running).reason == stop_reason::length);
        CHECK(h.last(soon).code == errc::deadline_exceeded || h.last(soon).reason == stop_reason::length);
        CHECK(h.tokens(after) == h.tokens(expected));
    }
    // The engine stops in the middle of drafts, too.
    const uint64_t running = e.generate(greedy("Hello", 100000));
    h.wait_until(e, [&] { return h.of.count(running) && h.tokens(running).size() > 3; });
    e.stop();
    h.take(e);
    CHECK(h.ended(running));
}

static void test_long_prompt() {
    // The draft model reads a prompt of several chunks in several steps, and the context's end is the end.
    engine         e(64);
    history        h;
    const uint64_t load = e.load(with_draft("tiny.gguf"));
    const uint64_t full = e.generate(greedy(words(100), 100000));
    h.wait(e, {load, full});
    CHECK(h.last(full).reason == stop_reason::length);
    CHECK(h.last(full).n_prompt + h.last(full).n_tokens == 513);
    CHECK(h.last(full).n_prompt > 3 * 64 && h.last(full).n_drafted > 0);

    // A draft model of a shorter context drafts as far as that goes.
    const uint64_t shorter = e.load(with_draft("short.gguf"));
    const uint64_t beyond  = e.generate(greedy("Hello", 100000));
    const uint64_t before  = e.generate(greedy("Hello", 40));
    const uint64_t after   = e.generate(greedy(words(100), 100));
    h.wait(e, {shorter, beyond, before, after});
    CHECK(h.last(beyond).reason == stop_reason::length && h.last(beyond).n_by_model > 0);
    CHECK(h.last(before).n_by_model > 0 && h.last(after).n_by_model == 0);
    const auto all  = h.tokens(beyond);
    const auto head = h.tokens(before);
    CHECK(std::equal(head.begin(), head.end(), all.begin()));
}

static void test_reuse_and_neighbours() {
    engine         e(64);
    history        h;
    const uint64_t load = e.load(with_draft("tiny.gguf", 6, 3));
    const uint64_t cold = e.generate(greedy(words(60), 40));
    h.wait(e, {load, cold});
    const uint64_t warm = e.generate(greedy(words(60) + "and", 40));
    h.wait(e, {warm});
    generate_params plain   = greedy(words(60) + "and", 40);
    plain.speculate         = false;
    const uint64_t computed = e.generate(plain);
    h.wait(e, {computed});
    CHECK(h.last(warm).n_reused > 100 && h.last(warm).n_by_model > 0);
    CHECK(h.tokens(warm) == h.tokens(computed));

    // Side jobs and many requests at once: each ends as it should.
    embed_params texts;
    texts.texts = {"the sea", words(30)};
    score_params labels;
    labels.prompt              = "Hello";
    labels.continuations       = {" the", " sea"};
    std::vector<uint64_t> jobs = {e.embed(texts), e.score(labels)};
    std::vector<uint64_t> ids;
    for (int i = 0; i < 9; ++i) {
        ids.push_back(e.generate(greedy("Hello " + words(i), 20 + 10 * i)));
    }
    h.wait(e, jobs);
    h.wait(e, ids);
    CHECK(h.last(jobs[0]).kind == event_kind::embedded && h.last(jobs[1]).kind == event_kind::scored);
    for (int i = 0; i < 9; ++i) {
        CHECK(h.last(ids[i]).kind == event_kind::finished && h.last(ids[i]).n_tokens == 20 + 10 * i);
    }
    // The last one, the longest, was alone at its end.
    CHECK(h.last(ids[8]).n_neighbours > 0 && h.last(ids[8]).n_by_model > 0);
}

static void test_load_cycles() {
    engine               e(64);
    history              h;
    std::vector<int32_t> expected;
    for (const char * name : {"tiny.gguf", "other.gguf", "close.gguf", "tiny.gguf"}) {
        const uint64_t load = e.load(with_draft(name));
        const uint64_t work = e.generate(greedy("Hello", 30));
        const uint64_t end  = e.unload();
        h.wait(e, {load, work, end});
        CHECK(h.last(work).n_by_model > 0);
        if (expected.empty()) {
            expected = h.tokens(work);
        }
        CHECK(h.tokens(work) == expected);
    }
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s TINY.gguf\n", argv[0]);
        return 2;
    }
    const std::string tiny = argv[1];
    folder                 = tiny.substr(0, tiny.rfind('/') + 1);

    const std::vector<std::pair<const char *, void (*)()>> tests = {
        {"odds", test_odds},
        {"gains", test_gains},
        {"own draft", test_own_draft},
        {"other draft", test_other_draft},
        {"measured lengths", test_measured_lengths},
        {"it ends by itself", test_it_ends_by_itself},
        {"refusals", test_refusals},
        {"progress", test_progress},
        {"deterministic", test_deterministic},
        {"cancel", test_cancel},
        {"long prompt", test_long_prompt},
        {"reuse and neighbours", test_reuse_and_neighbours},
        {"load cycles", test_load_cycles},
    };
    for (const auto & [name, run] : tests) {
        std::printf("%s\n", name);
        std::fflush(stdout);
        run();
    }
    std::printf("%zu passed, 0 failed\n", tests.size());
    return 0;
}
