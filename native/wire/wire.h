// wire.h owns the bytes between a client and a chunk server: hello, frames, descriptors, results, and their checks.
// All integers are little-endian. docs/wire-protocol.md says the same in words. Nothing here does I/O.
//
// A connection begins with one Hello and one HelloReply. After that both sides send frames: a FrameHeader, a body of
// fixed-size records (what and how many follows from the header), and over TCP the payload that the records describe.
// Over RDMA there is no payload: data goes by RDMA READ and WRITE to and from what a descriptor names. Nor is there over
// shared memory, where a descriptor names a place in the connection's arena.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "../store/store.h"

namespace kvfs::wire {

constexpr uint16_t kVersion = 1;
constexpr uint32_t kMaxBatch = 256;                  // descriptors of one request frame, results of one response frame
constexpr uint32_t kMaxOpBytes = kMaxChunk;          // payload of one descriptor or result
constexpr uint32_t kMaxFrameBytes = 2u * kMaxChunk;  // payload of one frame
constexpr uint32_t kMaxCapability = 2048;            // bytes of a Hello's capability
constexpr uint32_t kMaxMap = 1u << 20;               // bytes of a cluster map
constexpr uint32_t kMaxConnections = 64;             // of one session

// Features, agreed on as the intersection of what both sides offer.
constexpr uint64_t kDataSums = 1;  // every payload has an XXH3-64, which its receiver checks
constexpr uint64_t kFeatures = kDataSums;

constexpr uint32_t kHelloMagic = 0x4846564bu;  // "KVFH"
constexpr uint32_t kReplyMagic = 0x5246564bu;  // "KVFR"
constexpr uint32_t kFrameMagic = 0x4646564bu;  // "KVFF"

enum class Purpose : uint16_t {
  Session = 1,  // a new session on target `target`; the connection is its first
  Attach = 2,   // one more connection of the session `session`; also the private data of an RDMA connection
  Map = 3,      // the cluster map; the server ends the connection after its reply
};

// Client to server, first bytes of a connection; `capability_len` bytes follow.
struct Hello {
  uint32_t magic;
  uint16_t version;  // highest that the client speaks
  uint16_t purpose;
  uint64_t features;
  uint8_t session[16];  // Attach: as the reply to Session gave it; else 0
  uint8_t
      client[16];  // random, of the client process; its next session at the target ends the one before. All 0: does not
  uint32_t target;  // number of the target at this server, as in the map
  uint32_t capability_len;
  uint64_t sum;  // XXH3-64 of this struct with sum = 0, and the capability
};
static_assert(sizeof(Hello) == 64);

// What a client asks an RDMA listener for: one more connection of a session, as Purpose::Attach. It is the private data of
// the RDMA CM's request, of which there are 56 bytes; the features are the session's.
struct RdmaHello {
  uint32_t magic;
  uint16_t version;
  uint16_t rsv;
  uint8_t session[16];
  uint8_t client[16];
  uint32_t target;
  uint32_t rsv1;
  uint64_t sum;  // XXH3-64 of this struct with sum = 0
};
static_assert(sizeof(RdmaHello) == 56);

// Private data of the acceptance, err = 0, or of the rejection, err as in HelloReply.
struct RdmaReply {
  int32_t err;
  uint32_t rsv;
};
static_assert(sizeof(RdmaReply) == 8);

// Server to client; `map_len` bytes follow, with Purpose::Map alone.
struct HelloReply {
  uint32_t magic;
  uint16_t version;  // what is spoken from now on
  uint16_t rsv;
  int32_t
      err;  // 0; -EPROTONOSUPPORT, -EACCES (capability), -ENODEV (target), -ESTALE (no such session), -EMFILE, -EBUSY
  uint32_t map_version;
  uint64_t features;
  uint8_t session[16];  // names the session; random, so that it proves the right to attach
  // Eight bytes of the machine's boot, eight of this run of the target. A client that sees another run knows what may be lost:
  // with the same boot blocks that were not durable, else what of files was not, too.
  uint8_t boot[16];
  uint32_t max_ops;    // descriptors that the session may have unanswered
  uint32_t max_batch;  // descriptors of one frame, <= kMaxBatch
  uint64_t max_in;     // bytes of payload towards the server that the session may have unanswered
  uint32_t keep_ms;    // how long a session outlives its last connection
  uint32_t map_len;
  uint64_t sum;  // XXH3-64 of this struct with sum = 0, and the map
};
static_assert(sizeof(HelloReply) == 88);

enum class Type : uint8_t {
  Request = 1,  // client to server: `count` descriptors; payload: that of the Put and Write descriptors, in order
  Response =
      2,  // server to client: `count` results of batch `batch`, some or all; payload: that of the results, in order
  Cancel = 3,  // client to server: of batch `batch`, what has not begun shall not begin (-ECANCELED)
  Ping = 4,    // client to server; the answer is a Pong with the same `batch`
  Pong = 5,
  Bye = 6,  // either side: nothing follows; `batch` = an errno that says why
};

struct FrameHeader {
  uint32_t magic;
  uint8_t type;
  uint8_t rsv0;
  uint16_t count;        // records of the body
  uint32_t map_version;  // Request: of the map by which the client chose this target
  uint32_t rsv1;
  uint64_t payload;  // bytes after the body
  uint64_t batch;  // Request: a number that the connection's client gives, never twice; Response: the batch it answers
  uint64_t rsv2;
  uint64_t sum;  // XXH3-64 of the header with sum = 0, and the body
};
static_assert(sizeof(FrameHeader) == 48);

enum class Op : uint8_t {
  Get = 1,       // bytes [off, off+len) of a chunk. result = bytes (short at the end), -ENOENT, -EIO
  Put = 2,       // sealed, create-if-absent, off 0. result = 1 written, 0 was there, -EEXIST, -ENOSPC
  Write = 3,     // file chunk: [off, off+len). result = len
  Truncate = 4,  // file chunk: new length = off (0 deletes). result = 0
  Delete = 5,    // result = 0 or -ENOENT
  Lookup = 6,    // result = length or -ENOENT
  Flush = 7,     // file chunks of the inode in key[0..8): durable
  Sync = 8,      // everything acknowledged so far: durable
  Scan = 9,      // chunks of (kind, ns) from `cursor` on: up to len bytes of ScanRecord. result = bytes, 0 = end
  Purge = 10,    // File: chunks [key[8..16), key[16..24)) of inode key[0..8); Block: all of the namespace. result = 0
  Stat = 11,     // payload: one TargetStat. result = its bytes
};
constexpr uint8_t kOpMax = 11;
inline bool has_in(Op op) { return op == Op::Put || op == Op::Write; }                    // payload to the server
inline bool has_out(Op op) { return op == Op::Get || op == Op::Scan || op == Op::Stat; }  // payload to the client
inline bool mutates(Op op) {
  return op == Op::Put || op == Op::Write || op == Op::Truncate || op == Op::Delete || op == Op::Purge;
}

constexpr uint8_t kDurable = 1, kNoTouch = 2;  // Desc::flags, as Request's
constexpr uint8_t kFlagsMask = 3;

struct Desc {
  uint8_t op;
  uint8_t flags;
  uint8_t kind;  // Kind
  uint8_t
      key_len;  // of `key`: 1..33 for blocks (33: the hash of a longer one), 16 for files; 0 where no chunk is named
  uint32_t ns;
  uint8_t key[32];
  uint32_t off;
  uint32_t len;
  // mutates(): a number of the session, rising by one with each new operation, the same when it is sent again: the server
  // answers such an operation from memory and does not execute it twice. Else 0.
  uint64_t seq;
  uint64_t sum;   // has_in(): XXH3-64 of the payload, with kDataSums
  uint64_t addr;  // RDMA: where data is or goes in the client's memory; shm: in the arena; TCP: 0
  uint32_t rkey;
  uint32_t rsv;
  uint64_t cursor;  // Scan
};
static_assert(sizeof(Desc) == 88);

struct Result {
  uint16_t index;  // of the descriptor in its batch
  uint16_t rsv;
  uint32_t len;  // payload bytes (TCP: in this frame; RDMA: written)
  int64_t result;
  uint64_t sum;  // XXH3-64 of the payload, with kDataSums
};
static_assert(sizeof(Result) == 24);

// The bytes of kvfs_scan_entry (include/kvfs_ring.h), so that they go to whoever asked as they are.
struct ScanRecord {
  uint64_t
      cursor;  // the last record's continues behind it, UINT64_MAX: the end; an earlier one's repeats this answer. < 2^48
  uint64_t length;
  uint32_t mtime, version;
  uint8_t key_len;
  uint8_t rsv[7];
  uint8_t key[32];
};
static_assert(sizeof(ScanRecord) == 64);

struct TargetStat {
  uint64_t capacity, free, room, chunks;  // bytes, bytes, Store::room(), count
};
static_assert(sizeof(TargetStat) == 32);

// A frame's header and body as received: 0, -EPROTO (magic, type, reserved fields, counts), -EBADMSG (sum).
// body: body_bytes(h) bytes.
uint32_t body_bytes(const FrameHeader& h);
int check_header(const FrameHeader& h, bool from_client);  // all but the sum; before the body is there
int check_sum(const FrameHeader& h, const void* body);
// A message that is one frame without payload, header and body one behind the other: all of these checks.
int check_message(const uint8_t* message, size_t n, bool from_client, FrameHeader* h);
void seal(FrameHeader* h, const void* body);  // sets sum

int check_hello(const Hello& h, const void* capability);  // 0, -EPROTO, -EBADMSG
void seal(Hello* h, const void* capability);
int check_hello(const RdmaHello& h);
void seal(RdmaHello* h);
int check_reply(const HelloReply& r, const void* map);
void seal(HelloReply* r, const void* map);

// What a client asks for, by itself: shape of the key, ranges, unknown operations and flags, reserved fields.
// 0, -EINVAL or -EOPNOTSUPP. The batch's payload must be the sum of the payloads of its descriptors (TCP).
int check_desc(const Desc& d);
ChunkKey key_of(const Desc& d);

uint64_t data_sum(const void* p, size_t n);  // XXH3-64

}  // namespace kvfs::wire
