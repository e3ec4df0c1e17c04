// Things that have a name.
#pragma once
#include <cstring>
#include <string>

#include "../require.h"

namespace align {

// The one of `all`, which ends with null, that has this name. Raises std::invalid_argument.
template <class T>
const T* named(const char* what, const T* const* all, const char* name) {
  std::string known;
  for (; *all; all++) {
    if (std::strcmp((*all)->name, name) == 0) return *all;
    known += std::string(known.empty() ? "" : ", ") + (*all)->name;
  }
  require(false, what, " must be one of ", known, " on this machine, got \"", name, "\"");
  return nullptr;
}

}  // namespace align
