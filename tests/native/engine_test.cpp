// The engine alone, against a model given on the command line: engine_test MODEL.gguf
//
// Run under the sanitizer presets as well; every check names the line that failed.

#include "engine.h"

#include <poll.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "harness.h"
#include "llama.h"
#include "lookup.h"
#include "notifier.h"
#include "sampler.h"
#include "text.h"

using namespace ai4all;

static std::string model_path;

static load_params small_load(uint32_t n_slots = 1) {
    return small_load(model_path, n_slots);
}

static void test_text() {
    CHECK(utf8_whole_prefix("a\xC3") == 1);
    CHECK(utf8_whole_prefix("a\xC3\xA9") == 3);
    CHECK(utf8_whole_prefix("\xF0\x9F\x98") == 0);
    CHECK(utf8_whole_prefix("\xFF\xC3") == 1);
    CHECK(utf8_sanitize("a\xFF\xED\xA0\x80z") == "a\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBDz");
    CHECK(utf8_sanitize("\xC0\xAF") == "\xEF\xBF\xBD\xEF\xBF\xBD");

    // A code point over four tokens comes out whole.
    text_stream emoji({});
    CHECK(emoji.push("\xF0").empty() && emoji.push("\x9F").empty() && emoji.push("\x98").empty());
    CHECK(emoji.push("\x80!") == "\xF0\x9F\x98\x80!");

    // A stop sequence over three tokens is never shown, not even in part.
    text_stream stop({"STOP", "\n\n"});
    CHECK(stop.push("a S") == "a ");
    CHECK(stop.push("T").empty());
    CHECK(stop.push("OP b").empty() && stop.stopped());
    CHECK(stop.push("more").empty() && stop.flush().empty());

    // What looked like one is text after all.
    text_stream almost({"STOP"});
    CHECK(almost.push("STO").empty());
    CHECK(almost.push("RE") == "STORE" && !almost.stopped());
    CHECK(almost.push(" S") == " " && almost.flush() == "S");

    // The earliest of two wins; whole and piecewise agree.
    const std::string all = "one\xC3\xA9 two END three STOP";
    for (size_t cut = 1; cut < all.size(); ++cut) {
        text_stream two({"STOP", "END"});
        std::string text = two.push(all.substr(0, cut));
        text += two.push(all.substr(cut));
        text += two.flush();
        CHECK(two.stopped() && text == "one\xC3\xA9 two ");
    }
}

static void test_argmax() {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    for (int32_t n : {1, 7, 32, 33, 1000}) {
        for (int32_t best = 0; best < n; best += 3) {
            std::vector<float> x(n, -1.0f);
            x[best] = 2.0f;
            if (best + 1 < n) {
                x[n - 1] = 2.0f;  // a later equal does not win
            }
            CHECK(argmax(x.data(), n) == best);
        }
    }
    std::vector<float> bad(100, nan);
    CHECK(argmax(bad.data(), 100) == -1);
    bad[60] = -5.0f;
    CHECK(argmax(bad.data(), 100) == 60);
}

static void test_notifier() {
    notifier n;
    pollfd   ready = {n.fd(), POLLIN, 0};
    CHECK(poll(&ready, 1, 0) == 0);
    n.signal();
    n.signal();
    CHECK(poll(&ready, 1, 0) == 1);
    n.clear();
    CHECK(poll(&ready, 1, 0) == 0);
    n.clear();  // clearing what is clear is harmless
}

static void test_misuse() {
    engine e(2);
    CHECK(code_of([&] { e.generate(greedy("x", 1)); }) == errc::not_loaded);
    CHECK(code_of([&] { e.model(); }) == errc::not_loaded);

    history     h;
    load_params missing = small_load();
    missing.path        = "/nonexistent/model.gguf";
    const uint64_t id   = e.load(missing);
    h.wait(e, {id});
    CHECK(h.last(id).code == errc::load_failed && !h.last(id).text.empty());
    CHECK(code_of([&] { e.generate(greedy("x", 1)); }) == errc::not_loaded);

    load_params odd       = small_load();
    odd.kv_type           = "q99";
    const uint64_t second = e.load(odd);
    h.wait(e, {second});
    CHECK(h.last(second).code == errc::load_failed);

    e.stop();
    e.stop();
    CHECK(code_of([&] { e.load(small_load()); }) == errc::closed);
    e.cancel(12345);
}

