#pragma once

#include "plan.h"

namespace unetrt {

// The weights of a program in the order in which the plan's kernels read them. weights: plan.weights floats; packed:
// plan.packed floats.
void pack_weights(const Plan& plan, const float* weights, float* packed);

}  // namespace unetrt
