#pragma once

#include "kernels.h"
#include "vec.h"

namespace unetrt::UNETRT_ISA {

// Rows [from, to) of one block, for who has just written them.
void measure_rows(const MeasureArgs& args, int block, int from, int to);

// What y = (x - mean) * factor + shift needs for the channels of a block and one image. inverse: of the group's
// deviation, a part of factor.
struct Affine {
    alignas(64) float mean[kBlock], inverse[kBlock], factor[kBlock], shift[kBlock];
};

void make_affine(const NormArgs& args, int block, int image, Affine& affine);

// Rows of dst that an item of a norm does.
int rows_a_piece(const Map& map);

int measure_items(const MeasureArgs& args);
void measure(const MeasureArgs& args, int item);

int64_t norm_workspace(const NormArgs& args);
int norm_items(const NormArgs& args);
void norm(const NormArgs& args, int item);

}  // namespace unetrt::UNETRT_ISA
