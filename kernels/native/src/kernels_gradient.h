#pragma once

#include "kernels.h"

namespace unetrt::UNETRT_ISA {

int64_t norm_gradient_workspace(const NormGradientArgs& args);
int norm_gradient_items(const NormGradientArgs& args);
void norm_gradient(const NormGradientArgs& args, int phase, int item);

int64_t attention_gradient_scratch(const AttentionGradientArgs& args);
int attention_gradient_items(const AttentionGradientArgs& args);
void attention_gradient(const AttentionGradientArgs& args, int item, float* scratch);

}  // namespace unetrt::UNETRT_ISA
