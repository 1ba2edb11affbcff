/* kvfs_remote.h owns the C interface between Python and nodes whose chunks are on chunk servers (kvfs_net.h). Thread-safe,
 * like kvfs_node.h; results: >= 0 or -errno, text for people in `err`. */
#ifndef KVFS_REMOTE_H
#define KVFS_REMOTE_H

#include "kvfs_node.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A node whose chunks are on chunk servers, for kvfs_node_start: kvfs_node_config.data_path is NULL and `remote` is set. */
struct kvfs_remote_config {
  const void* map;
  size_t map_bytes;
  const void* capability; /* what proves the rights of this client; NULL: none */
  size_t capability_bytes;
  uint32_t file_ns;     /* namespace (class volume) of file chunks; 0: none, files are refused */
  uint32_t transport;   /* 0: whatever the map offers, shared memory and RDMA first; 1: TCP; 2: RDMA */
  uint32_t connections; /* per target and rail; 0 = 2 */
  uint32_t deadline_ms; /* an operation that nobody has answered by then fails with -ETIMEDOUT; 0 = 30,000 */
  uint32_t data_sums;   /* asks for end-to-end checksums */
  const char* rails;    /* comma-separated patterns of RDMA devices; NULL: all that are active */
};

struct kvfs_rail_stats {
  uint32_t target, rail;
  char name[64];
  uint32_t transport, connections, up, speed; /* speed: Mbit/s, 0 unknown */
  uint64_t bytes_in, bytes_out, ops, failures, reconnects, inflight_bytes;
};
/* At most `max` rails of all targets; how many there are. */
int kvfs_node_rails(kvfs_node* n, struct kvfs_rail_stats* out, int max);

/* The cluster map, from a chunk server ("tcp://HOST:PORT"): its bytes, at most `max`; -EMSGSIZE: more. */
int kvfs_fetch_map(const char* url, const void* capability, size_t capability_bytes, void* out, size_t max,
                   uint32_t timeout_ms, char* err, size_t err_len);

#ifdef __cplusplus
}
#endif
#endif
