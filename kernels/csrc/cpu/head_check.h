// Owns: the checks of the segments and points of the small heads.
#pragma once

#include <cstddef>
#include <vector>

#include "../sett.h"
#include "head_plan.h"

namespace sett {
namespace cpu {

// The items of all segments and points; an unsound one, or one without scores, has no rows and is not live. Unsound
// ones get their NaN losses and scores and their zero gradients of scores here. The first fault goes to `fault`.
std::vector<HeadItem> checked_items(const HeadArgs& args, Fault& fault);

}  // namespace cpu
}  // namespace sett