// Greedy decoding written against llama.h alone, as a check from outside.
static std::vector<int32_t> reference_tokens(const std::string & prompt, int32_t n) {
    llama_model_params mparams = llama_model_default_params();
    llama_model *      model   = llama_model_load_from_file(model_path.c_str(), mparams);
    CHECK(model);
    llama_context_params cparams = llama_context_default_params();
    cparams.n_ctx                = 512;
    cparams.n_batch = cparams.n_ubatch = 64;
    cparams.n_threads = cparams.n_threads_batch = 1;
    llama_context *          ctx                = llama_init_from_model(model, cparams);
    const llama_vocab *      vocab              = llama_model_get_vocab(model);
    std::vector<llama_token> tokens(512);
    const int32_t count = llama_tokenize(vocab, prompt.c_str(), (int32_t)prompt.size(), tokens.data(), 512, true, true);
    CHECK(count > 0);
    tokens.resize(count);
    std::vector<int32_t> result;
    for (size_t done = 0; done < tokens.size();) {
        const int32_t chunk = std::min<int32_t>(64, (int32_t)(tokens.size() - done));
        CHECK(llama_decode(ctx, llama_batch_get_one(tokens.data() + done, chunk)) == 0);
        done += chunk;
    }
    while ((int32_t)result.size() < n) {
        const float * logits = llama_get_logits_ith(ctx, -1);
        int32_t       best   = -1;
        for (int32_t t = 0; t < llama_vocab_n_tokens(vocab); ++t) {
            if (!llama_vocab_is_eog(vocab, t) && (best < 0 || logits[t] > logits[best])) {
                best = t;
            }
        }
        result.push_back(best);
        CHECK(llama_decode(ctx, llama_batch_get_one(&best, 1)) == 0);
    }
    llama_free(ctx);
    llama_model_free(model);
    return result;
}

