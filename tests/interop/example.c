/* A first client in C: blocks put, read, listed as there or not, and evicted; then two batches under way at once.
 *   cc example.c $(kvfs usrbio --print-flags) -o example && ./example DATA/kvfs.sock */
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvfs.h"

enum { N = 64, SIZE = 4096 };
static const uint64_t kTimeout = 10ull * 1000 * 1000 * 1000;

static void need(int ok, const char* what, int result) {
  if (ok) return;
  fprintf(stderr, "example: %s: %s\n", what, result < 0 ? strerror(-result) : "wrong result");
  exit(1);
}

int main(int argc, char** argv) {
  kvfs_client* client;
  kvfs_ring* ring;
  struct kvfs_iov memory; /* shared with the daemon: values are read and written in place */
  struct kvfs_block blocks[N];
  static char keys[N][16];
  int r, ns, done = 0;

  if (argc != 2) {
    fprintf(stderr, "usage: example SOCKET\n");
    return 2;
  }
  r = kvfs_open(argv[1], &client);
  need(r == 0, argv[1], r);
  ns = kvfs_ns_open(client, "default", "example", 0);
  need(ns >= 0, "open the namespace", ns);
  r = kvfs_ring_create(client, 128, &ring);
  need(r == 0, "create a ring", r);
  r = kvfs_iov_alloc(client, 2 * N * SIZE, 0, &memory);
  need(r == 0, "allocate memory", r);

  memset(blocks, 0, sizeof blocks);
  for (int i = 0; i < N; ++i) {
    blocks[i].key = keys[i];
    blocks[i].key_len = (uint32_t)snprintf(keys[i], sizeof keys[i], "block %d", i);
    blocks[i].len = SIZE;
    blocks[i].value_off = (uint64_t)i * SIZE;
    memset((char*)memory.base + blocks[i].value_off, i, SIZE);
  }
  r = kvfs_put(ring, ns, &memory, blocks, N, KVFS_SQE_DURABLE, kTimeout);
  need(r == N, "put", r);

  for (int i = 0; i < N; ++i) blocks[i].value_off += N * SIZE;
  r = kvfs_get(ring, ns, &memory, blocks, N, kTimeout);
  need(r == N, "get", r);
  need(memcmp(memory.base, (char*)memory.base + N * SIZE, N * SIZE) == 0, "compare", 0);

  r = kvfs_evict(ring, ns, blocks, 1, kTimeout);
  need(r == 1, "evict", r);
  r = kvfs_exists(ring, ns, blocks, N, kTimeout);
  need(r == N - 1 && blocks[0].status == -ENOENT && blocks[1].status == SIZE, "exists", r);
  r = kvfs_match_prefix(ring, ns, blocks + 1, N - 1, kTimeout);
  need(r == N - 1, "match_prefix", r);

  /* Two batches of half the blocks each, and poll() as an event loop would call it. */
  struct kvfs_batch half[2];
  struct pollfd event = {kvfs_ring_event_fd(ring), POLLIN, 0};
  need(event.fd >= 0, "event descriptor", event.fd);
  memset(half, 0, sizeof half);
  memset((char*)memory.base + N * SIZE, 0xff, N * SIZE);
  for (int i = 0; i < 2; ++i) {
    half[i].blocks = blocks + i * N / 2;
    half[i].n = N / 2;
    half[i].handle = ns;
    half[i].iov = memory.id;
    half[i].opcode = KVFS_OP_GET;
    r = kvfs_batch_submit(ring, &half[i]);
    need(r == 0, "submit", r);
  }
  while (done < 2) {
    struct kvfs_batch* ended[2];
    if (kvfs_arm(ring, 1) == 0) poll(&event, 1, 10000);
    r = kvfs_batch_poll(ring, ended, 2);
    need(r >= 0, "poll", r);
    done += r;
  }
  need(blocks[0].status == -ENOENT, "status of the evicted block", 0);
  for (int i = 1; i < N; ++i) {
    need(blocks[i].status == SIZE, "status", (int)blocks[i].status);
    need(((char*)memory.base)[blocks[i].value_off + SIZE - 1] == i, "value", 0);
  }
  printf("%d blocks\n", N - 1);
  kvfs_close(client);
  return 0;
}
