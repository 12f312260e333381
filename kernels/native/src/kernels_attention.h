#pragma once

#include "kernels.h"

namespace unetrt::UNETRT_ISA {

int64_t attention_workspace(const AttentionArgs& args);
int64_t attention_scratch(const AttentionArgs& args);
int attention_items(const AttentionArgs& args, int phase);
void attention(const AttentionArgs& args, int phase, int item, float* scratch);

}  // namespace unetrt::UNETRT_ISA
