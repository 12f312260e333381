#pragma once

#include "layout.h"

namespace unetrt {

// The weights of a program in the order in which the layout's kernels read them. weights: layout.weights floats; packed:
// layout.packed floats.
void pack_weights(const Layout& layout, const float* weights, float* packed);

}  // namespace unetrt
