// An engine's channel, against a model given on the command line: channel_test MODEL.gguf

#include "channel.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "harness.h"
#include "json.h"

using namespace ai4all;

static std::string model_path;

// A loaded engine with its channel, and the other end.
class talk {
  public:
    explicit talk(channel_options options = {}) : engine_(64) {
        int ends[2];
        CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
        ours_             = ends[0];
        theirs_           = ends[1];
        const uint64_t id = engine_.load(small_load(model_path, 2));
        history        h;
        h.wait(engine_, {id});
        channel_ = std::make_unique<channel>(engine_, theirs_, options);
    }
    ~talk() {
        engine_.stop();
        channel_.reset();
        close(theirs_);
        hang_up();
    }
    talk(const talk &)             = delete;
    talk & operator=(const talk &) = delete;

    void hang_up() {
        if (ours_ >= 0) {
            close(ours_);
        }
        ours_ = -1;
    }

    void write(const std::string & bytes) {
        for (size_t sent = 0; sent < bytes.size();) {
            const ssize_t n = send(ours_, bytes.data() + sent, bytes.size() - sent, 0);
            CHECK(n > 0);
            sent += static_cast<size_t>(n);
        }
    }
    static std::string framed(const std::string & content) {
        std::string bytes;
        for (int shift = 24; shift >= 0; shift -= 8) {
            bytes.push_back(static_cast<char>(content.size() >> shift & 0xFF));
        }
        return bytes + content;
    }
    void say(const std::string & content) { write(framed(content)); }

    // The next message of the other end; waits for it.
    common_json next() {
        while (at_ == frame_.size()) {
            const std::string length = read(4);
            size_t            n      = 0;
            for (const char c : length) {
                n = n << 8 | static_cast<unsigned char>(c);
            }
            frame_ = common_json::parse(read(n));
            at_    = 0;
        }
        return frame_.at(at_++);
    }
    // Messages up to the last one of a command.
    std::vector<common_json> until_end(uint64_t number) {
        std::vector<common_json> messages;
        while (true) {
            messages.push_back(next());
            const common_json & m = messages.back();
            if (m.at(0).is_number() && m.at(0).get<uint64_t>() == number &&
                (kind(m) == "finished" || kind(m) == "failed")) {
                return messages;
            }
        }
    }
    // Waits for frames that are the caller's; false when none can come any more.
    bool handed(std::vector<std::string> & frames) {
        pollfd ready = {channel_->fd(), POLLIN, 0};
        CHECK(poll(&ready, 1, 60000) == 1);
        return channel_->take(frames);
    }

    static std::string kind(const common_json & message) { return message.at(1).get<std::string>(); }

    channel & its_channel() { return *channel_; }
    engine &  its_engine() { return engine_; }

  private:
    std::string read(size_t n) {
        std::string bytes;
        while (bytes.size() < n) {
            char          part[4096];
            const ssize_t got = recv(ours_, part, std::min(sizeof(part), n - bytes.size()), 0);
            CHECK(got > 0);
            bytes.append(part, static_cast<size_t>(got));
        }
        return bytes;
    }

    engine                   engine_;
    int                      ours_   = -1;
    int                      theirs_ = -1;
    std::unique_ptr<channel> channel_;
    common_json              frame_ = common_json::array();
    size_t                   at_    = 0;
};

static std::string generation(uint64_t number, int32_t max_tokens, const std::string & more = {}) {
    return "[\"generate\"," + std::to_string(number) +
           ",{\"prompt\":\"the sea\",\"system_prompt\":null,\"max_tokens\":" + std::to_string(max_tokens) +
           ",\"temperature\":0.0,\"top_k\":0,\"top_p\":1.0,\"min_p\":0.0,\"repetition_penalty\":1.0,\"seed\":0,"
           "\"stop\":[],\"ignore_eos\":true,\"deterministic\":false,\"grammar\":null,\"json_schema\":null,"
           "\"reuse_prefix\":true,\"speculate\":false,\"deadline\":null,\"logprobs\":null" +
           more + "}]";
}

