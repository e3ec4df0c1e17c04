#include "processor.h"

#include <cstdlib>
#include <string>
#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace align {
#ifdef __x86_64__
namespace {

std::string most() {
  const char* named = std::getenv("ATEN_CPU_CAPABILITY");
  return named ? named : "";
}

// Registers of CPUID's leaf 7 (Intel's manual, volume 2A), 0 where it does not go so far.
struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};
Leaf leaf_7(unsigned below) {
  Leaf leaf;
  unsigned most = 0, unused[3];
  if (!__get_cpuid_count(7, 0, &most, &unused[0], &unused[1], &unused[2]) || below > most) return leaf;
  __get_cpuid_count(7, below, &leaf.eax, &leaf.ebx, &leaf.ecx, &leaf.edx);
  return leaf;
}

// Tiles are eight kilobytes that a system saves of a process only where that has asked (arch_prctl(2)).
bool granted_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
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

bool serves_avx512_bf16() { return serves_avx512() && (leaf_7(1).eax >> 5 & 1); }

bool serves_amx() {
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kBoth = kBf16 | kTile;
  return serves_avx512() && (leaf_7(0).edx & kBoth) == kBoth && granted_tiles();
}
#endif
}  // namespace align
