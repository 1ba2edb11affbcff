/* kvfs_net.h owns the C interface between Python and chunk servers: nodes that the network can use. The other end is in
 * kvfs_remote.h. Thread-safe, like kvfs_node.h; results: >= 0 or -errno, text for people in `err`. */
#ifndef KVFS_NET_H
#define KVFS_NET_H

#include "kvfs_node.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct kvfs_server kvfs_server;

struct kvfs_server_config {
  kvfs_node* const*
      targets;           /* number i is Hello's target i; nodes with a store of their own. They outlive the server. */
  uint32_t target_count; /* 1..64 */
  uint32_t max_sessions; /* 0 = 256 */
  const uint8_t*
      auth_key;    /* Ed25519 public key, 32 bytes, of who signs capabilities; NULL: nobody's rights are checked */
  const void* map; /* cluster map (wire/map.h) */
  size_t map_bytes;
  uint64_t buffer_bytes; /* of each target, for data on its way; 0 = 256 MiB */
  uint32_t keep_ms;      /* how long a session outlives its last connection; 0 = 30,000 */
  uint32_t data_sums;    /* offers end-to-end checksums */
  uint32_t rsv;
};

struct kvfs_net_stats {
  uint64_t sessions, connections, sessions_opened, sessions_superseded, connections_opened, refused, protocol_errors,
      denied;
  uint64_t ops, gets, puts, writes, stale_maps, replayed, cancelled, bytes_in, bytes_out, frames_in, frames_out;
  uint64_t buffers_used, buffers_total; /* bytes */
  uint64_t calls, rdma, copied;
};

int kvfs_server_start(const struct kvfs_server_config* cfg, kvfs_server** out, char* err, size_t err_len);
/* "tcp://HOST:PORT" or "rdma://HOST:PORT", numeric address, IPv6 in brackets; port 0: any. Returns the port. At most 32. */
int kvfs_server_listen(kvfs_server* s, const char* url, char* err, size_t err_len);
/* A newer map: requests of clients that chose by an older one are answered with "stale map". */
int kvfs_server_set_map(kvfs_server* s, const void* map, size_t map_bytes, char* err, size_t err_len);
int kvfs_server_stats(kvfs_server* s, struct kvfs_net_stats* out);
/* Takes no more connections, ends all sessions when what they have under way has ended (at most 5 s). */
void kvfs_server_stop(kvfs_server* s);

#ifdef __cplusplus
}
#endif
#endif
