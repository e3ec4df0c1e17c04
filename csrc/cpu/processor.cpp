#include "processor.h"

#include <cstdlib>
#include <string>

namespace align {
#ifdef __x86_64__
namespace {

std::string most() {
  const char* named = std::getenv("ATEN_CPU_CAPABILITY");
  return named ? named : "";
}

}  // namespace

bool serves_avx2() {
  __builtin_cpu_init();
  return most() != "default" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool serves_avx512() {
  return serves_avx2() && most() != "avx2" && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif
}  // namespace align
