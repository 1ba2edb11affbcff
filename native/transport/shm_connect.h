// shm_connect.h owns how a connection through shared memory begins: where its sockets are, and the handing over of the
// segment after the hellos, which are those of TCP (tcp_connect.h). Nothing of it waits but shm_connect.
//
// A server's name stands for the socket of that name in one directory of the host, so that the cluster map, which is the same
// on all hosts, says nothing about their file systems.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "shm_stream.h"

namespace kvfs {

// "shm://NAME". False: it is none.
bool parse_shm_url(std::string_view url, std::string* name);
// The directory is $KVFS_SHM_DIR, else /run/kvfs.
std::string shm_path(std::string_view name);

// A listening socket or -errno; -EADDRINUSE: somebody listens there. The directory is made where it is not there.
int shm_listen(const std::string& path, int backlog);
bool is_unix(int fd);

// Hands the segment over: one message, to a socket that has room. 0 or -errno.
int send_segment(int fd, const ShmSetup& setup, int memory);

// Connects and says `hello` (Purpose::Attach). As client_handshake, and the link, or -errno.
int shm_connect(const std::string& path, const wire::Hello& hello, wire::HelloReply* reply,
                std::unique_ptr<ShmLink>* out, uint64_t deadline_ns);
// What a segment must be, that somebody else has made: as large as `setup` says, for ever. 0 or -errno.
int check_segment(int memory, const ShmSetup& setup);

}  // namespace kvfs
