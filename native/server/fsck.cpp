// fsck.cpp owns the C ABI of the offline check: it opens the device, runs check_store and hands its findings out.
#include <errno.h>
#include <stdlib.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <memory>

#include "../ffi/kvfs_node.h"
#include "../store/check_store.h"
#include "../store/uring_device.h"

using namespace kvfs;  // NOLINT: the C functions below

static_assert(sizeof(std::atomic<uint64_t>) == 8 && sizeof(std::atomic<uint32_t>) == 4);
static_assert(sizeof(kvfs_check_report::counts) == sizeof(CheckReport::counts));
static_assert(offsetof(kvfs_check_finding, id) - offsetof(kvfs_check_finding, kind) == offsetof(ChunkKey, id));

int kvfs_check(const struct kvfs_check_config* cfg, struct kvfs_check_progress* progress, struct kvfs_check_report* out,
               char* err, size_t err_len) {
  std::memset(out, 0, sizeof *out);
  CheckOptions opt;
  opt.data = cfg->data != 0;
  opt.repair = cfg->repair != 0;
  opt.orphans = cfg->orphans != 0;
  if (opt.orphans) {
    opt.namespaces.assign(cfg->ns_ids, cfg->ns_ids + cfg->namespaces);
    opt.files.reserve(cfg->files);
    for (uint64_t i = 0; i < cfg->files; i++) opt.files.emplace_back(cfg->inos[i], cfg->sizes[i]);
  }
  opt.done = reinterpret_cast<std::atomic<uint64_t>*>(&progress->done);
  opt.total = reinterpret_cast<std::atomic<uint64_t>*>(&progress->total);
  opt.cancel = reinterpret_cast<std::atomic<uint32_t>*>(&progress->cancel);
  CheckReport report;
  std::unique_ptr<Uring> uring;
  std::unique_ptr<UringDevice> dev;
  Status s = Uring::create(UringOptions{}, &uring);
  if (s) {
    DeviceOptions d;
    d.read_only = !opt.repair;
    s = UringDevice::open(*uring, cfg->data_path, d, &dev);
  }
  if (s) s = check_store(*dev, opt, &report);
  if (s && !report.findings.empty()) {
    out->finding = static_cast<kvfs_check_finding*>(calloc(report.findings.size(), sizeof(kvfs_check_finding)));
    if (!out->finding) s = {ENOMEM, "no memory for the findings"};
  }
  if (!s) {
    if (err && err_len) snprintf(err, err_len, "%s", s.message.c_str());
    return -s.err;
  }
  std::memcpy(out->counts, report.counts, sizeof out->counts);
  out->chunks = report.chunks;
  out->block_chunks = report.block_chunks;
  out->file_chunks = report.file_chunks;
  out->data_bytes = report.data_bytes;
  out->verified_bytes = report.verified_bytes;
  out->salvaged = report.salvaged;
  out->closed = report.closed;
  out->repaired = report.repaired;
  for (const Finding& f : report.findings) {
    kvfs_check_finding& to = out->finding[out->findings++];
    to.problem = static_cast<uint32_t>(f.problem);
    to.length = f.length;
    to.where = f.where;
    std::memcpy(&to.kind, &f.key, sizeof f.key);
  }
  return 0;
}

void kvfs_check_free(struct kvfs_check_report* report) {
  free(report->finding);
  report->finding = nullptr;
}
