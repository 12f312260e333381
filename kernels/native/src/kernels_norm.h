#pragma once

#include "kernels.h"

namespace unetrt::UNETRT_ISA {

// Rows [from, to) of one block, for who has just written them.
void measure_rows(const MeasureArgs& args, int block, int from, int to);

int measure_items(const MeasureArgs& args);
void measure(const MeasureArgs& args, int item);

int64_t norm_workspace(const NormArgs& args);
int norm_items(const NormArgs& args);
void norm(const NormArgs& args, int item);

}  // namespace unetrt::UNETRT_ISA
