// The products of bfloat16 as they are compiled, on a machine that may lack AMX: its instructions are trapped and
// emulated.
#include "amx_emulator.h"

#include <signal.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

#include <exception>
#include <string>

#define serves_amx really_serves_amx
#include "../../csrc/cpu/processor.cpp"
#undef serves_amx
#include "../../csrc/cpu/gemm.h"

namespace align {
bool serves_amx() { return true; }
void check_storage(const char*, Storage) {}
}  // namespace align

namespace {

// As instructions number them.
constexpr int kRegisters[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// Volume 2A, 2.1.5 (ModR/M, SIB) and 2.3.5 (VEX): c4, ~R ~X ~B map, W ~vvvv L prefix, opcode.
void emulate(int signal_number, siginfo_t*, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  const auto* code = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  const int prefix = code[2] & 3, opcode = code[3], mode = code[4] >> 6, reg = code[4] >> 3 & 7, rm = code[4] & 7;
  const int vvvv = ~code[2] >> 3 & 15, base_bit = (~code[1] >> 5 & 1) << 3, index_bit = (~code[1] >> 6 & 1) << 3;
  const uint8_t* next = code + 5;
  int64_t base = 0, index = 0;
  if (mode != 3) {
    const bool sib = rm == 4;
    int low = rm;
    if (sib) {
      const int number = (*next >> 3 & 7) | index_bit;
      if (number != 4) index = registers[kRegisters[number]] << (*next >> 6);
      low = *next++ & 7;
    }
    const bool bare = mode == 0 && low == 5;  // four bytes and no register, but for the next instruction's address
    if (!bare) base = registers[kRegisters[low | base_bit]];
    if (mode == 1) base += static_cast<int8_t>(*next++);
    if (mode == 2 || bare) {
      int32_t more;
      memcpy(&more, next, sizeof more);
      next += sizeof more;
      base += more + (bare && !sib ? reinterpret_cast<int64_t>(next) : 0);
    }
  }
  auto* const memory = reinterpret_cast<void*>(base);
  const bool vex = code[0] == 0xc4 && (code[1] & 0x1f) == 2 && (code[2] & 0x84) == 0;
  const int what = vex ? opcode << 8 | prefix << 4 | (mode == 3) : 0;
  switch (what) {
    case 0x4900: amx::load_config(static_cast<char*>(memory) + index); break;
    case 0x4910: amx::store_config(static_cast<char*>(memory) + index); break;
    case 0x4901: amx::tiles = {}; break;
    case 0x4931: amx::zero(reg); break;
    case 0x4b30: amx::load(reg, memory, index); break;
    case 0x4b20: amx::store(reg, memory, index); break;
    case 0x5c21: amx::multiply(reg, rm, vvvv); break;
    default: signal(signal_number, SIG_DFL); return;  // no instruction of these: it is raised again
  }
  registers[REG_RIP] = reinterpret_cast<greg_t>(next);
}

// Traps them while it lives. A processor that has AMX traps what is wrong alone.
class Emulated {
 public:
  Emulated() {
    static const bool really = align::really_serves_amx();  // asks the system for them
    (void)really;
    amx::fault = nullptr;
    struct sigaction ours = {};
    ours.sa_sigaction = emulate;
    ours.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &ours, &before_);
  }
  ~Emulated() { sigaction(SIGILL, &before_, nullptr); }

 private:
  struct sigaction before_;
};

const align::Gemm* named(const char* name) {
  for (const align::Gemm* const* gemm = align::available_narrow_gemms(); *gemm; gemm++)
    if (strcmp((*gemm)->name, name) == 0) return *gemm;
  return nullptr;
}

align::Matrix matrix(const void* data, const int64_t* strides) {
  return {data, align::Storage::bf16, strides[0], strides[1]};
}

}  // namespace

extern "C" {

// Each returns what went wrong, else null.
const char* align_product(const char* gemm, const void* a, const int64_t* a_strides, const void* b,
                          const int64_t* b_strides, float* c, int64_t stride, int64_t m, int64_t n, int64_t k, int add,
                          int threads) {
  static std::string message;
  Emulated emulated;
  try {
    align::set_narrow_gemm(gemm);
    align::product({matrix(a, a_strides), matrix(b, b_strides), c, stride, m, n, k, add != 0}, threads);
  } catch (const std::exception& error) {
    return (message = error.what()).c_str();
  }
  return amx::fault;
}

int64_t align_packed(const char* gemm, int64_t n) { return int64_t(named(gemm)->packed(n)); }

// One slice in a process of its own, which may end by a signal.
const char* align_slice_apart(const char* gemm, const void* a, const int64_t* a_strides, const void* b,
                              const int64_t* b_strides, float* c, int64_t stride, int64_t m, int64_t n, int64_t k,
                              int add, void* packed) {
  const align::Gemm* const of = named(gemm);
  const pid_t child = fork();
  if (child == 0) {
    Emulated emulated;
    signal(SIGSEGV, SIG_DFL);
    signal(SIGBUS, SIG_DFL);
    of->product({matrix(a, a_strides), matrix(b, b_strides), c, stride, m, n, k, add != 0}, packed);
    _exit(amx::fault ? 1 : 0);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) return "no process";
  if (WIFSIGNALED(status)) return strsignal(WTERMSIG(status));
  return WEXITSTATUS(status) == 0 ? nullptr : "a fault of AMX";
}

void align_load_config(const void* from) {
  Emulated emulated;
  __asm__ volatile("ldtilecfg (%0)" ::"r"(from) : "memory");
}
void align_store_config(void* to) {
  Emulated emulated;
  __asm__ volatile("sttilecfg (%0)" ::"r"(to) : "memory");
}

// The emulator itself.
const char* amx_fault() { return amx::fault.exchange(nullptr); }
void amx_load_config(const void* from) { amx::load_config(from); }
void amx_store_config(void* to) { amx::store_config(to); }
void amx_zero(int tile) { amx::zero(tile); }
void amx_load(int tile, const void* from, int64_t stride) { amx::load(tile, from, stride); }
void amx_store(int tile, void* to, int64_t stride) { amx::store(tile, to, stride); }
void amx_multiply(int c, int a, int b) { amx::multiply(c, a, b); }

}  // extern "C"
