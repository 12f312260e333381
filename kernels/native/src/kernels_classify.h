#pragma once

#include "kernels.h"

namespace unetrt::UNETRT_ISA {

int tokens_items(const TokensArgs& args);
void to_tokens(const TokensArgs& args, int item);
int pixels_items(const TokensArgs& args);
void to_pixels(const TokensArgs& args, int item);

int64_t classify_scratch(const ClassifyArgs& args);
int classify_items(const ClassifyArgs& args);
void classify(const ClassifyArgs& args, int item, float* scratch);

}  // namespace unetrt::UNETRT_ISA