static void test_a_generation() {
    talk t;
    t.say(generation(7, 30));
    std::string text;
    size_t      n_tokens = 0;
    for (const common_json & m : t.until_end(7)) {
        CHECK(m.at(0).get<uint64_t>() == 7);
        if (talk::kind(m) == "token") {
            text += m.at(2).at("text").get<std::string>();
            n_tokens += m.at(2).at("token_ids").size();
            CHECK(m.at(2).at("completion_tokens").get<size_t>() == n_tokens);
        } else if (talk::kind(m) == "finished") {
            text += m.at(2).at(0).get<std::string>();
            CHECK(m.at(2).at(1).get<std::string>() == "length" && m.at(2).at(3).get<int>() == 30);
        }
    }
    CHECK(n_tokens == 30);

    // The same as by the queue.
    history        h;
    const uint64_t id = t.its_engine().generate(greedy("the sea", 30));
    h.wait(t.its_engine(), {id});
    CHECK(h.text(id) == text);
}

// Sequences take turns, and the tokens of each are told together nevertheless.
static void test_two_at_once() {
    talk t;
    t.say(generation(1, 300));
    t.say(generation(2, 300));
    size_t n_messages = 0;
    size_t n_tokens   = 0;
    size_t n_ended    = 0;
    while (n_ended < 2) {
        const common_json m = t.next();
        if (!m.at(0).is_number()) {
            continue;
        }
        if (talk::kind(m) == "token") {
            ++n_messages;
            n_tokens += m.at(2).at("token_ids").size();
        }
        n_ended += talk::kind(m) == "finished" ? 1 : 0;
    }
    CHECK(n_tokens == 600 && n_messages < 500);
}

static void test_likely_tokens_and_pieces() {
    talk t;
    // One byte at a time.
    for (const char c : talk::framed(generation(1, 2, ",\"logprobs\":3"))) {
        t.write(std::string(1, c));
    }
    for (const common_json & m : t.until_end(1)) {
        if (talk::kind(m) == "token") {
            const common_json & likely = m.at(2).at("logprobs").at(0);
            CHECK(likely.at("token").get<int>() == m.at(2).at("token_ids").at(0).get<int>());
            CHECK(likely.at("logprob").get<double>() <= 0.0 && likely.at("top").size() == 3);
        }
    }
}

static void test_what_is_no_request() {
    talk t;
    t.say("[\"generate\",1,{\"prompt\":\"SECRET\"}]");
    common_json failed = t.until_end(1).back();
    CHECK(talk::kind(failed) == "failed" && failed.at(2).at(0).get<std::string>() == "compute_failed");
    CHECK(failed.dump().find("SECRET") == std::string::npos);
    t.say(generation(2, 1, ",\"seed\":4294967296"));
    failed = t.until_end(2).back();
    CHECK(failed.at(2).at(0).get<std::string>() == "bad_request");
    CHECK(failed.at(2).at(1).get<std::string>() == "seed: out of range");
    t.say(generation(6, 1, ",\"max_tokens\":18446744073709551613"));
    CHECK(t.until_end(6).back().at(2).at(1).get<std::string>() == "max_tokens: out of range");
    t.say(generation(3, 4, ",\"deadline\":0.001"));
    CHECK(t.until_end(3).back().at(2).at(0).get<std::string>() == "deadline_exceeded");
    // What does not fit is the engine's to say.
    t.say(generation(4, 4, ",\"prompt\":\"" + words(600) + "\""));
    CHECK(t.until_end(4).back().at(2).at(0).get<std::string>() == "context_overflow");
    t.say(generation(5, 4));
    CHECK(talk::kind(t.until_end(5).back()) == "finished");
}

static void test_cancel_and_ticks() {
    channel_options options;
    options.tick_ns = 1'000'000;
    talk t(options);
    t.say(generation(1, 100000));  // as far as the context goes
    uint64_t ticks = 0;
    uint64_t last  = 0;
    while (ticks < 3) {
        const common_json m = t.next();
        if (!m.at(0).is_number()) {
            CHECK(m.at(0).get<std::string>() == "tick" && m.at(1).get<uint64_t>() >= last);
            last = m.at(1).get<uint64_t>();
            ++ticks;
        } else if (talk::kind(m) == "finished") {
            t.say(generation(1, 100000));
        }
    }
    t.say("[\"cancel\",1]");
    const common_json end = t.until_end(1).back();
    CHECK(talk::kind(end) == "finished" || end.at(2).at(0).get<std::string>() == "cancelled");

    // One that has ended is the caller's, who does not know it either.
    t.say("[\"cancel\",1]");
    std::vector<std::string> frames;
    CHECK(t.handed(frames) && frames.size() == 1 && frames[0] == "[\"cancel\",1]");
}

