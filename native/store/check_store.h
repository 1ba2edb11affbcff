// check_store.h owns the offline check of a store: everything on the device that contradicts itself or its checksums, or
// that the metadata does not know, and its repair. For fsck; nobody else may have the device open.
#pragma once

#include <atomic>
#include <cstdint>
#include <utility>
#include <vector>

#include "device.h"
#include "store.h"

namespace kvfs {

enum class Problem : uint32_t {
  SuperDamaged = 1,      // where: the copy
  PageDamaged = 2,       // where: the checkpoint's page; its records are lost
  GroupDamaged = 3,      // where: first missing group of the journal, length: how many; their records are lost
  RecordImpossible = 4,  // where: device offset of the page or group
  SlotTwice = 5,         // a chunk claims space that another holds, or that is no slot
  PieceMissing = 6,      // a block lacks a piece, or one has the wrong length
  PieceStray = 7,        // a piece without its block
  DataDamaged = 8,       // a chunk's bytes do not match their checksums, or can't be read
  InodeUnknown = 9,      // a file's chunk, and no such file
  BeyondSize = 10,       // a file's chunk behind the file's end
  NamespaceUnknown = 11  // a block of a namespace that does not exist
};
constexpr uint32_t kProblems = 12;

struct Finding {
  Problem problem;
  uint32_t length;  // bytes of the chunk
  ChunkKey key;     // of the chunk; with rsv[0] the piece
  uint64_t where;
};

struct CheckOptions {
  bool data = false;     // read every chunk and compare it with its checksums
  bool repair = false;   // drop what is unsound; needs a device open for writing
  bool orphans = false;  // compare with these, sorted:
  std::vector<uint32_t> namespaces;
  std::vector<std::pair<uint64_t, uint64_t>> files;  // inode, bytes it may have
  std::atomic<uint64_t>* done = nullptr;             // bytes read and verified so far
  std::atomic<uint64_t>* total = nullptr;
  const std::atomic<uint32_t>* cancel = nullptr;  // not 0: give up with ECANCELED; a repair has then changed nothing
};

struct CheckReport {
  static constexpr size_t kMaxFindings = 1u << 20;  // kept one by one; all are counted
  std::vector<Finding> findings;
  uint64_t counts[kProblems] = {};
  uint64_t chunks = 0, block_chunks = 0, file_chunks = 0, data_bytes = 0;  // sound ones
  uint64_t verified_bytes = 0;
  uint64_t salvaged = 0;  // blocks found again through older records (repair only)
  bool closed = false;    // the store had been closed properly
  bool repaired = false;  // something was written
};

// The status tells whether the check could be done at all; what it found is in the report. EPROTO: other version.
// EMEDIUMTYPE: no store. EUCLEAN: superblocks beyond repair.
Status check_store(Device& dev, const CheckOptions& opt, CheckReport* out);

}  // namespace kvfs
