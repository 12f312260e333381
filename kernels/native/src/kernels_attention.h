#pragma once

#include "kernels.h"

namespace unetrt::UNETRT_ISA {

int64_t attention_workspace(const AttentionArgs& args);
int64_t attention_scratch(const AttentionArgs& args);
// Item `item` of phase 0: keys and values of a block of a head's channels, or a block of dst's border.
void pack_tokens(const AttentionArgs& args, int item, float* scratch);
// Item `item` of phase 1: a chunk of an image's and head's queries.
void attend_chunk(const AttentionArgs& args, int item, float* scratch);

int attention_items(const AttentionArgs& args, int phase);
void attention(const AttentionArgs& args, int phase, int item, float* scratch);

}  // namespace unetrt::UNETRT_ISA
