// bus_guard.h owns what happens when a client truncates memory that it shares with us: the fault (SIGBUS) puts private
// zero pages in the memory's place and the daemon goes on. Only memory that cannot be sealed against this is guarded.
// Any thread may add and remove; the handler takes no lock.
#pragma once

#include <cstdint>

namespace kvfs {

// Guards [base, base + size); returns a slot, or -1 if kGuards areas are guarded already.
int bus_guard_add(void* base, uint64_t size);
// True once the memory has been replaced: it is not the client's any more.
bool bus_guard_hit(int slot);
// Before the memory is unmapped, and once nothing touches it any more.
void bus_guard_remove(int slot);

}  // namespace kvfs
