#pragma once
#ifdef __x86_64__
#include <xmmintrin.h>
#endif

namespace align {

// Denormal results cost more than a hundred cycles each, and exp(l - m)^2 meets them on every peaked row.
class FlushDenormals {
 public:
#ifdef __x86_64__
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8000); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  ~FlushDenormals() {}  // other processors take denormals at full speed
#endif
};

}  // namespace align
