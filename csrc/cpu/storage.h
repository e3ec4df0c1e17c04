// How numbers lie in memory.
#pragma once
#include <cstdint>

#include "../logits.h"

namespace align {

static inline int64_t size_of(Storage storage) { return storage == Storage::f32 ? 4 : 2; }  // bytes

void check_storage(const char* name, Storage);  // raises std::invalid_argument

}  // namespace align