static void test_generation() {
    engine         e(64);
    history        h;
    const uint64_t load = e.load(small_load());
    // Queued behind the load: it waits, and says how long.
    const uint64_t first = e.generate(greedy("Hello, world!", 24));
    h.wait(e, {load, first});
    CHECK(h.last(load).kind == event_kind::loaded && e.has_model());
    CHECK(e.model().n_ctx == 512 && e.model().n_vocab > 256);

    const event & end = h.last(first);
    CHECK(end.kind == event_kind::finished && end.reason == stop_reason::length);
    CHECK(end.n_tokens == 24 && end.n_prompt > 0 && end.n_neighbours == 0);
    CHECK(h.tokens(first) == reference_tokens("Hello, world!", 24));
    const timeline & t = end.times;
    CHECK(0 < t.submitted && t.submitted <= t.model_ready && t.model_ready <= t.admitted);
    CHECK(t.admitted < t.prompt_done && t.prompt_done <= t.first_token && t.first_token < t.last_token);
    CHECK(t.last_token <= t.finished);

    // Several chunks of prompt: progress counts up to the whole.
    const uint64_t chunks = e.generate(greedy(words(80), 4));
    h.wait(e, {chunks});
    std::vector<int32_t> progress;
    for (const event & item : h.of[chunks]) {
        if (item.kind == event_kind::prompt_progress) {
            progress.push_back(item.n_prompt_done);
        }
    }
    CHECK(progress.size() >= 3 && progress.front() == 64 && progress.back() == h.last(chunks).n_prompt);
    CHECK(h.tokens(chunks) == reference_tokens(words(80), 4));

    // A stop sequence taken from the middle of the known text ends it before that text.
    const std::string whole = h.text(first);
    size_t            from  = 1;
    const auto        ascii = [&](size_t i) { return whole[i] > 0; };
    while (from + 3 < whole.size() && !(ascii(from) && ascii(from + 1) && ascii(from + 2))) {
        ++from;
    }
    CHECK(from + 3 < whole.size());
    generate_params stopping = greedy("Hello, world!", 24);
    stopping.stop            = {whole.substr(from, 3)};
    const uint64_t stopped   = e.generate(stopping);
    h.wait(e, {stopped});
    CHECK(h.last(stopped).reason == stop_reason::stop);
    CHECK(h.text(stopped) == whole.substr(0, whole.find(stopping.stop[0])));

    // The context ends a generation that asks for more.
    const uint64_t full = e.generate(greedy("Hello", 100000));
    h.wait(e, {full});
    CHECK(h.last(full).reason == stop_reason::length);
    CHECK(h.last(full).n_prompt + h.last(full).n_tokens == 513);
    const uint64_t overflow = e.generate(greedy(words(400), 4));
    h.wait(e, {overflow});
    CHECK(h.last(overflow).code == errc::context_overflow);

    // A seed repeats itself; another one differs.
    std::vector<std::vector<int32_t>> drawn;
    for (const uint32_t seed : {7u, 7u, 8u}) {
        generate_params params = greedy("Hello", 32);
        params.temperature     = 1.5f;
        params.seed            = seed;
        const uint64_t id      = e.generate(params);
        h.wait(e, {id});
        drawn.push_back(h.tokens(id));
    }
    CHECK(drawn[0] == drawn[1] && drawn[0] != drawn[2]);

    // top_k 1 is greedy whatever the temperature.
    generate_params one = greedy("Hello, world!", 24);
    one.temperature     = 2.0f;
    one.top_k           = 1;
    const uint64_t top  = e.generate(one);
    h.wait(e, {top});
    CHECK(h.tokens(top) == h.tokens(first));

    generate_params broken = greedy("x", 4);
    broken.ignore_eos      = false;
    broken.grammar         = "root ::= (";
    const uint64_t grammar = e.generate(broken);
    h.wait(e, {grammar});
    CHECK(h.last(grammar).code == errc::bad_request);
}

static void test_cancel_and_deadline() {
    engine         e(64);
    history        h;
    const uint64_t load = e.load(small_load());
    h.wait(e, {load});
    const auto expected = reference_tokens("Hello", 16);

    // In decode, after some tokens were seen.
    const uint64_t running = e.generate(greedy("Hello", 100000));
    h.wait_until(e, [&] { return h.of.count(running) && h.tokens(running).size() > 5; });
    const uint64_t queued = e.generate(greedy("Hello", 100000));
    e.cancel(queued);
    e.cancel(running);
    h.wait(e, {running, queued});
    CHECK(h.last(running).code == errc::cancelled && h.last(running).n_tokens > 5);
    CHECK(h.last(queued).code == errc::cancelled && h.last(queued).n_tokens == 0);

    // A deadline: past on arrival, and in the middle.
    generate_params late = greedy("Hello", 16);
    late.deadline_ns     = 1;
    const uint64_t past  = e.generate(late);
    late                 = greedy("Hello", 100000);
    late.deadline_ns     = now_ns() + 20'000'000;
    const uint64_t soon  = e.generate(late);
    const uint64_t after = e.generate(greedy("Hello", 16));
    h.wait(e, {past, soon, after});
    CHECK(h.last(past).code == errc::deadline_exceeded);
    // On a fast machine it may reach the end of the context first.
    CHECK(h.last(soon).code == errc::deadline_exceeded || h.last(soon).reason == stop_reason::length);
    CHECK(h.tokens(after) == expected);  // the cache was left clean
}

