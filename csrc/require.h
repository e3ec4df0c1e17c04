// Checks of what a caller passed; the message names the value.
#pragma once
#include <cstdint>
#include <sstream>
#include <stdexcept>

namespace align {

template <class... Parts>
void require(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

inline void check_pointer(const char* name, const void* p, int64_t alignment) {
  require(p != nullptr, name, " must not be null");
  require(reinterpret_cast<uintptr_t>(p) % uintptr_t(alignment) == 0, name, " must be aligned to ", alignment,
          " bytes, got address ", p);
}

}  // namespace align
