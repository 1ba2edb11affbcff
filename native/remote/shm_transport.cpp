// shm_transport.cpp: see shm_transport.h.
#include "shm_transport.h"

#include <sys/stat.h>

#include <cerrno>

#include "../transport/shm_client.h"
#include "../transport/shm_connect.h"

namespace kvfs {

namespace {
// What a Dial holds until a channel is made of it; by itself it ends the connection.
struct Held {
  std::unique_ptr<ShmLink> link;
};
}  // namespace

std::vector<Route> ShmTransport::routes(const wire::MapEndpoint& e) {
  struct stat st;
  if (::stat(shm_path(wire::shm_name(e)).c_str(), &st) != 0 || !S_ISSOCK(st.st_mode)) return {};
  return {Route{}};
}

void ShmTransport::dial(Dial* d, const wire::Hello& hello, const std::vector<uint8_t>&, uint64_t deadline_ns) {
  if (wire::Purpose{hello.purpose} != wire::Purpose::Attach) {
    d->err = -EPROTONOSUPPORT;
    return;
  }
  auto held = std::make_shared<Held>();
  d->reply = {};
  d->err = shm_connect(shm_path(wire::shm_name(d->endpoint)), hello, &d->reply, &held->link, deadline_ns);
  d->answered = d->err == 0 || (d->reply.magic == wire::kReplyMagic && d->reply.err == d->err);
  if (d->err == 0) d->link = std::move(held);
}

std::unique_ptr<ClientChannel> ShmTransport::channel(Dial* d, const ChannelLimits& limits) {
  return std::make_unique<ShmClientChannel>(*uring_, std::move(static_cast<Held*>(d->link.get())->link), limits);
}

}  // namespace kvfs