static void test_slots() {
    engine         e(64);
    history        h;
    const uint64_t load = e.load(small_load(4));
    h.wait(e, {load});
    std::vector<uint64_t> ids;
    for (int i = 0; i < 10; ++i) {
        ids.push_back(e.generate(greedy(words(1 + 7 * i), 20)));
    }
    // One of them goes away in the middle of the others.
    h.wait_until(e, [&] { return h.of.count(ids[1]) > 0; });
    e.cancel(ids[1]);
    h.wait(e, ids);
    for (size_t i = 0; i < ids.size(); ++i) {
        const event & end = h.last(ids[i]);
        if (i == 1 && end.kind == event_kind::failed) {
            CHECK(end.code == errc::cancelled);
            continue;
        }
        CHECK(end.kind == event_kind::finished && end.n_tokens == 20);
    }
    int32_t neighbours = 0;
    for (const uint64_t id : ids) {
        neighbours = std::max(neighbours, h.last(id).n_neighbours);
    }
    CHECK(neighbours == 3);

    // A deterministic request has the engine to itself.
    std::vector<uint64_t> mixed;
    for (int i = 0; i < 4; ++i) {
        generate_params params = greedy("Hello, world!", 12);
        params.deterministic   = i == 2;
        mixed.push_back(e.generate(params));
    }
    h.wait(e, mixed);
    CHECK(h.last(mixed[2]).n_neighbours == 0);
    CHECK(h.tokens(mixed[2]) == reference_tokens("Hello, world!", 12));
}

static void test_queue() {
    engine         e(3);
    history        h;
    const uint64_t load = e.load(small_load());
    h.wait(e, {load});
    std::vector<uint64_t> ids;
    errc                  refused = errc::ok;
    for (int i = 0; i < 50 && refused == errc::ok; ++i) {
        refused = code_of([&] { ids.push_back(e.generate(greedy("Hello", 400))); });
    }
    CHECK(refused == errc::busy && ids.size() >= 3 && ids.size() < 50);
    for (const uint64_t id : ids) {
        e.cancel(id);
    }
    h.wait(e, ids);
    const uint64_t again = e.generate(greedy("Hello", 2));
    h.wait(e, {again});
    CHECK(h.last(again).kind == event_kind::finished);
}

static void test_load_cycles() {
    engine     e(64);
    history    h;
    const auto expected = reference_tokens("Hello", 8);
    for (int i = 0; i < 5; ++i) {
        const uint64_t load = e.load(small_load(1 + i % 3));
        const uint64_t work = e.generate(greedy("Hello", 8));
        const uint64_t end  = e.unload();
        h.wait(e, {load, work, end});
        CHECK(h.last(work).kind == event_kind::finished && h.tokens(work) == expected);
        CHECK(!e.has_model());
        CHECK(code_of([&] { e.generate(greedy("x", 1)); }) == errc::not_loaded);
    }
}

static void test_stop_with_work() {
    for (int i = 0; i < 5; ++i) {
        engine                e(64);
        history               h;
        const uint64_t        load = e.load(small_load(2));
        std::vector<uint64_t> ids  = {load};
        for (int k = 0; k < 60; ++k) {  // more than any machine does before the stop
            ids.push_back(e.generate(greedy(words(60), 100000)));
        }
        if (i > 0) {
            h.wait(e, {load});
            std::this_thread::sleep_for(std::chrono::milliseconds(i));
        }
        e.stop();
        h.take(e);
        for (const uint64_t id : ids) {
            CHECK(h.ended(id));
        }
        CHECK(h.last(ids.back()).code == errc::closed);
    }
}

