// shared_memory.cpp owns the calls that make and populate shared memory. See shared_memory.h.
#include "shared_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace kvfs {

int make_shared_memory(const char* name, uint64_t bytes, bool huge, int* fd, void** mem) {
  *fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (*fd < 0) return -errno;
  int err = 0;
  if (ftruncate(*fd, off_t(bytes)) != 0 || fcntl(*fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    err = -errno;
  } else {
    *mem = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
    if (*mem == MAP_FAILED) {
      err = -errno;
    } else if (huge) {
      madvise(*mem, bytes, MADV_HUGEPAGE);
    }
  }
  if (err != 0) {
    close(*fd);
    *fd = -1;
  }
  return err;
}

int populate(void* mem, uint64_t bytes) {
  // EINVAL: a kernel before 5.14 has no such advice; pages then come when they are touched.
  return madvise(mem, bytes, MADV_POPULATE_WRITE) != 0 && errno != EINVAL ? -errno : 0;
}

void Populator::start() {
  thread_ = std::thread([this] { run(); });
}

void Populator::stop() {
  if (!thread_.joinable()) return;
  {
    std::lock_guard<std::mutex> g(mu_);
    stopping_ = true;
  }
  cv_.notify_one();
  thread_.join();
}

void Populator::add(void* mem, uint64_t bytes, std::shared_ptr<std::atomic<bool>> cancelled,
                    std::function<void(int)> done) {
  {
    std::lock_guard<std::mutex> g(mu_);
    jobs_.push_back({static_cast<char*>(mem), bytes, std::move(cancelled), std::move(done)});
  }
  cv_.notify_one();
}

void Populator::run() {
  std::unique_lock<std::mutex> lock(mu_);
  for (;;) {
    cv_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (jobs_.empty()) return;
    Job job = std::move(jobs_.front());
    jobs_.pop_front();
    lock.unlock();
    const uint64_t n = std::min(job.left, kPiece);
    const int err = *job.cancelled ? -ECANCELED : populate(job.at, n);
    job.at += n;
    job.left -= n;
    if (err != 0 || job.left == 0) job.done(err);
    lock.lock();
    if (err == 0 && job.left != 0) jobs_.push_back(std::move(job));
  }
}

}  // namespace kvfs
