// bus_guard.cpp owns the process's SIGBUS handler, see bus_guard.h. Faults elsewhere go to the handler before it.
#include "bus_guard.h"

#include <signal.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <mutex>

namespace kvfs {

namespace {
constexpr int kGuards = 4096;

struct Guard {
  std::atomic<uintptr_t> base{0};  // 0: free
  std::atomic<uint64_t> size{0};
  std::atomic<bool> hit{false};
};
Guard g_guards[kGuards];
std::mutex g_mu;
struct sigaction g_before;

void on_bus(int sig, siginfo_t* info, void* context) {
  const int saved = errno;
  const uintptr_t at = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Guard& g : g_guards) {
    uintptr_t base = g.base.load(std::memory_order_acquire);
    uint64_t size = g.size.load(std::memory_order_relaxed);
    if (base == 0 || at - base >= size) continue;
    void* mem = reinterpret_cast<void*>(base);
    g.hit.store(true, std::memory_order_release);
    if (mmap(mem, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) ==
        mem) {
      errno = saved;
      return;
    }
    break;
  }
  errno = saved;
  if ((g_before.sa_flags & SA_SIGINFO) != 0 && g_before.sa_sigaction != nullptr) {
    g_before.sa_sigaction(sig, info, context);
  } else if (g_before.sa_handler != SIG_DFL && g_before.sa_handler != SIG_IGN) {
    g_before.sa_handler(sig);
  } else {
    signal(sig, SIG_DFL);  // the instruction faults again, and the process ends as it would have
  }
}
}  // namespace

int bus_guard_add(void* base, uint64_t size) {
  std::lock_guard<std::mutex> lock(g_mu);
  static const int installed = [] {
    struct sigaction a {};
    a.sa_sigaction = on_bus;
    a.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    return sigaction(SIGBUS, &a, &g_before);
  }();
  if (installed != 0) return -1;
  for (int i = 0; i < kGuards; ++i) {
    if (g_guards[i].base.load(std::memory_order_relaxed) != 0) continue;
    g_guards[i].hit.store(false, std::memory_order_relaxed);
    g_guards[i].size.store(size, std::memory_order_relaxed);
    g_guards[i].base.store(reinterpret_cast<uintptr_t>(base), std::memory_order_release);
    return i;
  }
  return -1;
}

bool bus_guard_hit(int slot) { return g_guards[slot].hit.load(std::memory_order_acquire); }

void bus_guard_remove(int slot) {
  std::lock_guard<std::mutex> lock(g_mu);
  g_guards[slot].base.store(0, std::memory_order_release);
}

}  // namespace kvfs