static void test_reuse() {
    engine      e(64);
    history     h;
    load_params params        = small_load(1);
    params.prefix_cache_bytes = 64 << 20;
    const uint64_t  load      = e.load(params);
    const uint64_t  cold      = e.generate(greedy(words(60), 8));
    const uint64_t  warm      = e.generate(greedy(words(60) + "and", 8));
    const uint64_t  other     = e.generate(greedy("Hello " + words(50), 8));
    const uint64_t  back      = e.generate(greedy(words(60) + "or", 8));  // from the host's copy
    generate_params fresh     = greedy(words(60) + "or", 8);
    fresh.reuse_prefix        = false;
    const uint64_t computed   = e.generate(fresh);
    fresh.reuse_prefix        = true;
    fresh.deterministic       = true;
    const uint64_t alone      = e.generate(fresh);
    h.wait(e, {load, cold, warm, other, back, computed, alone});
    CHECK(h.last(cold).n_reused == 0 && h.last(other).n_reused == 0);
    CHECK(h.last(warm).n_reused > 100 && h.last(warm).n_reused < h.last(warm).n_prompt);
    CHECK(h.last(back).n_reused > 100);
    CHECK(h.last(computed).n_reused == 0 && h.last(alone).n_reused == 0);
    CHECK(h.tokens(back) == h.tokens(computed) && h.tokens(alone) == h.tokens(computed));
    CHECK(h.tokens(cold) == reference_tokens(words(60), 8));
}

static void test_lookup() {
    decode_cost                    cost;
    lookup_drafter                 drafter;
    const std::vector<llama_token> text = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4};
    CHECK(drafter.draft(text, 8, cost).empty());  // nothing is known of the machine yet
    cost.learn(1, 1000);
    for (int i = 0; i < 20; ++i) {
        cost.learn(5, 1200);
    }
    CHECK(cost.per_token() > 0.04 && cost.per_token() < 0.1);
    const auto draft = drafter.draft(text, 8, cost);
    CHECK(!draft.empty() && draft.size() <= 8 && draft[0] == 5);
    CHECK(drafter.draft(text, 1, cost).size() <= 1 && drafter.draft(text, 0, cost).empty());
    CHECK(drafter.draft({9, 8, 7, 6, 5, 4, 3, 2, 1}, 8, cost).empty());
    for (int i = 0; i < 10; ++i) {
        drafter.learn(draft.size(), 0);
    }
    CHECK(drafter.draft(text, 8, cost).empty());  // it did not pay
    // Where a further token costs as much as a step of its own, nothing is drafted.
    decode_cost    dear;
    lookup_drafter hopeful;
    dear.learn(1, 1000);
    for (int i = 0; i < 20; ++i) {
        dear.learn(5, 5000);
    }
    CHECK(hopeful.draft(text, 8, dear).empty());
}

static void test_speculation() {
    engine         e(64);
    history        h;
    const uint64_t load = e.load(small_load(1));
    h.wait(e, {load});
    int32_t drafted = 0;
    for (int i = 0; i < 6; ++i) {
        // A tiny greedy model soon repeats itself: much to look up.
        generate_params params = greedy("Hello " + words(i), 200);
        const uint64_t  with   = e.generate(params);
        params.speculate       = false;
        const uint64_t without = e.generate(params);
        h.wait(e, {with, without});
        CHECK(h.tokens(with) == h.tokens(without));
        CHECK(h.last(with).n_tokens == 200 && h.last(without).n_drafted == 0);
        CHECK(h.last(with).n_draft_right <= h.last(with).n_drafted);
        drafted += h.last(with).n_drafted;
    }
    std::printf("  drafted %d tokens\n", drafted);
}

