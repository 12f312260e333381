#pragma once

#include "kernels.h"

namespace unetrt::UNETRT_ISA {

int copy_items(const CopyArgs& args);
void copy(const CopyArgs& args, int item);
int split_items(const CopyArgs& args);
void split(const CopyArgs& args, int item);
int planar_items(const PlanarArgs& args);
void from_planar(const PlanarArgs& args, int item);
void to_planar(const PlanarArgs& args, int item);

}  // namespace unetrt::UNETRT_ISA
