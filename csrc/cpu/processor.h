// What the processor serves, as far as ATEN_CPU_CAPABILITY allows: torch's own kernels keep to that variable too.
#pragma once

namespace align {
#ifdef __x86_64__
bool serves_avx2();  // with FMA
bool serves_avx512();
bool serves_avx512_bf16();
bool serves_amx();  // with bfloat16; asks the system for it first
#endif
}  // namespace align