static void test_side_jobs() {
    engine         e(64);
    history        h;
    const uint64_t load = e.load(small_load(2));
    embed_params   texts;
    texts.texts             = {"the sea", "Hello", "the sea", words(30)};
    const uint64_t embedded = e.embed(texts);
    const uint64_t beside   = e.generate(greedy("Hello, world!", 12));
    score_params   labels;
    labels.prompt           = "Hello";
    labels.continuations    = {" the", " the sea the sea", "q", " the"};
    const uint64_t scored   = e.score(labels);
    labels.continuations    = {""};
    const uint64_t empty    = e.score(labels);
    texts.texts             = {words(3000)};
    const uint64_t too_long = e.embed(texts);
    h.wait(e, {load, embedded, beside, scored, empty, too_long});

    const event & rows = h.last(embedded);
    CHECK(rows.kind == event_kind::embedded && rows.counts.size() == 2 && rows.counts[0] == 4);
    const size_t n = static_cast<size_t>(rows.counts[1]);
    CHECK(rows.floats.size() == 4 * n && n == static_cast<size_t>(e.model().n_embd));
    for (size_t row = 0; row < 4; ++row) {
        double square = 0.0;
        for (size_t i = 0; i < n; ++i) {
            square += static_cast<double>(rows.floats[row * n + i]) * rows.floats[row * n + i];
        }
        CHECK(std::fabs(square - 1.0) < 1e-4);
    }
    for (size_t i = 0; i < n; ++i) {
        CHECK(std::fabs(rows.floats[i] - rows.floats[2 * n + i]) < 1e-4f);  // equal texts, equal rows
    }

    const event & scores = h.last(scored);
    CHECK(scores.kind == event_kind::scored && scores.floats.size() == 4 && scores.counts[0] >= 1);
    CHECK(scores.floats[0] < 0.0f && std::fabs(scores.floats[0] - scores.floats[3]) < 1e-4f);
    CHECK(scores.floats[1] < scores.floats[0]);  // a longer continuation that begins the same
    CHECK(h.last(empty).code == errc::bad_request);
    CHECK(h.last(too_long).code == errc::context_overflow);
    CHECK(h.tokens(beside) == reference_tokens("Hello, world!", 12));

    // The first token's log probability is the score of that token as a continuation.
    generate_params params = greedy("Hello", 1);
    params.logprobs        = 3;
    const uint64_t one     = e.generate(params);
    h.wait(e, {one});
    const event & token = h.of[one][h.of[one].size() - 2];
    CHECK(token.kind == event_kind::token && token.logprobs.size() == 4);
    CHECK(token.logprobs[0].token == token.token && token.logprobs[0].logprob <= 0.0f);
    CHECK(token.logprobs[1].logprob >= token.logprobs[2].logprob);
}

static void test_many_threads() {
    engine         e(1024);
    history        h;
    const uint64_t load = e.load(small_load(2));
    h.wait(e, {load});
    std::vector<std::vector<uint64_t>> ids(4);
    std::vector<std::thread>           callers;
    for (int k = 0; k < 4; ++k) {
        callers.emplace_back([&, k] {
            for (int i = 0; i < 8; ++i) {
                ids[k].push_back(e.generate(greedy("Hello", 5 + k)));
                if (i % 3 == 0) {
                    e.cancel(ids[k].back());
                }
                (void)e.has_model();
            }
        });
    }
    for (std::thread & caller : callers) {
        caller.join();
    }
    for (const auto & some : ids) {
        h.wait(e, some);
    }
    (void)drain_log();
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s MODEL.gguf\n", argv[0]);
        return 2;
    }
    model_path                                                   = argv[1];
    const std::vector<std::pair<const char *, void (*)()>> tests = {
        {"text", test_text},
        {"argmax", test_argmax},
        {"notifier", test_notifier},
        {"misuse", test_misuse},
        {"generation", test_generation},
        {"cancel and deadline", test_cancel_and_deadline},
        {"slots", test_slots},
        {"queue", test_queue},
        {"load cycles", test_load_cycles},
        {"stop with work", test_stop_with_work},
        {"reuse", test_reuse},
        {"lookup", test_lookup},
        {"speculation", test_speculation},
        {"side jobs", test_side_jobs},
        {"many threads", test_many_threads},
    };
    for (const auto & [name, run] : tests) {
        std::printf("%s\n", name);
        std::fflush(stdout);
        run();
    }
    std::printf("%zu passed, 0 failed\n", tests.size());
    return 0;
}
