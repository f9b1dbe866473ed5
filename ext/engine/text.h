// From token bytes to text that is certain: whole UTF-8, and no part of a stop sequence.

#pragma once

#include <string>
#include <vector>

namespace ai4all {

class text_stream {
  public:
    explicit text_stream(std::vector<std::string> stops) : stops_(std::move(stops)) {}

    // Append a token's bytes; return the text that became certain. Bytes that may yet turn out to
    // be the start of a stop sequence, or of a code point, are kept back.
    std::string push(const std::string & bytes);

    // No more bytes will come: return what was kept back.
    std::string flush();

    // Whether a stop sequence was seen; the text then ends before it.
    bool stopped() const noexcept { return stopped_; }

  private:
    std::vector<std::string> stops_;
    std::string              kept_;
    bool                     stopped_ = false;
};

// Length of the longest prefix of `bytes` that ends on a code point boundary or an invalid byte.
size_t utf8_whole_prefix(const std::string & bytes) noexcept;

// `bytes` with each byte that is no part of valid UTF-8 replaced by U+FFFD.
std::string utf8_sanitize(const std::string & bytes);

}  // namespace ai4all