static void test_order() {
    talk                     t;
    std::vector<std::string> frames;
    t.say("[\"load\",1,{}]");
    t.say(generation(2, 5));  // not before the load
    while (frames.size() < 2) {
        std::vector<std::string> more;
        CHECK(t.handed(more));
        frames.insert(frames.end(), more.begin(), more.end());
    }
    CHECK(frames[0] == "[\"load\",1,{}]" && frames[1] == generation(2, 5));
    t.its_channel().send("[[1,\"loaded\",{}]]", 1);
    CHECK(talk::kind(t.next()) == "loaded");
    // Whoever has read the answer is served at once, although the second still is the caller's, and others.
    for (uint64_t number = 3; number < 40; ++number) {
        t.say("[\"score\"]");
        t.say("[\"cancel\",2]");
        t.say(generation(number, 1));
        CHECK(talk::kind(t.until_end(number).back()) == "finished");
        t.say("[\"unload\",50]");
        t.say(generation(100 + number, 1));
        for (size_t n = 0; n < 4; n += frames.size()) {
            CHECK(t.handed(frames));
        }
        t.its_channel().served(1);
    }
}

// Whoever does not read stops nobody, and finds everything when he does.
static void test_a_slow_reader() {
    talk              t;
    const std::string big(300'000, 'x');
    for (int i = 0; i < 10; ++i) {
        t.its_channel().send("[[\"log\",10,\"" + big + "\"]]");
    }
    for (uint64_t number = 1; number <= 20; ++number) {
        t.say(generation(number, 20));
    }
    history        h;
    const uint64_t id = t.its_engine().generate(greedy("the sea", 20));
    h.wait(t.its_engine(), {id});  // the engine went on
    for (int i = 0; i < 10; ++i) {
        CHECK(t.next().at(2).get<std::string>() == big);
    }
    for (uint64_t number = 1; number <= 20; ++number) {
        CHECK(talk::kind(t.until_end(number).back()) == "finished");
    }
}

static void test_the_other_end_goes() {
    std::vector<std::string> frames;
    {
        talk t;
        t.say(generation(1, 400));
        t.say(generation(2, 400));
        t.next();
        t.hang_up();
        CHECK(!t.handed(frames) && frames.empty());
        t.its_channel().send("[[1,\"nobody\",0]]");
    }
    const std::string nonsense[] = {
        "[\"generate\",1,", "[\"generate\",-1]", "[\"generate\",\"x\",{}]", "[\"cancel\",", "[\"cancel\",{}]",
    };
    for (const std::string & content : nonsense) {
        talk t;
        t.say(content);
        CHECK(!t.handed(frames));
    }
    channel_options options;
    options.max_frame_bytes = 100;
    talk t(options);
    t.write(std::string("\0\0\0\x65", 4));
    CHECK(!t.handed(frames));
}

// At any moment, with generations and frames on the way.
static void test_closing() {
    for (int wait_us = 0; wait_us < 4000; wait_us += 200) {
        talk t;
        for (uint64_t number = 1; number <= 6; ++number) {
            t.say(generation(number, 40));
        }
        t.say("[\"load\",9,{}]");
        std::this_thread::sleep_for(std::chrono::microseconds(wait_us));
        t.its_engine().stop();
        t.its_channel().close();
        t.its_channel().close();
    }
}

int main(int argc, char ** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: channel_test MODEL.gguf\n");
        return 2;
    }
    model_path = argv[1];
    test_a_generation();
    test_two_at_once();
    test_likely_tokens_and_pieces();
    test_what_is_no_request();
    test_cancel_and_ticks();
    test_order();
    test_a_slow_reader();
    test_the_other_end_goes();
    test_closing();
    std::printf("ok\n");
    return 0;
}
