// What can be known of arguments without reading device memory. All raise std::invalid_argument naming the value.
#pragma once
#include "tile.h"

namespace align_cuda {

bool check(const Logits&, const void* state);  // whether there is anything to do
void check(const Logits&, const Out&);
void check(const Logits&, const Gradient&);
void check(const Logits&, const Peaks&);
void check(const Logits&, const TokenLoss&);
bool check(const UnitLoss&);

}  // namespace align_cuda
