// verbs.cpp: see verbs.h.
#include "verbs.h"

#include <dlfcn.h>

namespace kvfs {

namespace {

// Libraries before this call fill a smaller struct, without the link layer.
int query_port(ibv_context* context, uint8_t port, ibv_port_attr* attr) {
  verbs_context* v = verbs_get_ctx_op(context, query_port);
  if (v == nullptr) return EOPNOTSUPP;
  return v->query_port(context, port, attr, sizeof *attr);
}

void* library(const char* name, std::string* why) {
  void* lib = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (lib == nullptr)
    *why = std::string("RDMA is not available: ") + name +
           " cannot be loaded (apt install libibverbs1 librdmacm1 ibverbs-providers)";
  return lib;
}

template <typename F>
bool find(void* lib, const char* name, F* f, std::string* why) {
  *f = reinterpret_cast<F>(dlsym(lib, name));
  if (*f == nullptr) *why = std::string("RDMA is not available: the installed libraries have no ") + name;
  return *f != nullptr;
}

}  // namespace

bool load_verbs_from(const char* verbs, const char* cm, VerbsTable* table, std::string* why) {
  void* verbs_lib = library(verbs, why);
  void* cm_lib = verbs_lib != nullptr ? library(cm, why) : nullptr;
  if (cm_lib == nullptr) return false;
#define KVFS_FIND(member, function) \
  if (!find(verbs_lib, #function, &table->member, why)) return false;
  KVFS_VERBS_CALLS(KVFS_FIND)
#undef KVFS_FIND
#define KVFS_FIND(member, function) \
  if (!find(cm_lib, #function, &table->member, why)) return false;
  KVFS_RDMACM_CALLS(KVFS_FIND)
#undef KVFS_FIND
  if (!find(verbs_lib, "ibv_reg_mr", &table->reg_mr, why)) return false;
  table->query_port = query_port;
  table->req_notify_cq = [](ibv_cq* cq, int solicited) { return ibv_req_notify_cq(cq, solicited); };
  table->poll_cq = [](ibv_cq* cq, int n, ibv_wc* wc) { return ibv_poll_cq(cq, n, wc); };
  table->post_send = [](ibv_qp* qp, ibv_send_wr* wr, ibv_send_wr** bad) { return ibv_post_send(qp, wr, bad); };
  table->post_recv = [](ibv_qp* qp, ibv_recv_wr* wr, ibv_recv_wr** bad) { return ibv_post_recv(qp, wr, bad); };
  table->post_srq_recv = [](ibv_srq* s, ibv_recv_wr* wr, ibv_recv_wr** bad) { return ibv_post_srq_recv(s, wr, bad); };
  return true;
}

const VerbsTable* load_verbs(std::string* why) {
  // Stays for the life of the process: drivers of devices can't be unloaded safely.
  static VerbsTable table;
  static std::string reason;
  static const bool ok = load_verbs_from("libibverbs.so.1", "librdmacm.so.1", &table, &reason);
  if (!ok && why != nullptr) *why = reason;
  return ok ? &table : nullptr;
}

}  // namespace kvfs
