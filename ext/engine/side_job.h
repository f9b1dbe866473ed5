// Work that is no generation: embeddings, and the scores of continuations.
//
// Each has a context of its own beside the slots', made when it is first needed. A job advances by
// one decode at a time, so that running sequences keep their turn in between.

#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine.h"
#include "llama.h"
#include "model.h"
#include "slot.h"

namespace ai4all {

class side_job {
  public:
    explicit side_job(command cmd) : request(std::move(cmd)) {}
    virtual ~side_job() = default;

    // One decode's worth of work; true when all is done.
    // Throws engine_error: context_overflow, bad_request, compute_failed, out_of_memory.
    virtual bool advance() = 0;

    // Fill the last event with the result.
    virtual void report(event & e) = 0;

    command  request;
    timeline times;
    int32_t  n_prompt = 0;
};

// A decode was broken off because its request was cancelled or late.
class broken_off {};

class embed_job : public side_job {
  public:
    embed_job(command cmd, loaded_model & model);
    bool advance() override;
    void report(event & e) override;

  private:
    loaded_model &                        model_;
    llama_context *                       ctx_;
    std::vector<std::vector<llama_token>> texts_;
    size_t                                done_ = 0;
    std::vector<float>                    rows_;
};

class score_job : public side_job {
  public:
    score_job(command cmd, loaded_model & model);
    bool advance() override;
    void report(event & e) override;

  private:
    void advance_prefix();
    void advance_group();
    void add_score(size_t k, const float * row, llama_token token);

    loaded_model &                        model_;
    llama_context *                       ctx_;
    std::vector<llama_token>              prefix_;
    size_t                                n_past_ = 0;
    std::vector<std::vector<llama_token>> continuations_;
    size_t                                done_ = 0;
    std::vector<float>                    scores_;
};

// Natural-log probability of `token` under the row of logits.
double log_probability(const float * logits, int32_t n_vocab, llama_token token) noexcept;

}  // namespace ai4all
